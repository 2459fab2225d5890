"""The scaling law of merging: E[L | size, k] = L* + B size^-beta + A / (k + b), with L the cross-entropy (arXiv 2509.24244).

Fitted on few experts, it forecasts the losses of many. Given beta and b the law is linear in L*, B and A, so a search over those two is
all there is: a lattice, refined about its best point until it is finer than the data. No loss is below 0, so neither are L* and B. With fewer than three sizes the law's
part of size can't be told from a floor of each size, so each size gets a floor of its own; the forecast over k is the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.optimize import nnls

from merging.grid.results import Results
from merging.grid.study_file import HELD_IN, expert

FITTED_ON = (1, 2, 4)

_BETAS = (0.01, 3.0)  # published exponents of size lie between 0.05 and 0.6
_OFFSETS = (0.0, 30.0)  # b; beyond, A / (k + b) is a straight line in k
_POINTS, _ROUNDS = 13, 10  # of the lattice along each of the two; each round is 3 times finer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A loss: nats per token of merges of k experts, averaged over seeds; k = 1 are the experts themselves."""

    size: str
    parameters: int | None
    k: int
    loss: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Law:
    """A fitted law.

    Attributes:
      floors: L* + B size^-beta of each size.
      exponent, limit: beta and L*; None where there are too few sizes to tell.
      gain, offset: A and b.
    """

    floors: Mapping[str, float]
    exponent: float | None
    limit: float | None
    gain: float
    offset: float

    def loss(self, size: str, k: float) -> float:
        """Nats per token."""
        return self.floors[size] + self.gain / (k + self.offset)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecast:
    """A law of one base and method, and how well it does.

    Attributes:
      points: all of them.
      fit_error, forecast_error: mean |law - loss| / loss, of what was fitted on and of the rest; NaN of none.
      persistence_error: of the rest, were nothing to change beyond the largest k that was fitted on.
    """

    base: str
    method: str
    points: tuple[Point, ...]
    law: Law
    fit_error: float
    forecast_error: float
    persistence_error: float


def forecasts(results: Results, setting: str) -> list[Forecast]:
    """A law for each base and method that has losses of all of k = 1, 2 and 4 at some size."""
    found = []
    for base in results.study.bases:
        for method in results.study.methods:
            measured = points(results, base, method, setting)
            sizes = {
                size
                for size in results.study.sizes
                if {p.k for p in measured if p.size == size} >= set(FITTED_ON)
            }
            measured = [p for p in measured if p.size in sizes]
            if measured:
                found.append(forecast(base, method, measured))
    return found


def points(results: Results, base: str, method: str, setting: str) -> list[Point]:
    """The losses that are there, averaged over distinct models."""
    study = results.study
    models: dict[tuple[str, int], set[str]] = {}
    for size in study.sizes:
        held_in = [name for name, role in study.roles.items() if role == HELD_IN]
        experts = [expert(name, study.steps[setting]) for name in held_in]
        models[size, 1] = set(experts)
    for cell in study.cells:
        if (cell.base, cell.method, cell.setting) == (base, method, setting):
            models.setdefault((cell.size, cell.num_experts), set()).add(cell.model)
    found = []
    for (size, k), names in sorted(models.items(), key=lambda item: item[0][1]):
        losses = [results.losses.get((size, base, name)) for name in sorted(names)]
        if all(loss is not None for loss in losses):
            found.append(
                Point(size=size, parameters=study.sizes[size], k=k, loss=float(np.mean(losses)))
            )
    return found


def forecast(base: str, method: str, measured: Sequence[Point]) -> Forecast:
    """Fits on k of 1, 2 and 4, and compares with the rest."""
    fitted = [p for p in measured if p.k in FITTED_ON]
    rest = [p for p in measured if p.k not in FITTED_ON]
    law = fit(fitted)
    last = {p.size: p.loss for p in sorted(fitted, key=lambda p: p.k)}
    return Forecast(
        base=base,
        method=method,
        points=tuple(measured),
        law=law,
        fit_error=_error([(law.loss(p.size, p.k), p.loss) for p in fitted]),
        forecast_error=_error([(law.loss(p.size, p.k), p.loss) for p in rest]),
        persistence_error=_error([(last[p.size], p.loss) for p in rest]),
    )


def fit(measured: Sequence[Point]) -> Law:
    """The law with the least squared error."""
    sizes = list(dict.fromkeys(p.size for p in measured))
    parameters = {p.size: p.parameters for p in measured}
    has_sizes = len(sizes) >= 3 and all(parameters.values())
    k = np.array([p.k for p in measured], float)
    loss = np.array([p.loss for p in measured])
    if has_sizes:
        relative_size = np.array([parameters[p.size] for p in measured], float)
        relative_size /= relative_size.max()  # powers of 1e9 would be badly scaled
    own = np.array([[p.size == size for size in sizes] for p in measured], float)

    def floor_columns(beta: float) -> np.ndarray:
        return np.stack([np.ones_like(k), relative_size**-beta], axis=1) if has_sizes else own

    def solve(beta: float, offset: float) -> tuple[float, np.ndarray]:
        """(squared error, coefficients) of the law, which is linear once these are known."""
        over_k = 1 / (k + offset)[:, None]
        columns = np.concatenate([floor_columns(beta), over_k, -over_k], axis=1)
        (*floor, rising, falling), error = nnls(columns, loss)
        return error**2, np.array([*floor, rising - falling])

    betas = _BETAS if has_sizes else (1.0, 1.0)
    beta, offset = _least(lambda *at: solve(*at)[0], betas, _OFFSETS)
    *floor, gain = solve(beta, offset)[1]
    floors = (floor_columns(beta) @ floor).tolist()
    return Law(
        floors=dict(zip([p.size for p in measured], floors, strict=True)),
        exponent=beta if has_sizes else None,
        limit=float(floor[0]) if has_sizes else None,
        gain=float(gain),
        offset=offset,
    )


def _least(
    error: Callable[[float, float], float],
    betas: tuple[float, float],
    offsets: tuple[float, float],
) -> tuple[float, float]:
    """The (beta, b) of least error: a lattice, then finer ones about its best point."""
    # In logarithms, and for b of 1 + b: both matter by ratios.
    low = np.array([math.log(betas[0]), math.log1p(offsets[0])])
    high = np.array([math.log(betas[1]), math.log1p(offsets[1])])
    bounds = low, high
    best = low
    for _ in range(_ROUNDS):
        axes = [np.unique(np.linspace(a, b, _POINTS)) for a, b in zip(low, high, strict=True)]
        lattice = [np.array([x, y]) for x in axes[0] for y in axes[1]]
        errors = [error(math.exp(x), math.expm1(y)) for x, y in lattice]
        best = lattice[int(np.argmin(errors))]
        reach = 2 * (high - low) / (_POINTS - 1)
        low, high = np.maximum(best - reach, bounds[0]), np.minimum(best + reach, bounds[1])
    return math.exp(best[0]), math.expm1(best[1])


def _error(pairs: Sequence[tuple[float, float]]) -> float:
    return float(np.mean([abs(a - b) / b for a, b in pairs])) if pairs else math.nan
