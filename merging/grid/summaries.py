"""What a study has found as tables: claims, cells, the references below its ratios, forecasts, what is there and how it was made."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from merging.grid.bootstrap import intervals
from merging.grid.claims import FAILS, HOLDS, UNDECIDED, Judged, Tested, threshold
from merging.grid.relative import Grid, Relative, category_means, over_cells
from merging.grid.results import Results, Study
from merging.grid.scaling import Forecast
from merging.grid.study_file import BASE, HELD_IN, HELD_OUT, MULTITASK, expert, is_trained
from merging.reporting.tables import NONE, Column, Interval, Mark, Table

KINDS = {HOLDS: "good", FAILS: "bad", UNDECIDED: "open"}
MEAN = "mean"  # in place of a seed

# A reference is told to be near chance where it lies within so many standard errors of it.
_NEAR = 2.0


# ---- claims -------------------------------------------------------------------------------------------------------


def claims_table(judged: Sequence[Judged], name: str, title: str) -> Table:
    """A row for each number of each claim."""
    return Table(
        name=name,
        title=title,
        caption="A claim holds where the 95 % interval of each number that decides lies beyond its threshold, and does not hold where one"
        " lies on the other side. Numbers without a threshold say how large an effect is. Paper: the same number from the paper's own"
        " table, which has Task Arithmetic at N = 2 and 8 alone.",
        columns=[
            Column(title="claim", key="id"),
            Column(title="what it says", key="claim"),
            Column(title="verdict", key="verdict"),
            Column(title="number", key="number"),
            Column(title="here, with 95 % interval", key="found"),
            Column(title="holds if", key="threshold"),
            Column(title="paper", key="paper"),
        ],
        rows=[
            [
                each.claim.id,
                each.claim.text,
                (Mark(each.verdict, KINDS[each.verdict]), *([each.why] if each.why else [])),
                tested.test.name,
                Interval(tested.found.value, tested.found.low, tested.found.high),
                threshold(tested.test) or NONE,
                _paper(each, tested),
            ]
            for each in judged
            for tested in each.tests
        ],
        spans=3,
        as_cards=True,
    )


def _paper(judged: Judged, tested: Tested) -> float | str:
    """The paper's number; where its table has none, what it says, once."""
    is_told = math.isnan(tested.paper) and tested is judged.tests[0] and judged.claim.paper
    return judged.claim.paper if is_told else tested.paper


# ---- cells --------------------------------------------------------------------------------------------------------


def cells_table(study: Study, found: Mapping[str, tuple[Relative, Grid]]) -> Table:
    """Every cell of every setting, and their means over seeds."""
    rows = [
        row
        for setting, (ratios, grid) in found.items()
        for row in _cells(study, setting, ratios, grid)
    ]
    return Table(
        name="cells",
        title="Cells",
        caption="Relative scores are means of ratios to the experts (held-in) or the base (held-out); raw and chance are means over the"
        " same datasets, with 0 for the chance of generated text. Intervals: of one seed over datasets, of means over seeds and"
        f" datasets. {NONE}: not there yet.",
        columns=[
            Column(title="size", key="size", choices=True),
            Column(title="base", key="base", choices=True),
            Column(title="method", key="method", choices=True),
            Column(title="N", key="num_experts", choices=True),
            Column(title="seed", key="seed", choices=True),
            Column(title="setting", key="setting", choices=len(found) > 1),
            Column(title="held-in", key="held_in"),
            Column(title="raw", key="held_in_raw"),
            Column(title="chance", key="held_in_chance"),
            Column(title="multitask held-in", key="multitask_held_in"),
            Column(title="held-out", key="held_out"),
            Column(title="raw", key="held_out_raw"),
            Column(title="chance", key="held_out_chance"),
            Column(title="multitask held-out", key="multitask_held_out"),
            Column(title="experts", key="categories"),
        ],
        rows=rows,
        interactive=True,
    )


