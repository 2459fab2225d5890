"""Relative scores: raw over the raw score of the category's expert (held-in) or of the base (held-out).

The mean of a cell is a mean of ratios, not a ratio of means: over the datasets of a category, then over categories. Held-in counts
the categories whose experts are in the merge and no others, and the multitask model beside it is averaged over the same. A
dataset whose reference is 0 has no ratio: it does not count for that size and base, and `Relative.without_ratio` names it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from merging.grid.bootstrap import Draws
from merging.grid.results import Dataset, Results
from merging.grid.study_file import BASE, HELD_IN, HELD_OUT, MULTITASK, expert

# Axes of a grid's arrays, behind the one over draws.
AXES = ("size", "base", "method", "num_experts", "seed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relative:
    """The ratios of one setting of a study.

    S, B, M, N, K are the sizes, bases, methods, numbers of experts and seeds; D the datasets.

    Attributes:
      rows: [S, B, M, N, K] rows of the cells' models in the results, -1 where the study has no such cell.
      is_there: [S, B, M, N, K], whether all datasets that count have a score.
      ratios: [S, B, M, N, K, D], NaN where the score or its reference is missing.
      multitask: [S, B, D], NaN where there is none.
      counts: [S, B, M, N, K, D] bool: held-out, or of a category whose expert is in the merge; with a reference other than 0.
      reference: [S, B, D], the raw scores below the line: the expert's or the base's.
    """

    results: Results
    rows: np.ndarray
    is_there: np.ndarray
    ratios: np.ndarray
    multitask: np.ndarray
    counts: np.ndarray
    reference: np.ndarray

    @property
    def without_ratio(self) -> list[tuple[str, str, str]]:
        """(size, base, dataset) whose reference is 0."""
        study = self.results.study
        names = list(study.sizes), list(study.bases), [each.name for each in study.datasets]
        return [
            tuple(axis[i] for axis, i in zip(names, where, strict=True))
            for where in np.argwhere(self.reference == 0)
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """Scores of cells, averaged over datasets, for the observed study and every draw of its datasets (R in all).

    Attributes:
      sizes, bases, methods, num_experts: the axes; of bases the roles, of methods the settings as text.
      held_in, held_out: [R, S, B, M, N, K] of the merged models, NaN where a cell is missing.
      multitask_held_in, multitask_held_out: the same of the multitask model, over the categories of each cell.
      seeds: [R, K] weights.
    """

    sizes: Sequence[str]
    bases: Sequence[str]
    methods: Sequence[str]
    num_experts: Sequence[int]
    held_in: np.ndarray
    held_out: np.ndarray
    multitask_held_in: np.ndarray
    multitask_held_out: np.ndarray
    seeds: np.ndarray

    def base(self, role: str) -> int | None:
        """The index of the base of a role."""
        return list(self.bases).index(role) if role in self.bases else None


def relative(results: Results, setting: str) -> Relative:
    """The ratios of all cells of a setting."""
    study = results.study
    sizes, bases = list(study.sizes), list(study.bases)
    methods, categories = list(study.methods), list(study.roles)
    shape = (len(sizes), len(bases), len(methods), len(study.num_experts), len(study.seeds))
    rows = np.full(shape, -1)
    merged = np.zeros((*shape, len(categories)), bool)
    for cell in study.cells:
        if cell.setting == setting:
            at = (
                sizes.index(cell.size),
                bases.index(cell.base),
                methods.index(cell.method),
                study.num_experts.index(cell.num_experts),
                study.seeds.index(cell.seed),
            )
            rows[at] = results.rows[cell.size, cell.base, cell.model]
            merged[at] = [name in cell.categories for name in categories]
    steps = study.steps[setting]
    reference = np.stack([[_reference(results, s, b, steps) for b in bases] for s in sizes])
    multitask = np.full_like(reference, np.nan)
    if study.has_multitask:
        of_each = [[results.raw[results.rows[s, b, MULTITASK]] for b in bases] for s in sizes]
        multitask = np.stack(of_each)
    raw = np.where(rows[..., None] >= 0, results.raw[rows], np.nan)
    # A category has an expert in the merge, or is held out.
    is_held_out = np.array([study.roles[name] == HELD_OUT for name in categories])
    of_dataset = [categories.index(each.category) for each in study.datasets]
    counts = (merged | is_held_out)[..., of_dataset]
    is_there = (rows >= 0) & (np.isfinite(raw) | ~counts).all(axis=-1)
    below = reference[:, :, None, None, None, :]
    return Relative(
        results=results,
        rows=rows,
        is_there=is_there,
        ratios=np.where(is_there[..., None], _over(raw, below), np.nan),
        multitask=_over(multitask, reference),
        counts=counts & (below != 0),
        reference=reference,
    )


def grid(found: Relative, draws: Draws) -> Grid:
    """Means over datasets and categories, for every draw."""
    study = found.results.study
    multitask = np.broadcast_to(found.multitask[:, :, None, None, None, :], found.ratios.shape)

    def mean(ratios: np.ndarray, role: str) -> np.ndarray:
        return category_means(ratios, found.counts, draws.datasets, study.datasets, role)

    return Grid(
        sizes=list(study.sizes),
        bases=list(study.bases.values()),
        methods=list(study.methods.values()),
        num_experts=study.num_experts,
        held_in=mean(found.ratios, HELD_IN),
        held_out=mean(found.ratios, HELD_OUT),
        multitask_held_in=mean(multitask, HELD_IN),
        multitask_held_out=mean(multitask, HELD_OUT),
        seeds=draws.seeds,
    )


def category_means(
    values: np.ndarray,
    counts: np.ndarray,
    weights: np.ndarray,
    datasets: Sequence[Dataset],
    role: str,
) -> np.ndarray:
    """Means over the datasets of a category, then over the categories of a role.

    Args:
      values: [*cells, D].
      counts: [*cells, D] bool.
      weights: [R, D], how often each dataset was drawn; a category with none drawn does not count.

    Returns:
      [R, *cells]; NaN where a value that counts is NaN, and where nothing counts.
    """
    cells = values.shape[:-1]
    values, counts = (each.reshape(-1, values.shape[-1]) for each in (values, counts))
    total = np.zeros((len(weights), len(values)))
    number = np.zeros_like(total)
    is_missing = np.zeros(len(values), bool)
    for category in dict.fromkeys(each.category for each in datasets if each.role == role):
        of = [i for i, each in enumerate(datasets) if each.category == category]
        counted, inside = counts[:, of], values[:, of]
        is_missing |= (counted & ~np.isfinite(inside)).any(axis=1)
        drawn = weights[:, of] @ counted.T  # [R, cells]
        summed = weights[:, of] @ np.where(counted & np.isfinite(inside), inside, 0).T
        total += np.divide(summed, drawn, out=np.zeros_like(summed), where=drawn > 0)
        number += drawn > 0
    means = np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0)
    means[:, is_missing] = np.nan
    return means.reshape(len(weights), *cells)


def _reference(results: Results, size: str, base: str, steps: int | None) -> list[float]:
    """[D]: the raw score that a dataset's ratio has below the line; `steps`: of experts, where they have fewer."""

    def model(category: str, role: str) -> str:
        return expert(category, steps) if role == HELD_IN else BASE

    return [
        results.raw[results.rows[size, base, model(each.category, each.role)], column]
        for column, each in enumerate(results.study.datasets)
    ]


