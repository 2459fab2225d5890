"""The paper's questions as figures, and how task vectors lie to one another, as data for `reporting.figures`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from merging.grid.bootstrap import intervals
from merging.grid.relative import Grid, over_cells
from merging.grid.results import Results, Study
from merging.grid.scaling import FITTED_ON, Forecast
from merging.reporting.figures import KINDS, MARKERS, STEPS, Heat, Heats, Line, Lines, Look, Panel

_ALL = ("base", "method", "num_experts", "seed")
HELD_IN, HELD_OUT = "held-in score, relative", "held-out score, relative"
BOTH = "score, relative"
_BARS = "Bars: 95 % of the draws of seeds and datasets."


def figures(study: Study, grid: Grid, suffix: str = "") -> Iterator[Lines]:
    """Five questions of one setting; `suffix` goes behind their names."""
    sizes, bases, methods = list(study.sizes), list(study.bases), list(study.methods)
    numbers = [str(n) for n in study.num_experts]

    by_base = _found(grid, grid.held_in, ["num_experts", "seed"], ["size", "base"])  # [S, B, M]
    multitask = _found(
        grid, grid.multitask_held_in, ["method", "num_experts", "seed"], ["size", "base"]
    )
    yield Lines(
        name=f"held_in_by_base{suffix}",
        title="Held-in: does the base matter?",
        caption="Relative held-in scores of merged models by the base that the experts come from, averaged over N. 1 is each"
        f" category's own expert; dashed: the multitask model. {_BARS}",
        x="size",
        y=HELD_IN,
        ticks=sizes,
        level=1.0,
        panels=[
            Panel(
                title=method,
                lines=[
                    *(
                        _line(base, by_base, np.s_[:, b, m], KINDS[b], b)
                        for b, base in enumerate(bases)
                    ),
                    *(
                        _line(
                            f"{base}, multitask", multitask, np.s_[:, b], KINDS[b], look="reference"
                        )
                        for b, base in enumerate(bases)
                    ),
                ],
            )
            for m, method in enumerate(methods)
        ],
    )

    by_size = _found(grid, grid.held_in, ["method", "seed"], ["size"])  # [S, B, N]
    yield Lines(
        name=f"held_in_by_size{suffix}",
        title="Held-in: do larger models merge better?",
        caption=f"Relative held-in scores by size, a line for each number of experts N, averaged over methods. {_BARS}",
        x="size",
        y=HELD_IN,
        ticks=sizes,
        level=1.0,
        columns=2,
        panels=[
            Panel(
                title=base,
                lines=_steps([f"N = {n}" for n in numbers], by_size, lambda n, b=b: np.s_[:, b, n]),
            )
            for b, base in enumerate(bases)
        ],
    )

    held_out = _found(grid, grid.held_out, ["method", "seed"], ["size"])  # [S, B, N]
    above = _found(
        grid, grid.multitask_held_out, ["method", "num_experts", "seed"], ["size"]
    )  # [S, B]
    yield Lines(
        name=f"held_out_against_multitask{suffix}",
        title="Held-out: does merging generalise, and as well as multitask training?",
        caption="Relative held-out scores by size, a line for each N, averaged over methods. 1 is the base; dashed: the multitask"
        f" model. {_BARS}",
        x="size",
        y=HELD_OUT,
        ticks=sizes,
        level=1.0,
        columns=2,
        panels=[
            Panel(
                title=base,
                lines=[
                    *_steps([f"N = {n}" for n in numbers], held_out, lambda n, b=b: np.s_[:, b, n]),
                    _line("multitask", above, np.s_[:, b], "kind-1", look="reference"),
                ],
            )
            for b, base in enumerate(bases)
        ],
    )

    by_number = [
        (role, _found(grid, values, ["method", "seed"], ["num_experts"]))  # [S, B, N]
        for role, values in (("held-in", grid.held_in), ("held-out", grid.held_out))
    ]
    yield Lines(
        name=f"number_of_experts{suffix}",
        title="How many experts?",
        caption=f"Relative scores by the number of experts N, a line for each size, averaged over methods. {_BARS}",
        x="N",
        y=BOTH,
        ticks=numbers,
        level=1.0,
        columns=len(bases),
        panels=[
            Panel(
                title=f"{role}, {base}", lines=_steps(sizes, found, lambda s, b=b: np.s_[s, b, :])
            )
            for role, found in by_number
            for b, base in enumerate(bases)
        ],
    )

    by_method = [
        (role, _found(grid, values, ["num_experts", "seed"], ["size", "method"]))  # [S, B, M]
        for role, values in (("held-in", grid.held_in), ("held-out", grid.held_out))
    ]
    yield Lines(
        name=f"methods{suffix}",
        title="Do methods become alike at scale?",
        caption=f"Relative scores by size, a line for each method, averaged over N. {_BARS}",
        x="size",
        y=BOTH,
        ticks=sizes,
        level=1.0,
        columns=len(bases),
        panels=[
            Panel(
                title=f"{role}, {base}",
                lines=[
                    _line(method, found, np.s_[:, b, m], KINDS[m % len(KINDS)], m)
                    for m, method in enumerate(methods)
                ],
            )
            for role, found in by_method
            for b, base in enumerate(bases)
        ],
    )


Found = tuple[np.ndarray, np.ndarray, np.ndarray]  # value, low, high


def _found(grid: Grid, values: np.ndarray, over: Sequence[str], alike: Sequence[str]) -> Found:
    return intervals(over_cells(grid, values, over, alike=alike))


def _line(
    label: str, found: Found, at: tuple, color: str, marker: int = 0, look: Look = "line"
) -> Line:
    value, low, high = (each[at] for each in found)
    has_interval = look == "line"
    return Line(
        label=label,
        values=value,
        low=low if has_interval else (),
        high=high if has_interval else (),
        color=color,
        marker=MARKERS[marker % len(MARKERS)],
        look=look,
    )


def _steps(labels: Sequence[str], found: Found, at) -> list[Line]:
    """Lines whose labels have an order."""
    return [_line(each, found, at(i), _step(i, len(labels)), i) for i, each in enumerate(labels)]


def _step(i: int, count: int) -> str:
    """Spread over the steps, so that few differ as much as they can."""
    return STEPS[round(i * (len(STEPS) - 1) / max(count - 1, 1)) if count > 1 else 2]


# ---- task vectors -------------------------------------------------------------------------------------------------


def vector_figures(results: Results) -> Iterator[Heats]:
    """Cosines and sign conflicts of each base, size by size."""
    for base in results.study.bases:
        found = {
            size: results.vectors[size, base]
            for size in results.study.sizes
            if (size, base) in results.vectors
        }
        if not found:
            continue
        labels = next(iter(found.values())).experts
        for name, title, caption, is_signed in (
            (
                "cosines",
                "cosines of task vectors",
                "Cosine between the task vectors (expert - base) of each pair: 0 is a right angle, 1 the same direction.",
                True,
            ),
            (
                "sign_conflict",
                "sign conflict of task vectors",
                "Of the parameters that both experts of a pair have changed the share that they have moved in opposite directions.",
                False,
            ),
        ):
            arrays = {size: _pairs(getattr(each, name)) for size, each in found.items()}
            largest = max(0.05, *(float(np.nanmax(np.abs(a), initial=0)) for a in arrays.values()))
            high = math.ceil(largest * 20) / 20
            yield Heats(
                name=f"{name}_{base}",
                title=f"{base}: {title}",
                caption=caption,
                labels=[label.replace("_", " ") for label in labels],
                columns=2,
                maps=[
                    Heat(title=size, values=a, low=-high if is_signed else 0.0, high=high)
                    for size, a in arrays.items()
                ],
            )


def _pairs(values: np.ndarray) -> np.ndarray:
    """Without the diagonal, which says nothing."""
    return np.where(np.eye(len(values), dtype=bool), np.nan, values)


# ---- scaling law --------------------------------------------------------------------------------------------------


def scaling_figure(study: Study, forecasts: Sequence[Forecast], suffix: str = "") -> Lines:
    """Measured losses, and the laws fitted on the first of them."""
    ks = sorted({p.k for each in forecasts for p in each.points})
    sizes = list(study.sizes)
    panels = []
    for each in forecasts:
        lines = []
        for s, size in enumerate(sizes):
            losses = {p.k: p.loss for p in each.points if p.size == size}
            if not losses:
                continue
            color, marker = _step(s, len(sizes)), MARKERS[s % len(MARKERS)]
            law = [each.law.loss(size, k) for k in ks]
            lines.append(
                Line(
                    label=f"law at {size}", legend="law", values=law, color=color, look="reference"
                )
            )
            for label, legend, look, is_fitted in (
                (f"{size}, fitted on", size, "marks", True),
                (f"{size}, to forecast", "to forecast", "hollow", False),
            ):
                values = [
                    losses.get(k, math.nan) if (k in FITTED_ON) == is_fitted else math.nan
                    for k in ks
                ]
                if np.isfinite(values).any():
                    lines.append(
                        Line(
                            label=label,
                            legend=legend,
                            values=values,
                            color=color,
                            marker=marker,
                            look=look,
                        )
                    )
        panels.append(Panel(title=f"{each.method}, {each.base}", lines=lines))
    return Lines(
        name=f"scaling_law{suffix}",
        title="Does a law forecast the loss of larger merges?",
        caption="Cross-entropy by the number of experts k. The law L* + B size^-beta + A / (k + b) is fitted on the filled marks; the"
        " hollow ones are what it forecasts.",
        x="k",
        y="nats per token",
        ticks=[str(k) for k in ks],
        panels=panels,
    )