def _cells(study: Study, setting: str, ratios: Relative, grid: Grid) -> Iterator[list[Any]]:
    datasets, raw_scores = study.datasets, ratios.results.raw
    chance = np.nan_to_num(ratios.results.chance)
    once = np.ones((1, len(datasets)))
    raw = np.where(ratios.is_there[..., None], raw_scores[ratios.rows], np.nan)
    plain: dict[str, np.ndarray] = {}  # [1, S, B, M, N, K]
    for role in (HELD_IN, HELD_OUT):
        plain[role] = category_means(raw, ratios.counts, once, datasets, role)
        by_chance = category_means(
            np.broadcast_to(chance, raw.shape), ratios.counts, once, datasets, role
        )
        plain[f"{role} chance"] = np.where(ratios.is_there, by_chance, np.nan)
    multitask = {HELD_IN: grid.multitask_held_in[:1], HELD_OUT: grid.multitask_held_out[:1]}
    multitask = {role: np.where(ratios.is_there, v, np.nan) for role, v in multitask.items()}
    relative = {HELD_IN: grid.held_in, HELD_OUT: grid.held_out}

    def numbers(at: tuple[int, ...], of: Mapping[str, tuple[np.ndarray, ...]]) -> Iterator[Any]:
        for role in (HELD_IN, HELD_OUT):
            yield Interval(*(float(each[at]) for each in of[role]))
            yield from (float(each[at]) for each in of[f"{role} others"])

    means: dict[str, tuple[np.ndarray, ...]] = {}
    single: dict[str, tuple[np.ndarray, ...]] = {}
    for role in (HELD_IN, HELD_OUT):
        others = (plain[role], plain[f"{role} chance"], multitask[role])
        means[role] = intervals(over_cells(grid, relative[role], ["seed"]))
        means[f"{role} others"] = tuple(_over_seeds(each[0]) for each in others)
        single[role] = intervals(relative[role])
        single[f"{role} others"] = tuple(each[0] for each in others)
    merged = {
        (c.size, c.base, c.method, c.num_experts, c.seed): " ".join(c.categories)
        for c in study.cells
        if c.setting == setting
    }
    for at in np.ndindex(ratios.rows.shape[:-1]):
        size, base, method, n = (
            list(axis)[i]
            for axis, i in zip(
                (study.sizes, study.bases, study.methods, study.num_experts), at, strict=True
            )
        )
        present = [k for k, seed in enumerate(study.seeds) if ratios.rows[(*at, k)] >= 0]
        if present:
            yield [size, base, method, n, MEAN, setting, *numbers(at, means), ""]
        for k in present:
            seed = study.seeds[k]
            experts = merged[size, base, method, n, seed]
            yield [size, base, method, n, str(seed), setting, *numbers((*at, k), single), experts]


def _over_seeds(values: np.ndarray) -> np.ndarray:
    present = np.isfinite(values)
    number = present.sum(axis=-1)
    total = np.where(present, values, 0).sum(axis=-1)
    return np.divide(total, number, out=np.full(total.shape, np.nan), where=number > 0)


def cells_file(study: Study, found: Mapping[str, tuple[Relative, Grid]]) -> Table:
    """The cells of one seed each, with the raw score of every dataset."""
    shown = cells_table(study, found)
    scores = {
        (cell.size, cell.base, cell.method, cell.num_experts, str(cell.seed), cell.setting): cell
        for cell in study.cells
    }
    results = next(iter(found.values()))[0].results
    rows = []
    for row in shown.rows:
        cell = scores.get(tuple(row[:6]))
        if cell is not None:
            raw = results.raw[results.rows[cell.size, cell.base, cell.model]]
            rows.append([*row, cell.model, study.sizes[cell.size], *raw.tolist()])
    more = [Column(title="model", key="model"), Column(title="parameters", key="parameters")]
    more += [Column(title=each.name, key=f"raw_{each.name}") for each in study.datasets]
    return Table(
        name="cells", title=shown.title, caption="", columns=[*shown.columns, *more], rows=rows
    )


# ---- what ratios stand on -----------------------------------------------------------------------------------------


