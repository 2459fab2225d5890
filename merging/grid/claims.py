"""The paper's findings as claims that a grid can hold or refute (arXiv 2410.03617).

Each claim is one or more tests: a number from the grid, which its interval puts above or below a threshold, or leaves undecided.
A claim holds where all its tests hold, does not hold where one of them fails, and is undecided otherwise, also where the grid lacks
what the number is made of. A cell here is (size, base, method, N), averaged over seeds; equal merges under several seeds weigh as one.
Scores are relative ones. Numbers that only say how large an effect is stand beside and decide nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from merging.grid import paper
from merging.grid.bootstrap import Estimate, estimate
from merging.grid.relative import AXES, Grid, mean, over_cells
from merging.grid.study_file import INSTRUCTION_TUNED, PRETRAINED

Verdict = Literal["holds", "does not hold", "undecided"]
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"

HALF = 0.5  # a share of cells above it is most of them
# Relative scores that differ by less than this count as equal where a claim is that nothing is lost: the paper's own table is
# given to 0.01, and its seeds differ by more.
MARGIN = 0.02
# Per expert, from N = 2 to 8 a change of 0.06: less is what "hardly matters" means.
SLOPE_MARGIN = 0.01
MANY_EXPERTS = 6

# From a grid to a number for the observed study and each draw, [R]; NaN where the grid lacks what it is made of.
Statistic = Callable[[Grid], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Test:
    """A number that decides, or one that stands beside.

    Attributes:
      name: what the number is.
      above, below: the threshold, one of them; neither: it decides nothing.
    """

    name: str
    statistic: Statistic
    above: float | None = None
    below: float | None = None

    def verdict(self, found: Estimate) -> Verdict:
        """By the interval: all of it beyond the threshold, none of it, or some."""
        low, high = found.low, found.high
        if math.isnan(low):
            return UNDECIDED
        if self.below is not None:
            return HOLDS if high < self.below else FAILS if low >= self.below else UNDECIDED
        return HOLDS if low > self.above else FAILS if high <= self.above else UNDECIDED

    @property
    def decides(self) -> bool:
        return self.above is not None or self.below is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """One finding.

    Attributes:
      needs: what a grid must have for all tests to have a number.
      paper: what the paper says where its table has no number for a test.
    """

    id: str
    text: str
    tests: tuple[Test, ...]
    needs: str
    paper: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tested:
    """A test's outcome.

    Attributes:
      paper: the same number from the paper's table; NaN where that has none.
    """

    test: Test
    found: Estimate
    paper: float
    verdict: Verdict | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """A claim's outcome.

    Attributes:
      why: of an undecided one, what is missing or too close.
    """

    claim: Claim
    tests: tuple[Tested, ...]
    verdict: Verdict
    why: str


def judge(grid: Grid) -> list[Judged]:
    """Every claim, on one grid."""
    reported = paper.grid()
    return [_judge(claim, grid, reported) for claim in CLAIMS]


def _judge(claim: Claim, grid: Grid, reported: Grid) -> Judged:
    tests = []
    for test in claim.tests:
        found = estimate(test.statistic(grid))
        tests.append(
            Tested(
                test=test,
                found=found,
                paper=float(test.statistic(reported)[0]),
                verdict=test.verdict(found) if test.decides else None,
            )
        )
    deciding = [each for each in tests if each.verdict is not None]
    verdicts = [each.verdict for each in deciding]
    if FAILS in verdicts:
        return Judged(claim=claim, tests=tuple(tests), verdict=FAILS, why="")
    if all(verdict == HOLDS for verdict in verdicts):
        return Judged(claim=claim, tests=tuple(tests), verdict=HOLDS, why="")
    if any(math.isnan(each.found.low) for each in deciding):
        why = f"needs {claim.needs}"
    else:
        limits = [f"{threshold(e.test)[2:]}" for e in deciding if e.verdict == UNDECIDED]
        why = f"an interval lies on both sides of {' and '.join(dict.fromkeys(limits))}"
    return Judged(claim=claim, tests=tuple(tests), verdict=UNDECIDED, why=why)


def threshold(test: Test) -> str:
    """`> 0.5`, `< 0`, or nothing."""
    if not test.decides:
        return ""
    return f"> {test.above:g}" if test.above is not None else f"< {test.below:g}"


# ---- statistics: [R] of a grid --------------------------------------------------------------------------------------


def _base_gap(grid: Grid) -> np.ndarray:
    """Held-in of the instruction-tuned base less that of the pretrained one, [R, S, M, N]."""
    held_in = over_cells(grid, grid.held_in, ["seed"], alike=["base"])
    tuned, pretrained = grid.base(INSTRUCTION_TUNED), grid.base(PRETRAINED)
    if tuned is None or pretrained is None:
        return _nothing(grid)
    return held_in[:, :, tuned] - held_in[:, :, pretrained]


def _size_trend(grid: Grid, values: np.ndarray) -> np.ndarray:
    """Rank correlation of size and score, of every (base, method, N), averaged."""
    return mean(rank_correlation(over_cells(grid, values, ["seed"], alike=["size"]), _SIZE))


def _slopes(grid: Grid, values: np.ndarray, role: str | None = None) -> np.ndarray:
    """The change per expert of every (size, base, method), averaged; of one base or all."""
    chosen = _of_base(grid, over_cells(grid, values, ["seed"], alike=["num_experts"]), role)
    return mean(slope(chosen, np.array(grid.num_experts, float)))


def _share_over_base(grid: Grid, role: str | None = None) -> np.ndarray:
    """Of cells, held-out at least the base's."""
    held_out = _of_base(grid, over_cells(grid, grid.held_out, ["seed"]), role)
    return share(held_out, held_out >= 1)


