"""DARE (arXiv 2311.03099): drop entries of the task vectors at random, rescale the rest, then task arithmetic.

Deviations: the paper divides each kept entry by 1 - p; here the sum of the kept entries is divided once, which is the
same number with one rounding less for each expert. mergekit rescales each tensor to the L1 norm it had before the drop
(`rescale="l1"`); a tensor of which nothing was kept stays zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from merging.kernels.arithmetic import Number, divide, unfused
from merging.kernels.election import ordered_sum, weighted
from merging.methods.method import (
    Draw,
    Rescale,
    Survey,
    TaskVectorMethod,
    Weights,
    check_choice,
    check_fraction,
    check_scale,
    check_weights,
    task_vectors,
)


class Dare(TaskVectorMethod):
    """theta = theta_0 + scale * sum w_i drop(tau_i) / density.

    Attributes:
      density: probability of keeping an entry, the paper's 1 - p.
      scale: the lambda of task arithmetic.
      weights: one number per expert; None is 1 for each.
      rescale: "inverse_keep" divides by `density` (the paper); "l1" restores each tensor's L1 norm (mergekit).
    """

    density: Number = 0.5
    scale: Number = 0.4
    weights: Weights = None
    rescale: Rescale = "inverse_keep"

    def __post_init__(self) -> None:
        check_fraction("Dare", "density", self.density)
        check_scale("Dare", self.scale)
        check_weights("Dare", self.weights, positive=False)
        check_choice("Dare", "rescale", self.rescale, ("inverse_keep", "l1"))

    @property
    def draws_masks(self) -> bool:
        return True

    @property
    def asks_l1(self) -> bool:
        return self.rescale == "l1"

    def vectors(
        self,
        base: Float[Array, "*shape"],
        experts: Sequence[Float[Array, "*shape"]],
        *,
        survey: Survey,
        draw: Draw,
    ) -> list[Float[Array, "*shape"]]:
        return restore_l1(drop(base, experts, self.density, draw), survey)

    def direction(
        self,
        base: Float[Array, "*shape"],
        experts: Sequence[Float[Array, "*shape"]],
        *,
        survey: Survey,
        draw: Draw,
    ) -> Float[Array, "*shape"]:
        vectors = self.vectors(base, experts, survey=survey, draw=draw)
        return undo_drop(ordered_sum(weighted(vectors, self.weights)), self.density, self.rescale)


def drop(
    base: Float[Array, "*shape"],
    experts: Sequence[Float[Array, "*shape"]],
    density: Number,
    draw: Draw,
) -> list[Float[Array, "*shape"]]:
    """The task vectors with entries zeroed at random, not yet rescaled; float32."""
    keep = jnp.asarray(density, jnp.float32)
    return [
        jnp.where(draw(i, keep), vector, jnp.float32(0))
        for i, vector in enumerate(task_vectors(base, experts))
    ]


def restore_l1(
    dropped: list[Float[Array, "*shape"]], survey: Survey
) -> list[Float[Array, "*shape"]]:
    """Each dropped vector times its L1 ratio, where the survey has one; unchanged otherwise."""
    if not survey.l1:
        return dropped
    return [unfused(ratio * v) for v, ratio in zip(dropped, survey.l1, strict=True)]


def undo_drop(
    combined: Float[Array, "*shape"], density: Number, rescale: Rescale
) -> Float[Array, "*shape"]:
    """Divides what the kept entries gave by the share kept, unless L1 norms were restored before."""
    return divide(combined, density) if rescale == "inverse_keep" else combined