def references_table(results: Results) -> Table:
    """Raw scores of base, expert and multitask model on each dataset, with chance; which of them a ratio should not stand on."""
    study = results.study
    rows = []
    for size in study.sizes:
        for base in study.bases:
            for column, each in enumerate(study.datasets):
                names = [BASE, expert(each.category), MULTITASK]
                raw = [
                    float(results.raw[results.rows[size, base, name], column])
                    if (size, base, name) in results.rows
                    else math.nan
                    for name in names
                ]
                reference = results.rows[size, base, names[each.role == HELD_IN]]
                rows.append(
                    [
                        size,
                        base,
                        each.category.replace("_", " "),
                        each.name,
                        each.role.replace("_", "-"),
                        each.metric,
                        float(results.chance[column]),
                        *raw,
                        _worth(
                            results.raw[reference, column],
                            results.stderr[reference, column],
                            results.chance[column],
                        ),
                    ]
                )
    return Table(
        name="references",
        title="References",
        caption="Raw scores of the models that are not merged. Held-in ratios have the expert below the line, held-out ratios the base."
        " One near chance (within two standard errors) makes a ratio say little: it compares noise with noise.",
        columns=[
            Column(title="size", key="size", choices=True),
            Column(title="base", key="base", choices=True),
            Column(title="category", key="category", choices=True),
            Column(title="dataset", key="dataset"),
            Column(title="role", key="role", choices=True),
            Column(title="metric", key="metric"),
            Column(title="chance", key="chance"),
            Column(title="base model", key="base_raw"),
            Column(title="expert", key="expert_raw"),
            Column(title="multitask", key="multitask_raw"),
            Column(title="below the line", key="reference", choices=True),
        ],
        rows=rows,
        interactive=True,
    )


def _worth(raw: float, stderr: float, chance: float) -> str:
    if math.isnan(raw):
        return "missing"
    if raw == 0:
        return "0: no ratio"
    if math.isfinite(chance) and raw - chance < _NEAR * np.nan_to_num(stderr):
        return "near chance"
    return "fine"


# ---- forecasts ----------------------------------------------------------------------------------------------------


def forecasts_table(forecasts: Sequence[Forecast], name: str, title: str) -> Table:
    """A row for each law."""
    return Table(
        name=name,
        title=title,
        caption="Errors are means of |law - loss| / loss. Persistence forecasts that nothing changes beyond the largest k that was fitted"
        " on: a law is worth something where it does better. beta and L* take three sizes to tell.",
        columns=[
            Column(title="base", key="base"),
            Column(title="method", key="method"),
            Column(title="beta", key="beta"),
            Column(title="L*", key="limit"),
            Column(title="A", key="gain"),
            Column(title="b", key="offset"),
            Column(title="error of the fit", key="fit_error", digits=4),
            Column(title="error of the forecast", key="forecast_error", digits=4),
            Column(title="error of persistence", key="persistence_error", digits=4),
        ],
        rows=[
            [
                each.base,
                each.method,
                each.law.exponent,
                each.law.limit,
                each.law.gain,
                each.law.offset,
                each.fit_error,
                each.forecast_error,
                each.persistence_error,
            ]
            for each in forecasts
        ],
    )


# ---- what is there, and how it was made ---------------------------------------------------------------------------


def progress_table(results: Results) -> Table:
    """Models with all their scores, by size and base."""
    study = results.study
    is_there = {model: results.is_there[row] for model, row in results.rows.items()}
    rows = []
    for size in study.sizes:
        for base in study.bases:
            here = {m[2]: there for m, there in is_there.items() if m[:2] == (size, base)}
            trained = set(filter(is_trained, here))
            merged = set(here) - trained
            cells = [c for c in study.cells if (c.size, c.base) == (size, base)]
            rows.append(
                [
                    size,
                    study.sizes[size],
                    base,
                    f"{sum(here[name] for name in trained)} of {len(trained)}",
                    f"{sum(here[name] for name in merged)} of {len(merged)}",
                    f"{sum(here[c.model] for c in cells)} of {len(cells)}",
                ]
            )
    return Table(
        name="progress",
        title="Models and cells",
        caption="Models whose datasets are all scored. Cells that no seed can change share a model.",
        columns=[
            Column(title="size", key="size"),
            Column(title="parameters", key="parameters"),
            Column(title="base", key="base"),
            Column(title="base, experts, multitask", key="trained"),
            Column(title="merged models", key="merged"),
            Column(title="cells", key="cells"),
        ],
        rows=rows,
    )