def _to_multitask_at_scale(grid: Grid) -> np.ndarray:
    """Held-out less the multitask model's, for N of at least 6 and the two largest sizes, instruction-tuned."""
    gap = over_cells(grid, grid.held_out - grid.multitask_held_out, ["seed"])
    gap = _of_base(grid, gap, INSTRUCTION_TUNED)
    many = np.array(grid.num_experts) >= MANY_EXPERTS
    return mean(gap[:, -2:][..., many] if len(grid.sizes) > 1 else _nothing(grid))


def _drops(grid: Grid) -> np.ndarray:
    """Held-in at the fewest experts less held-in at the most, [R, S, B, M]."""
    held_in = over_cells(grid, grid.held_in, ["seed"], alike=["size", "num_experts"])
    return held_in[..., 0] - held_in[..., -1] if len(grid.num_experts) > 1 else _nothing(grid)


def _drop_trend(grid: Grid) -> np.ndarray:
    return mean(rank_correlation(_drops(grid), _SIZE))


def _method_spreads(grid: Grid) -> np.ndarray:
    """Largest less smallest score over methods, held-in and held-out, [R, S, B, N, 2]; NaN where a method is missing."""
    if len(grid.methods) < 2:
        return _nothing(grid)
    both = [
        over_cells(grid, values, ["seed"], alike=["size", "method"])
        for values in (grid.held_in, grid.held_out)
    ]
    return np.stack([np.max(v, axis=_METHOD) - np.min(v, axis=_METHOD) for v in both], axis=-1)


def _share_below_experts(grid: Grid) -> np.ndarray:
    held_in = over_cells(grid, grid.held_in, ["seed"])
    return share(held_in, held_in < 1)


def _multitask_gap(grid: Grid) -> np.ndarray:
    return over_cells(grid, grid.held_in - grid.multitask_held_in, ["seed"])


def _averaging_gap(grid: Grid, values: np.ndarray) -> np.ndarray:
    """Averaging less the best method, at the largest size of the instruction-tuned base, averaged over N."""
    averaging = [i for i, each in enumerate(grid.methods) if each.startswith("Averaging")]
    if not averaging or len(grid.methods) < 2 or len(grid.sizes) < 2:
        return mean(_nothing(grid))
    scores = over_cells(grid, values, ["seed"], alike=["method"])
    largest = _of_base(grid, scores, INSTRUCTION_TUNED)[:, -1:]
    return mean(np.take(largest, averaging[0], _METHOD) - np.max(largest, axis=_METHOD))


# ---- arithmetic ---------------------------------------------------------------------------------------------------

_SIZE, _BASE, _METHOD = (1 + AXES.index(name) for name in ("size", "base", "method"))


