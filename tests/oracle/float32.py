"""The merge methods as their papers write them, in plain numpy float32: what `merging` must equal bit for bit.

Written from the papers and nothing else: Averaging (arXiv 2203.05482), Task Arithmetic (2212.04089), TIES (2306.01708) and
DARE (2311.03099). A model is a dict of arrays, and whole-model facts are found by sorting and counting the whole model.
Every operation is one numpy operation on float32, rounded on its own; sums run over the experts in their order.

    theta_0 base, theta_i expert, tau_i = theta_i - theta_0, w_i weight, lambda scale
    Averaging        (((w_0 theta_0 + w_1 theta_1) + ...) / ((w_0 + w_1) + ...)
    Task Arithmetic  theta_0 + lambda * ((w_0 tau_0 + w_1 tau_1) + ...)
    TIES             theta_0 + lambda * (sum of the agreeing w_i tau_i) / (sum of the agreeing w_i)
    combine          "mean" divides a sum so, "sum" does not, whatever the method
    DARE             drop, then Task Arithmetic with the sum divided by the share kept
    DARE-TIES        drop, then TIES with the mean divided by the share kept

Where weights are None, nothing is multiplied. The rescale to L1 norms multiplies each dropped tau_i at once, by the
quotient of exact sums, and nothing is divided later. A tied leaf is to be given once. Float leaves are merged and count;
all others are the base's. Left out: the flush of subnormal numbers on XLA:CPU, and NaN.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Model = dict[str, np.ndarray]
Masks = Callable[[int, str], np.ndarray]  # (position of the expert, leaf) -> True where kept

F = np.float32


@dataclasses.dataclass(kw_only=True)
class Explained:
    """A merge and what it decided; empty where the method decides nothing of the kind.

    Attributes:
      merged: float32, not yet rounded to a stored type.
      direction: float32, what lambda multiplies; empty for Averaging.
      thresholds: per expert and leaf: the smallest magnitude that the trim keeps, +inf where it keeps nothing.
      kept: per expert and leaf: what the trim keeps.
      majority: sign of the sum of all elected signs, zero counted as -1.
      sign: per leaf: the elected sign, +1, -1 or 0.
      l1: per expert and leaf: L1 norm before the drop over that after it.
    """

    merged: Model
    direction: Model = dataclasses.field(default_factory=dict)
    thresholds: list[dict[str, np.float32]] = dataclasses.field(default_factory=list)
    kept: list[Model] = dataclasses.field(default_factory=list)
    majority: int | None = None
    sign: Model = dataclasses.field(default_factory=dict)
    l1: list[dict[str, np.float32]] = dataclasses.field(default_factory=list)


def merge(base: Model, experts: Sequence[Model], method: Any, masks: Masks) -> Model:
    """The merged model, float32 (leaves that are no floats as they are).

    Args:
      base, experts: leaves by name, the same names in each.
      method: an instance of a merge method; its class's name and its fields are all that is used.
      masks: DARE's masks.
    """
    return explain(base, experts, method, masks).merged


def explain(base: Model, experts: Sequence[Model], method: Any, masks: Masks) -> Explained:
    """As `merge`, with what was decided on the way."""
    floats = [name for name, leaf in base.items() if leaf.dtype.kind not in "biu"]
    explained = TRANSCRIPTIONS[type(method).__name__](
        {name: base[name].astype(F) for name in floats},
        [{name: expert[name].astype(F) for name in floats} for expert in experts],
        masks,
        **{field.name: getattr(method, field.name) for field in dataclasses.fields(method)},
    )
    explained.merged = {  # in the base's order
        name: np.asarray(explained.merged.get(name, leaf)) for name, leaf in base.items()
    }
    return explained


# ---- the methods -------------------------------------------------------------------------------------------------


def averaging(
    base: Model,
    experts: list[Model],
    masks: Masks,
    *,
    weights: Sequence[float] | None,
    combine: str,
) -> Explained:
    return Explained(merged=weighted_sum(experts, weights, combine))


def task_arithmetic(
    base: Model,
    experts: list[Model],
    masks: Masks,
    *,
    scale: float,
    weights: Sequence[float] | None,
    combine: str,
) -> Explained:
    direction = weighted_sum(task_vectors(base, experts), weights, combine)
    return Explained(merged=add(base, scale, direction), direction=direction)


def ties(
    base: Model,
    experts: list[Model],
    masks: Masks,
    *,
    density: float | Sequence[float],
    scale: float,
    weights: Sequence[float] | None,
    scope: str,
    zero_sign: str,
    combine: str,
) -> Explained:
    vectors = task_vectors(base, experts)
    densities = density if isinstance(density, Sequence) else [density] * len(vectors)
    thresholds = [
        trim_thresholds(vector, each, scope)
        for vector, each in zip(vectors, densities, strict=True)
    ]
    trimmed, kept = trim(vectors, thresholds)
    sign, majority = elect(trimmed, weights, zero_sign)
    direction = disjoint_sum(trimmed, sign, weights, combine)
    return Explained(
        merged=add(base, scale, direction),
        direction=direction,
        thresholds=thresholds,
        kept=kept,
        majority=majority,
        sign=sign,
    )


def dare(
    base: Model,
    experts: list[Model],
    masks: Masks,
    *,
    density: float | Sequence[float],
    scale: float,
    weights: Sequence[float] | None,
    rescale: str,
    combine: str,
) -> Explained:
    vectors, l1 = drop(task_vectors(base, experts), masks, rescale)
    direction = weighted_sum(vectors, weights, combine)
    if rescale == "inverse_keep":
        direction = {name: total / F(density) for name, total in direction.items()}
    return Explained(merged=add(base, scale, direction), direction=direction, l1=l1)


def dare_ties(
    base: Model,
    experts: list[Model],
    masks: Masks,
    *,
    density: float | Sequence[float],
    scale: float,
    weights: Sequence[float] | None,
    trim_density: float | None,
    rescale: str,
    zero_sign: str,
    combine: str,
) -> Explained:
    vectors, l1 = drop(task_vectors(base, experts), masks, rescale)
    thresholds, kept = [], []
    if trim_density is not None:
        thresholds = [trim_thresholds(vector, trim_density, "model") for vector in vectors]
        vectors, kept = trim(vectors, thresholds)
    sign, majority = elect(vectors, weights, zero_sign)
    direction = disjoint_sum(vectors, sign, weights, combine)
    if rescale == "inverse_keep":
        direction = {name: mean / F(density) for name, mean in direction.items()}
    return Explained(
        merged=add(base, scale, direction),
        direction=direction,
        thresholds=thresholds,
        kept=kept,
        majority=majority,
        sign=sign,
        l1=l1,
    )


TRANSCRIPTIONS: dict[str, Callable[..., Explained]] = {
    "Averaging": averaging,
    "TaskArithmetic": task_arithmetic,
    "Ties": ties,
    "Dare": dare,
    "DareTies": dare_ties,
}


# ---- the papers' steps -------------------------------------------------------------------------------------------


def task_vectors(base: Model, experts: list[Model]) -> list[Model]:
    """tau_i = theta_i - theta_0."""
    return [{name: expert[name] - base[name] for name in base} for expert in experts]


def add(base: Model, scale: float, direction: Model) -> Model:
    """theta_0 + lambda * direction."""
    return {name: base[name] + F(scale) * direction[name] for name in base}


def weighted_sum(vectors: list[Model], weights: Sequence[float] | None, combine: str) -> Model:
    """((w_0 v_0 + w_1 v_1) + ...), for "mean" over ((w_0 + w_1) + ...), over N where weights are None."""
    sums = {
        name: ordered_sum(
            [times(w, v[name]) for w, v in zip(per(weights, vectors), vectors, strict=True)]
        )
        for name in vectors[0]
    }
    if combine == "sum":
        return sums
    divisor = F(len(vectors)) if weights is None else ordered_sum([F(w) for w in weights])
    return {name: total / divisor for name, total in sums.items()}


def trim_thresholds(vector: Model, density: float, scope: str) -> dict[str, np.float32]:
    """The int(density * d)-th largest magnitude of the d entries of the model, or of each tensor; +inf where it is the 0th."""
    if scope == "tensor":
        return {name: kth_largest([leaf], density) for name, leaf in vector.items()}
    threshold = kth_largest(list(vector.values()), density)
    return dict.fromkeys(vector, threshold)


def kth_largest(leaves: list[np.ndarray], density: float) -> np.float32:
    ascending = np.sort(np.concatenate([np.abs(leaf).ravel() for leaf in leaves]))
    count = int(density * len(ascending))
    return ascending[len(ascending) - count] if count else F(np.inf)


def trim(
    vectors: list[Model], thresholds: list[dict[str, np.float32]]
) -> tuple[list[Model], list[Model]]:
    """Entries below the threshold become zero; also which are not."""
    kept = [
        {name: np.abs(leaf) >= threshold[name] for name, leaf in vector.items()}
        for vector, threshold in zip(vectors, thresholds, strict=True)
    ]
    return [masked(vector, keep) for vector, keep in zip(vectors, kept, strict=True)], kept


def elect(
    vectors: list[Model], weights: Sequence[float] | None, zero_sign: str
) -> tuple[Model, int]:
    """The sign of the weighted sum of each entry, and the majority of those signs over the model."""
    sign = {name: np.sign(total) for name, total in weighted_sum(vectors, weights, "sum").items()}
    surplus = sum(
        int(np.count_nonzero(s > 0)) - int(np.count_nonzero(s < 0)) for s in sign.values()
    )
    majority = 1 if surplus > 0 else -1
    elected = {"majority": majority, "positive": 1, "none": 0}[zero_sign]
    return {name: np.where(s == 0, F(elected), s) for name, s in sign.items()}, majority


def disjoint_sum(
    vectors: list[Model], sign: Model, weights: Sequence[float] | None, combine: str
) -> Model:
    """Sum of the entries of the elected sign, for "mean" over the number (the weights) of them; 0 where there is none."""
    sums = {}
    for name, elected in sign.items():
        terms, shares = [], []
        for w, vector in zip(per(weights, vectors), vectors, strict=True):
            agrees = (np.sign(vector[name]) == elected) & (elected != 0)
            terms.append(np.where(agrees, times(w, vector[name]), F(0)))
            shares.append(np.where(agrees, F(1 if w is None else w), F(0)))
        divisor = ordered_sum(shares)
        sums[name] = ordered_sum(terms)
        if combine == "mean":
            sums[name] = sums[name] / np.where(divisor == 0, F(1), divisor)
    return sums


def drop(
    vectors: list[Model], masks: Masks, rescale: str
) -> tuple[list[Model], list[dict[str, np.float32]]]:
    """Entries whose mask is False become zero; with "l1", each tensor gets back the L1 norm it had."""
    dropped = [
        masked(vector, {name: masks(i, name) for name in vector})
        for i, vector in enumerate(vectors)
    ]
    if rescale != "l1":
        return dropped, []
    ratios = [
        {name: F(l1_ratio(before[name], after[name])) for name in before}
        for before, after in zip(vectors, dropped, strict=True)
    ]
    return [
        {name: ratio[name] * leaf for name, leaf in vector.items()}
        for vector, ratio in zip(dropped, ratios, strict=True)
    ], ratios


def l1_ratio(before: np.ndarray, after: np.ndarray) -> float:
    """L1 norm before over after, each an exact sum rounded once to float64; 1 where nothing was kept."""
    norm = math.fsum(np.abs(after).ravel().tolist())
    return math.fsum(np.abs(before).ravel().tolist()) / norm if norm else 1.0


# ---- arithmetic --------------------------------------------------------------------------------------------------


def per(weights: Sequence[float] | None, experts: Sequence[Model]) -> Sequence[float | None]:
    """One weight, or None, for each expert."""
    return [None] * len(experts) if weights is None else weights


def times(weight: float | None, leaf: np.ndarray) -> np.ndarray:
    return leaf if weight is None else F(weight) * leaf


def ordered_sum(terms: Sequence[np.ndarray]) -> np.ndarray:
    """((t_0 + t_1) + t_2) + ..."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def masked(vector: Model, keep: Model) -> Model:
    return {name: np.where(keep[name], leaf, F(0)) for name, leaf in vector.items()}
