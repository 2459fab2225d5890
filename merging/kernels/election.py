"""Weighted sums, and TIES' sign election and disjoint mean (arXiv 2306.01708, section 3), elementwise, in a stated order.

Deviations, each a choice of the method's `zero_sign`: what an elected sum of exactly zero becomes. Sums run over the
experts in their order, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from merging.kernels.arithmetic import Number, divide, unfused


def weighted(
    vectors: Sequence[Float[Array, "*shape"]], weights: Sequence[Number] | None
) -> list[Float[Array, "*shape"]]:
    """Each vector times its expert's weight, each product rounded on its own; as they are where weights is None."""
    if weights is None:
        return list(vectors)
    return [
        unfused(jnp.asarray(weight, jnp.float32) * vector)
        for weight, vector in zip(weights, vectors, strict=True)
    ]


def ordered_sum(terms: Sequence[Float[Array, "*shape"]]) -> Float[Array, "*shape"]:
    """((t_0 + t_1) + t_2) + ..., float32."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def elect(
    vectors: Sequence[Float[Array, "*shape"]],
    *,
    weights: Sequence[Number] | None,
) -> Float[Array, "*shape"]:
    """The vote: the weighted sum of the trimmed task vectors, whose sign is the elected sign."""
    return ordered_sum(weighted(vectors, weights))


def weighted_sum(
    vectors: Sequence[Float[Array, "*shape"]],
    *,
    weights: Sequence[Number] | None,
    is_mean: bool,
) -> Float[Array, "*shape"]:
    """The weighted sum, for a mean over the sum of the weights (their number where weights is None), float32."""
    total = ordered_sum(weighted(vectors, weights))
    if not is_mean:
        return total
    if weights is None:
        return divide(total, len(vectors))
    return divide(total, ordered_sum([jnp.asarray(w, jnp.float32) for w in weights]))


def disjoint_sum(
    vectors: Sequence[Float[Array, "*shape"]],
    vote: Float[Array, "*shape"],
    *,
    weights: Sequence[Number] | None,
    zero_sign: Float[Array, ""],
    is_mean: bool,
) -> Float[Array, "*shape"]:
    """Sum of the entries that agree with the elected sign, or their mean; 0 where none does.

    Args:
      vectors: N trimmed task vectors, float32.
      vote: `elect`'s sum, float32.
      weights: one number per expert, not negative; the mean divides by the sum of the agreeing weights (their number
        where weights is None).
      zero_sign: +1, -1 or 0: the sign that a vote of zero elects; 0 elects none.
      is_mean: whether it is divided.
    """
    vote = jnp.where(vote == 0, zero_sign, vote)
    positive = vote > 0
    negative = vote < 0
    zero = jnp.float32(0)
    total = divisor = None
    for i, vector in enumerate(vectors):
        agrees = (positive & (vector > 0)) | (negative & (vector < 0))
        weight = jnp.float32(1) if weights is None else jnp.asarray(weights[i], jnp.float32)
        term = vector if weights is None else unfused(weight * vector)
        term, share = jnp.where(agrees, term, zero), jnp.where(agrees, weight, zero)
        total = term if total is None else total + term
        divisor = share if divisor is None else divisor + share
    return total / jnp.where(divisor == 0, jnp.float32(1), divisor) if is_mean else total
