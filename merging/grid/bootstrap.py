"""Intervals by drawing seeds and datasets again, with replacement.

Seeds are drawn once for all cells, and so are the datasets of each role: gaps between cells stay paired. The first row of the
weights is what was observed, each once; the others are draws. Models are not drawn: what other training runs would have given
is not in these intervals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

DRAWS = 2_000
LEVEL = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draws:
    """How often each dataset and each seed was drawn; row 0 is the observed study.

    Attributes:
      datasets: [1 + draws, datasets].
      seeds: [1 + draws, seeds].
    """

    datasets: np.ndarray
    seeds: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and its interval; NaN where it could not be found.

    Attributes:
      value: observed.
      low, high: what 95 % of the draws lie between.
    """

    value: float
    low: float
    high: float


def draw(roles: Sequence[str], seeds: int, *, draws: int = DRAWS, seed: int = 0) -> Draws:
    """Weights of datasets, of the given roles each, and of seeds."""
    rng = np.random.default_rng(seed)
    roles = np.asarray(roles)
    datasets = np.ones((1 + draws, len(roles)))
    for role in dict.fromkeys(roles.tolist()):
        datasets[1:, roles == role] = _drawn(rng, int((roles == role).sum()), draws)
    weights = np.ones((1 + draws, seeds))
    weights[1:] = _drawn(rng, seeds, draws)
    return Draws(datasets=datasets, seeds=weights)


def _drawn(rng: np.random.Generator, n: int, draws: int) -> np.ndarray:
    return rng.multinomial(n, np.full(n, 1 / n), size=draws)


def intervals(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """value, low and high [...] of values [1 + draws, ...].

    Draws without a value (NaN) don't count; fewer than half with one give no interval. Draws of a maximum or of ranks lie to one side of
    what was observed, since repeating data adds noise: an interval is widened to hold the observed value.
    """
    rest = values.reshape(len(values), -1)
    low, high = np.full((2, rest.shape[1]), np.nan)
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    for i, column in enumerate(rest.T):
        finite = column[1:][np.isfinite(column[1:])]
        if np.isfinite(column[0]) and 2 * len(finite) >= max(len(column) - 1, 1):
            below, above = np.quantile(finite, tails)
            low[i], high[i] = min(below, column[0]), max(above, column[0])
    shape = values.shape[1:]
    return values[0], low.reshape(shape), high.reshape(shape)


def estimate(values: np.ndarray) -> Estimate:
    """Of values [1 + draws]."""
    value, low, high = intervals(values)
    return Estimate(value=float(value), low=float(low), high=float(high))
