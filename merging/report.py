"""The report stage: what a study has found so far, as a page, tables and figures.

It reads study.json, scores and manifests alone, and says how much of the study is there. Since that grows, a report is made anew each
time, in place of the last, whole or not at all.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from merging import manifest
from merging.checkpoints.storage import is_local, sync
from merging.grid import bootstrap, results, scaling, summaries
from merging.grid.bootstrap import Estimate
from merging.grid.claims import FAILS, HOLDS, UNDECIDED, Judged, judge, threshold
from merging.grid.figures import figures, scaling_figure, vector_figures
from merging.grid.relative import Grid, Relative, grid, relative
from merging.grid.results import Results
from merging.grid.scaling import Forecast
from merging.reporting import tables
from merging.reporting.figures import Drawn, draw
from merging.reporting.page import Block, Folded, Page, Section, Text, to_html, to_markdown

STAGE = "report"
FIGURES = "figures"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What was made.

    Attributes:
      page: path of index.html.
      claims: of each setting of the study.
      there, wanted: models with all their scores, and all models.
    """

    page: epath.Path
    claims: Mapping[str, Sequence[Judged]]
    there: int
    wanted: int

    def describe(self) -> str:
        """Claims and where to read on, as text."""
        lines = []
        for setting, judged in self.claims.items():
            lines.append(f"claims, {setting} settings:")
            for each in judged:
                first = each.tests[0]
                found = tables.text(tables.Interval(*dataclasses.astuple(first.found)))
                lines.append(f"  {each.claim.id:4} {each.verdict:15} {found:24} {first.test.name}")
        lines.append(f"scores of {self.there} of {self.wanted} models")
        lines.append(f"report     {self.page}")
        return "\n".join(lines)


def report(
    study_dir: epath.PathLike,
    output_dir: epath.PathLike | None = None,
    *,
    draws: int = bootstrap.DRAWS,
    seed: int = 0,
) -> Report:
    """Makes the report of a study.

    Args:
      study_dir: what launch.study made, finished or not.
      output_dir: default `report` in it. A report that is there is replaced.
      draws, seed: of the bootstrap.

    Raises:
      ValueError: for a folder that is no study, files of it that can't be read, and an output folder with something else in it.
    """
    study_dir = epath.Path(study_dir)
    output = epath.Path(output_dir) if output_dir is not None else study_dir / "report"
    _check_output(output)
    found = results.read(study_dir)
    drawn = bootstrap.draw(
        [each.role for each in found.study.datasets], len(found.study.seeds), draws=draws, seed=seed
    )
    graded: dict[str, tuple[Relative, Grid]] = {}
    for setting in found.study.settings:
        ratios = relative(found, setting)
        graded[setting] = ratios, grid(ratios, drawn)
    claims = {setting: judge(of_cells) for setting, (_, of_cells) in graded.items()}
    laws = {setting: scaling.forecasts(found, setting) for setting in graded}
    pictures = {
        setting: _pictures(found, setting, graded[setting][1], laws[setting]) for setting in graded
    }
    vectors = [draw(each) for each in vector_figures(found)]
    page = _page(found, graded, claims, laws, pictures, vectors, draws=draws, seed=seed)
    files: dict[str, bytes] = {
        "index.html": to_html(page).encode(),
        "report.md": to_markdown(page, figures=FIGURES).encode(),
        "cells.csv": tables.to_csv(summaries.cells_file(found.study, graded)).encode(),
        "references.csv": tables.to_csv(summaries.references_table(found)).encode(),
        "report.json": _json(found, graded, claims, laws, draws=draws, seed=seed),
    }
    for each in [*(d for of_setting in pictures.values() for d in of_setting), *vectors]:
        files[f"{FIGURES}/{each.figure.name}.svg"] = each.svg.encode()
        files[f"{FIGURES}/{each.figure.name}.png"] = each.png
    _put(output, files, study_dir)
    return Report(
        page=output / "index.html",
        claims=claims,
        there=int(found.is_there.sum()),
        wanted=len(found.rows),
    )


def _suffix(setting: str) -> str:
    return "" if setting == "fixed" else f"_{setting}"


def _pictures(
    found: Results, setting: str, of_cells: Grid, laws: Sequence[Forecast]
) -> list[Drawn]:
    all_of_them = list(figures(found.study, of_cells, _suffix(setting)))
    if laws:
        all_of_them.append(scaling_figure(found.study, laws, _suffix(setting)))
    return [draw(each) for each in all_of_them]