def making_table(results: Results) -> Table:
    """Manifests that agree in code, libraries and device, with the time they span."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = collections.defaultdict(list)
    for each in results.manifests.values():
        environment = each.get("environment", {})
        device = environment.get("device", {})
        libraries = environment.get("libraries", {})
        key = (
            str(each.get("stage", NONE)),
            str(environment.get("code", NONE))[:12],
            str(environment.get("python", NONE)),
            ", ".join(f"{name} {version}" for name, version in libraries.items()),
            f"{environment.get('devices', NONE)} x {device.get('kind', NONE)}",
        )
        groups[key].append(each)
    return Table(
        name="making",
        title="Manifests",
        caption="Every output says what made it; outputs of the same code, libraries and devices are one row.",
        columns=[
            Column(title="stage", key="stage"),
            Column(title="outputs", key="outputs"),
            Column(title="first", key="first"),
            Column(title="last", key="last"),
            Column(title="devices", key="devices"),
            Column(title="Python", key="python"),
            Column(title="libraries", key="libraries"),
            Column(title="code", key="code"),
        ],
        rows=[
            [
                stage,
                len(found),
                min(str(each.get("made", "")) for each in found),
                max(str(each.get("made", "")) for each in found),
                devices,
                python,
                libraries,
                code,
            ]
            for (stage, code, python, libraries, devices), found in sorted(groups.items())
        ],
    )


def seconds_table(results: Results) -> Table:
    """The times that manifests tell, summed by size and base."""
    totals: dict[tuple[str, str, str], list[float]] = collections.defaultdict(list)
    for place, each in results.manifests.items():
        kind, size, base = place.split("/")[:3]
        for name, value in each.items():
            if name == "seconds" or name.endswith("_seconds"):
                what = name.removesuffix("seconds").strip("_").replace("_", " ") or str(
                    each.get("stage")
                )
                totals[size, base, f"{what} ({kind})"].append(float(value))
    return Table(
        name="seconds",
        title="Times",
        caption="As the manifests have them: of what, and in brackets whose.",
        columns=[
            Column(title="size", key="size"),
            Column(title="base", key="base"),
            Column(title="what", key="what"),
            Column(title="times", key="count"),
            Column(title="seconds", key="seconds", digits=1),
            Column(title="median", key="median", digits=2),
        ],
        rows=[
            [size, base, what, len(seconds), sum(seconds), float(np.median(seconds))]
            for (size, base, what), seconds in totals.items()
        ],
    )


def shares(results: Results) -> str:
    """Where the time went, as far as manifests tell it, in words; "" where they don't."""
    work = every = merge = cells = 0.0
    for place, each in results.manifests.items():
        kind, *model = place.split("/")
        if kind == "scores" and "forward_seconds" in each:
            seconds = each["load_seconds"] + each["merge_seconds"] + each["evaluate_seconds"]
            work += each["merge_seconds"] + each["forward_seconds"]
            every += seconds
            if not is_trained(model[-1]):
                merge += each["merge_seconds"]
                cells += seconds
        elif kind == "models" and len(model) == 3 and "step_seconds" in each:  # a run of training
            work += each["step_seconds"]
            every += each["seconds"]
    told = []
    if every:
        told.append(
            f"{1 - work / every:.1%} of the time passed outside training steps, merges and forward passes"
        )
    if cells:
        told.append(f"merging took {merge / cells:.1%} of the time of a cell")
    return f"Of the outputs that tell it, {'; '.join(told)}." if told else ""


def cut_inputs(results: Results) -> str:
    """Examples that lost tokens to the lengths, in words; "" where no manifest counts them."""
    found: dict[str, Mapping[str, int]] = {}
    for each in results.manifests.values():
        found |= each.get("cut", {})
    total = sum(each["examples"] for each in found.values())
    if not total:
        return ""
    told = []
    for what in ("inputs", "targets"):
        share = sum(each[what] for each in found.values()) / total
        most = sorted(found, key=lambda task: -found[task][what] / found[task]["examples"])[:3]
        named = [f"{t} {found[t][what] / found[t]['examples']:.0%}" for t in most if found[t][what]]
        told.append(f"{what} of {share:.1%}" + (f" ({', '.join(named)})" if named else ""))
    return f"Cut to the lengths that were set, of {total:,} examples: {'; '.join(told)}."