def _nothing(grid: Grid) -> np.ndarray:
    return np.full((len(grid.seeds), 1), np.nan)


def _of_base(grid: Grid, values: np.ndarray, role: str | None) -> np.ndarray:
    """[R, S, 1, ...] of [R, S, B, ...], or all bases."""
    if role is None:
        return values
    index = grid.base(role)
    if index is None:
        return np.full_like(values, np.nan)
    return np.take(values, [index], axis=_BASE)


def share(values: np.ndarray, is_so: np.ndarray) -> np.ndarray:
    """[R]: of the values [R, ...] that are numbers, the share for which it is so."""
    return mean(np.where(np.isfinite(values), is_so, np.nan))


def slope(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Least squares along the last axis, of what are numbers; NaN of fewer than two."""
    x, y = _centred(np.broadcast_to(x, values.shape), values)
    below = (x * x).sum(-1)
    return np.divide((x * y).sum(-1), below, out=np.full_like(below, np.nan), where=below > 0)


def ranks(values: np.ndarray) -> np.ndarray:
    """Along the last axis, from 0, equal ones sharing the mean of their ranks; NaN stays NaN and takes no rank."""
    one, other = values[..., :, None], values[..., None, :]
    # Sums of nearly equal ratios differ in their last bits: such scores are equal.
    is_equal = np.abs(one - other) < 1e-12
    rank = ((one > other) & ~is_equal).sum(axis=-1) + 0.5 * (is_equal.sum(axis=-1) - 1)
    return np.where(np.isfinite(values), rank, np.nan)


def rank_correlation(values: np.ndarray, axis: int) -> np.ndarray:
    """Spearman's, of an ordered axis and the values along it; 0 where all are equal, NaN of fewer than two numbers."""
    values = np.moveaxis(values, axis, -1)
    present = np.isfinite(values)
    order = ranks(np.where(present, np.arange(values.shape[-1], dtype=float), np.nan))
    x, y = _centred(order, ranks(values))
    below = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    found = np.divide((x * y).sum(-1), below, out=np.zeros_like(below), where=below > 0)
    return np.where(present.sum(axis=-1) > 1, found, np.nan)


def _centred(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x and y less their means along the last axis, of where y is a number; 0 elsewhere."""
    present = np.isfinite(y)
    number = np.maximum(present.sum(axis=-1, keepdims=True), 1)
    x, y = (np.where(present, each, 0.0) for each in (x, y))
    return tuple(
        np.where(present, each - each.sum(axis=-1, keepdims=True) / number, 0.0) for each in (x, y)
    )


def _from_smallest_to_largest(values: np.ndarray) -> np.ndarray:
    """[R]: the mean change from the smallest size to the largest, of values [R, S, ...]."""
    return mean(values[:, -1:] - values[:, :1] if values.shape[1] > 1 else values * np.nan)


# ---- the claims ---------------------------------------------------------------------------------------------------

_TWO_SIZES = "at least two sizes"
_IT = "instruction-tuned"

CLAIMS: Sequence[Claim] = (
    Claim(
        id="F1",
        text="Experts from the instruction-tuned base merge better",
        tests=(
            Test(
                name="share of (size, method, N) with held-in of IT above PT",
                statistic=lambda g: share(_base_gap(g), _base_gap(g) > 0),
                above=HALF,
            ),
            Test(
                name="mean gap of held-in, IT - PT",
                statistic=lambda g: mean(_base_gap(g)),
                above=0.0,
            ),
        ),
        needs="both bases",
    ),
    Claim(
        id="F2",
        text="Larger models merge better",
        tests=(
            Test(
                name="rank correlation of size and held-in, per (base, method, N)",
                statistic=lambda g: _size_trend(g, g.held_in),
                above=0.0,
            ),
        ),
        needs=_TWO_SIZES,
    ),
    Claim(
        id="F3a",
        text="Merging improves generalisation over the base",
        tests=(
            Test(
                name="share of cells with held-out of at least 1",
                statistic=_share_over_base,
                above=HALF,
            ),
            Test(
                name="mean held-out",
                statistic=lambda g: mean(over_cells(g, g.held_out, ["seed"])),
            ),
        ),
        needs="cells with all held-out datasets",
    ),
    Claim(
        id="F3b",
        text="Many large strong experts reach the multitask model on held-out tasks",
        tests=(
            Test(
                name=f"held-out, merged - multitask; IT, the two largest sizes, N >= {MANY_EXPERTS}",
                statistic=_to_multitask_at_scale,
                above=-MARGIN,
            ),
        ),
        needs=f"an {_IT} base, {_TWO_SIZES}, merges of {MANY_EXPERTS} or more experts, and the multitask models",
    ),
    Claim(
        id="F3c",
        text="Larger merged models generalise better",
        tests=(
            Test(
                name="rank correlation of size and held-out, per (base, method, N)",
                statistic=lambda g: _size_trend(g, g.held_out),
                above=0.0,
            ),
        ),
        needs=_TWO_SIZES,
    ),
    Claim(
        id="F4a",
        text="Larger models take more experts",
        tests=(
            Test(
                name="rank correlation of size and the drop of held-in from fewest to most experts",
                statistic=_drop_trend,
                below=0.0,
            ),
            Test(
                name="drop at the largest size - at the smallest",
                statistic=lambda g: _from_smallest_to_largest(_drops(g)),
            ),
        ),
        needs=f"{_TWO_SIZES} and two numbers of experts",
    ),
    Claim(
        id="F4b",
        text="More experts lower held-in scores",
        tests=(
            Test(
                name="slope of held-in, per expert",
                statistic=lambda g: _slopes(g, g.held_in),
                below=0.0,
            ),
        ),
        needs="two numbers of experts",
    ),
    Claim(
        id="F4c",
        text="More experts raise held-out scores for the instruction-tuned base",
        tests=(
            Test(
                name="slope of held-out, per expert, IT",
                statistic=lambda g: _slopes(g, g.held_out, INSTRUCTION_TUNED),
                above=0.0,
            ),
        ),
        needs=f"an {_IT} base and two numbers of experts",
    ),
    Claim(
        id="F5",
        text="Methods become alike at scale",
        tests=(
            Test(
                name="rank correlation of size and max - min over methods, per (base, N), held-in and held-out",
                statistic=lambda g: mean(rank_correlation(_method_spreads(g), _SIZE)),
                below=0.0,
            ),
            Test(
                name="max - min at the largest size - at the smallest",
                statistic=lambda g: _from_smallest_to_largest(_method_spreads(g)),
            ),
        ),
        needs=f"{_TWO_SIZES} and two methods",
        paper=paper.METHODS_ALIKE,
    ),
    Claim(
        id="F6",
        text="Held-in, merged models trail the experts and the multitask model",
        tests=(
            Test(
                name="share of cells with held-in below 1, the experts",
                statistic=_share_below_experts,
                above=HALF,
            ),
            Test(
                name="share of cells with held-in below the multitask model",
                statistic=lambda g: share(_multitask_gap(g), _multitask_gap(g) < 0),
                above=HALF,
            ),
            Test(
                name="mean of held-in, merged - multitask",
                statistic=lambda g: mean(_multitask_gap(g)),
            ),
        ),
        needs="cells with all held-in datasets, and the multitask models",
    ),
    Claim(
        id="F7",
        text="Averaging is enough at scale with a strong base",
        tests=(
            Test(
                name="held-in, Averaging - best method; IT, the largest size",
                statistic=lambda g: _averaging_gap(g, g.held_in),
                above=-MARGIN,
            ),
            Test(
                name="held-out, Averaging - best method; IT, the largest size",
                statistic=lambda g: _averaging_gap(g, g.held_out),
                above=-MARGIN,
            ),
        ),
        needs=f"an {_IT} base, {_TWO_SIZES}, Averaging and another method",
        paper=paper.METHODS_ALIKE,
    ),
    Claim(
        id="F8",
        text="For the pretrained base N hardly matters or hurts, yet merges beat the base on held-out tasks",
        tests=(
            Test(
                name="slope of held-out, per expert, PT",
                statistic=lambda g: _slopes(g, g.held_out, PRETRAINED),
                below=SLOPE_MARGIN,
            ),
            Test(
                name="share of cells with held-out of at least 1, PT",
                statistic=lambda g: _share_over_base(g, PRETRAINED),
                above=HALF,
            ),
        ),
        needs="a pretrained base and two numbers of experts",
    ),
)