# ---- the page -----------------------------------------------------------------------------------------------------


def _page(
    found: Results,
    graded: Mapping[str, tuple[Relative, Grid]],
    claims: Mapping[str, Sequence[Judged]],
    laws: Mapping[str, Sequence[Forecast]],
    pictures: Mapping[str, Sequence[Drawn]],
    vectors: Sequence[Drawn],
    *,
    draws: int,
    seed: int,
) -> Page:
    study = found.study
    many = len(graded) > 1
    sections = [
        Section(
            name="claims",
            title="The paper's findings, tested",
            blocks=[
                *(
                    summaries.claims_table(
                        judged,
                        name=f"claims{_suffix(setting)}",
                        title=f"Claims, {setting} settings" if many else "Claims",
                    )
                    for setting, judged in claims.items()
                ),
                *map(Text, _reading(found, draws=draws)),
            ],
        ),
        Section(name="progress", title="What is there", blocks=list(_there(found, graded))),
    ]
    for setting, of_setting in pictures.items():
        blocks: list[Block] = list(of_setting)
        if laws[setting]:
            blocks.append(
                summaries.forecasts_table(
                    laws[setting], f"forecasts{_suffix(setting)}", "Scaling law"
                )
            )
        sections.append(
            Section(
                name=f"figures{_suffix(setting)}",
                title=f"Figures, {setting} settings" if many else "Figures",
                blocks=blocks,
            )
        )
    if vectors:
        sections.append(Section(name="vectors", title="How experts interfere", blocks=vectors))
    sections += [
        Section(
            name="every-cell", title="Every cell", blocks=[summaries.cells_table(study, graded)]
        ),
        Section(
            name="below-the-line",
            title="What the ratios stand on",
            blocks=[summaries.references_table(found)],
        ),
        Section(name="making", title="How it was made", blocks=list(_making(found, draws, seed))),
    ]
    verdicts = [each.verdict for judged in claims.values() for each in judged]
    counted = ", ".join(
        f"{verdicts.count(verdict)} {word}"
        for verdict, word in ((HOLDS, "hold"), (FAILS, "do not hold"), (UNDECIDED, "are undecided"))
    )
    return Page(
        title=f"{study.name}: what matters for model merging",
        lead=[
            study.question,
            f"{len(verdicts)} claims of arXiv 2410.03617: {counted}. Scores of {int(found.is_there.sum())} of"
            f" {len(found.rows)} models are there.",
        ],
        sections=sections,
        foot="Made by merging-at-scale from scores and manifests alone.",
    )


def _reading(found: Results, *, draws: int) -> Iterator[str]:
    study = found.study
    yield (
        "A relative score is a mean of ratios: raw over the raw score of the category's expert (held-in, of the merged experts'"
        " categories alone) or of the base (held-out), averaged over the datasets of a category, then over categories, then over seeds."
        " IT and PT are the instruction-tuned and the pretrained base, N the number of experts."
    )
    seeds = len(study.seeds)
    yield (
        f"Intervals are of {draws:,} draws of {'seeds and datasets' if seeds > 1 else 'datasets (there is one seed)'}, with replacement,"
        " the same for all cells. Other training runs and other examples are not in them: "
        + (
            "three seeds or fewer make them too narrow rather than too wide."
            if seeds <= 3
            else "they are rather too narrow."
        )
    )


def _there(found: Results, graded: Mapping[str, tuple[Relative, Grid]]) -> Iterator[Block]:
    yield summaries.progress_table(found)
    without = next(iter(graded.values()))[0].without_ratio if graded else []
    if without:
        told = "; ".join(f"{dataset} at {size} {base}" for size, base, dataset in without)
        yield Text(
            f"Left out of the means, since the reference below the ratio is 0: {told}. Their raw scores are in the tables below."
        )


def _making(found: Results, draws: int, seed: int) -> Iterator[Block]:
    study = found.study
    yield Text(
        "Methods: " + "; ".join(f"{name}: {how}" for name, how in study.methods.items()) + "."
    )
    yield Text(
        f"Seeds {', '.join(map(str, study.seeds))} pick the experts and draw DARE's masks. The bootstrap has seed {seed} and {draws:,} draws."
    )
    for told in (summaries.cut_inputs(found), summaries.shares(found)):
        if told:
            yield Text(told)
    yield summaries.seconds_table(found)
    yield summaries.making_table(found)
    digests = tables.Table(
        name="digests",
        title="Outputs",
        caption="The digest is of what an output is made from: settings and inputs.",
        columns=[
            tables.Column(title="output", key="output"),
            tables.Column(title="made", key="made"),
            tables.Column(title="digest", key="digest"),
        ],
        rows=[
            [
                place,
                str(each.get("made", tables.NONE)),
                str(each.get("identity_digest", tables.NONE))[:16],
            ]
            for place, each in found.manifests.items()
        ],
    )
    if digests.rows:
        yield Folded(f"The {len(digests.rows)} outputs", [digests])


