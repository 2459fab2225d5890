"""The merge methods in float64: what `merging` must be near, and the bound that says how near.

The same definitions as in `float32.py`, with every number as the user wrote it (lambda is 0.4, not the float32 next to it).
Only which entries are kept by the trim, and which sign is elected, is decided on the float32 task vectors, as the
methods say: decided otherwise, an entry at the cut would differ by all of its size, and no bound could hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from tests.oracle import float32
from tests.oracle.float32 import Masks, Model


@dataclasses.dataclass(kw_only=True)
class Explained:
    """A merge and what its error is measured by.

    Attributes:
      merged: float64.
      direction: float64, what lambda multiplies; empty for Averaging.
      magnitude: |theta_0| + |lambda| sum |w_i tau_i|, over the tau_i that enter the sum, after any rescale; where a method
        divides by its weights, w_i is the quotient. Of a sum of experts themselves, sum |w_i theta_i|.
    """

    merged: Model
    direction: Model
    magnitude: Model


def merge(base: Model, experts: Sequence[Model], method: Any, masks: Masks) -> Model:
    """The merged model in float64; arguments as `float32.merge`."""
    return explain(base, experts, method, masks).merged


def explain(base: Model, experts: Sequence[Model], method: Any, masks: Masks) -> Explained:
    """As `merge`, with what the bound needs."""
    decided = float32.explain(base, experts, method, masks)
    fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    weights = fields.get("weights")
    merged, directions, magnitude = {}, {}, {}
    for name, leaf in base.items():
        if leaf.dtype.kind in "biu":
            merged[name] = leaf
            continue
        theta = leaf.astype(np.float64)
        thetas = [expert[name].astype(np.float64) for expert in experts]
        numbers = [1.0] * len(experts) if weights is None else list(weights)
        taus = [expert - theta for expert in thetas]
        if type(method).__name__ == "Averaging":
            merged[name] = sum(w * t for w, t in zip(numbers, thetas, strict=True))
            if fields["combine"] == "sum":
                magnitude[name] = sum(abs(w * t) for w, t in zip(numbers, thetas, strict=True))
                continue
            merged[name] = merged[name] / sum(numbers)
            size = sum(
                abs(w / sum(numbers)) * abs(tau) for w, tau in zip(numbers, taus, strict=True)
            )
            magnitude[name] = abs(theta) + size
            continue

        if "rescale" in fields:
            kept = [np.where(masks(i, name), tau, 0.0) for i, tau in enumerate(taus)]
            if fields["rescale"] == "l1":
                taus = [float32.l1_ratio(tau, k) * k for tau, k in zip(taus, kept, strict=True)]
            elif fields["rescale"] == "none":
                taus = kept
            else:
                taus = [k / fields["density"] for k in kept]
        if decided.kept:
            taus = [
                np.where(keep[name], tau, 0.0) for keep, tau in zip(decided.kept, taus, strict=True)
            ]
        shares = [np.full(theta.shape, w) for w in numbers]
        if decided.sign:
            sign = decided.sign[name]
            agree = [(np.sign(tau) == sign) & (sign != 0) for tau in taus]
            shares = [w * a for w, a in zip(numbers, agree, strict=True)]
        if fields["combine"] == "mean":
            divisor = sum(shares)
            divisor = np.where(divisor == 0, 1.0, divisor)
            shares = [share / divisor for share in shares]
        directions[name] = sum(share * tau for share, tau in zip(shares, taus, strict=True))
        merged[name] = theta + fields["scale"] * directions[name]
        size = sum(abs(share * tau) for share, tau in zip(shares, taus, strict=True))
        magnitude[name] = abs(theta) + abs(fields["scale"]) * size
    return Explained(merged=merged, direction=directions, magnitude=magnitude)


def bound(magnitude: np.ndarray, merged: np.ndarray, *, experts: int, dtype: Any) -> np.ndarray:
    """The largest error allowed: (N + 3) 2^-24 magnitude, plus half a unit in the last place of the stored type."""
    return (experts + 3) * 2.0**-24 * magnitude + unit(merged, dtype) / 2


def rounded(x: np.ndarray, dtype: Any) -> np.ndarray:
    """float64 `x` rounded once, to nearest even, to a stored type (casts to bfloat16 round twice, by float32)."""
    step = unit(x, dtype)
    return (np.rint(x / step) * step).astype(dtype)


def unit(x: np.ndarray, dtype: Any) -> np.ndarray:
    """Distance of two neighbours of `dtype` around x, float64: a power of two."""
    information = ml_dtypes.finfo(dtype)
    _, exponent = np.frexp(x)  # |x| in [1/2, 1) 2^exponent
    exponent = np.where(x == 0, information.minexp, exponent - 1)
    return np.ldexp(1.0, np.maximum(exponent, information.minexp) - information.nmant)
