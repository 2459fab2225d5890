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
from merging.kernels.election import weighted_sum
from merging.methods.method import (
    Combine,
    Density,
    Draw,
    Rescale,
    Survey,
    TaskVectorMethod,
    Weights,
    check_choice,
    check_fraction,
    check_scale,
    check_weights,
    each_density,
    task_vectors,
)


class Dare(TaskVectorMethod):
    """theta = theta_0 + scale * sum w_i drop(tau_i) / density.

    Attributes:
      density: probability of keeping an entry, the paper's 1 - p; or one number per expert, with another rescale.
      scale: the lambda of task arithmetic.
      weights: one number per expert; None is 1 for each.
      rescale: "inverse_keep" divides by `density` (the paper); "l1" restores each tensor's L1 norm (mergekit); or "none".
      combine: "sum", or "mean": divided by the sum of the weights.
    """

    density: Density = 0.5
    scale: Number = 0.4
    weights: Weights = None
    rescale: Rescale = "inverse_keep"
    combine: Combine = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("Dare", "density", self.density)
        check_scale("Dare", self.scale)
        check_choice("Dare", "combine", self.combine, ("mean", "sum"))
        check_weights("Dare", self.weights, is_mean=self.combine == "mean")
        check_rescale("Dare", self.rescale, self.density)

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
        total = weighted_sum(vectors, weights=self.weights, is_mean=self.combine == "mean")
        return undo_drop(total, self.density, self.rescale)


def check_rescale(method: str, rescale: Rescale, density: Density) -> None:
    """Raises ValueError for an unknown rescale, and for one that has no one number to divide by."""
    check_choice(method, "rescale", rescale, ("inverse_keep", "l1", "none"))
    if rescale == "inverse_keep" and isinstance(density, Sequence):
        raise ValueError(
            f"{method}.density is {density}, but rescale='inverse_keep' divides what all gave by one density: choose"
            " rescale='l1', or rescale='none' with weights over their densities"
        )


def drop(
    base: Float[Array, "*shape"],
    experts: Sequence[Float[Array, "*shape"]],
    density: Density,
    draw: Draw,
) -> list[Float[Array, "*shape"]]:
    """The task vectors with entries zeroed at random, not yet rescaled; float32."""
    vectors = task_vectors(base, experts)
    return [
        jnp.where(draw(i, jnp.asarray(keep, jnp.float32)), vector, jnp.float32(0))
        for i, (vector, keep) in enumerate(
            zip(vectors, each_density(density, len(vectors)), strict=True)
        )
    ]


def restore_l1(
    dropped: list[Float[Array, "*shape"]], survey: Survey
) -> list[Float[Array, "*shape"]]:
    """Each dropped vector times its L1 ratio, where the survey has one; unchanged otherwise."""
    if not survey.l1:
        return dropped
    return [unfused(ratio * v) for v, ratio in zip(dropped, survey.l1, strict=True)]


def undo_drop(
    combined: Float[Array, "*shape"], density: Density, rescale: Rescale
) -> Float[Array, "*shape"]:
    """Divides what the kept entries gave by the share kept, where that is the rescale."""
    return divide(combined, density) if rescale == "inverse_keep" else combined