def _over(raw: np.ndarray, below: np.ndarray) -> np.ndarray:
    below = np.broadcast_to(below, raw.shape)
    return np.divide(raw, below, out=np.full(raw.shape, np.nan), where=below != 0)


# ---- means over cells ---------------------------------------------------------------------------------------------


def over_cells(
    grid: Grid, values: np.ndarray, over: Sequence[str], *, alike: Sequence[str] = ()
) -> np.ndarray:
    """The mean over some axes of values [R, S, B, M, N, K], seeds first and by their weights.

    Args:
      over: names of axes.
      alike: names of axes along which means will be compared: what one member of such an axis lacks counts for none of those that
        have anything, so that a study under way compares like with like.
    """
    means, compared = _numbers(over), _numbers(alike)
    present = np.isfinite(values)
    has_any = present.any(axis=means, keepdims=True)
    values = np.where((present | ~has_any).all(axis=compared, keepdims=True), values, np.nan)
    seed = 1 + AXES.index("seed")
    if seed in means:
        weights = grid.seeds.reshape(len(grid.seeds), *(1,) * (values.ndim - 2), -1)
        values = _weighted(values, weights, (seed,))
    return np.squeeze(_weighted(values, 1.0, tuple(a for a in means if a != seed)), axis=means)


def mean(values: np.ndarray) -> np.ndarray:
    """[R] of values [R, ...]: the mean of those that are numbers."""
    return _weighted(values.reshape(len(values), -1), 1.0, (1,))[:, 0]


def _weighted(values: np.ndarray, weights: np.ndarray | float, axes: tuple[int, ...]) -> np.ndarray:
    weights = np.where(np.isfinite(values), weights, 0.0)
    total = (np.nan_to_num(values) * weights).sum(axis=axes, keepdims=True)
    number = weights.sum(axis=axes, keepdims=True)
    return np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0)


def _numbers(axes: Sequence[str]) -> tuple[int, ...]:
    return tuple(1 + AXES.index(name) for name in axes)