# ---- files --------------------------------------------------------------------------------------------------------


def _json(
    found: Results,
    graded: Mapping[str, tuple[Relative, Grid]],
    claims: Mapping[str, Sequence[Judged]],
    laws: Mapping[str, Sequence[Forecast]],
    *,
    draws: int,
    seed: int,
) -> bytes:
    """All numbers of the page, NaN as null."""
    study = found.study
    cells = summaries.cells_table(study, graded)
    content = {
        "version": 1,
        "name": study.name,
        "question": study.question,
        "models": {"there": int(found.is_there.sum()), "wanted": len(found.rows)},
        "bootstrap": {"draws": draws, "seed": seed, "level": bootstrap.LEVEL},
        "claims": {setting: list(map(_claim, judged)) for setting, judged in claims.items()},
        "cells": [
            dict(zip([c.key for c in cells.columns], row, strict=True)) for row in cells.rows
        ],
        "scaling": {s: [dataclasses.asdict(each) for each in of] for s, of in laws.items()},
        "without_ratio": {s: each.without_ratio for s, (each, _) in graded.items()},
        "vectors": {
            "/".join(model): {
                "experts": each.experts,
                "norms": each.norms,
                "cosines": each.cosines,
                "sign_conflict": each.sign_conflict,
            }
            for model, each in found.vectors.items()
        },
        "datasets": [
            {**dataclasses.asdict(each), "chance": chance}
            for each, chance in zip(study.datasets, found.chance.tolist(), strict=True)
        ],
        "scores": {
            "/".join(model): {
                "raw": found.raw[row],
                "stderr": found.stderr[row],
                "prompt_spread": found.spread[row],
            }
            for model, row in found.rows.items()
        },
        "losses": {"/".join(model): loss for model, loss in found.losses.items()},
    }
    return (json.dumps(_plain(content), indent=1, allow_nan=False) + "\n").encode()


def _claim(judged: Judged) -> dict[str, Any]:
    return {
        "id": judged.claim.id,
        "text": judged.claim.text,
        "verdict": judged.verdict,
        "why": judged.why,
        "paper": judged.claim.paper,
        "tests": [
            {
                "name": each.test.name,
                **dataclasses.asdict(each.found),
                "threshold": threshold(each.test),
                "verdict": each.verdict,
                "paper": each.paper,
            }
            for each in judged.tests
        ],
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, tables.Interval | Estimate):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _check_output(output: epath.Path) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise manifest.OutputError(f"{output} is a file: move it away or choose another OUTPUT_DIR")
    before = manifest.read(output)
    if before is None and any(output.iterdir()) and not (output / manifest.MARKER).exists():
        raise manifest.OutputError(
            f"{output} holds something that is no report (it has no {manifest.MANIFEST}): nothing in it is touched; choose another"
            " OUTPUT_DIR"
        )
    if before is not None and before.get("stage") != STAGE:
        raise manifest.OutputError(
            f"{output} holds the output of {before.get('stage')}, no report: choose another OUTPUT_DIR"
        )


def _put(output: epath.Path, files: Mapping[str, bytes], study_dir: epath.Path) -> None:
    """All files, in place of what is there."""
    # Two may run at once. A bucket knows no renaming: there the manifest, put last, makes a report of the files, and a marker
    # says until then that they are ours.
    making = output.parent / f"{output.name}.partial.{os.getpid()}" if is_local(output) else output
    before = output.parent / f"{output.name}.before.{os.getpid()}"
    marker = {} if is_local(output) or manifest.read(output) else {manifest.MARKER: b"{}"}
    for name, content in (marker | files).items():
        path = making / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    manifest.write(
        making,
        {
            "stage": STAGE,
            "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "study": str(study_dir),
            "code": manifest.code_digest(),
        },
    )
    if not is_local(output):
        (output / manifest.MARKER).unlink(missing_ok=True)
        return
    sync(making)
    if output.exists():
        output.rename(before)
    making.rename(output)
    if before.exists():
        before.rmtree()
