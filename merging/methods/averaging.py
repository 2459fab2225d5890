"""Averaging: the (weighted) mean of the experts; the base is not used. Model soups (arXiv 2203.05482)."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Array, Float

from merging.kernels.arithmetic import float32
from merging.kernels.election import weighted_sum
from merging.methods.method import (
    Combine,
    Draw,
    Method,
    Survey,
    Weights,
    check_choice,
    check_weights,
)


class Averaging(Method):
    """theta = sum w_i theta_i / sum w_i.

    Attributes:
      weights: one number per expert; None weighs all alike.
      combine: "mean" divides by the sum of the weights; "sum" does not.
    """

    weights: Weights = None
    combine: Combine = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("Averaging", "combine", self.combine, ("mean", "sum"))
        check_weights("Averaging", self.weights, is_mean=self.combine == "mean")

    def __call__(
        self,
        base: Float[Array, "*shape"],
        experts: Sequence[Float[Array, "*shape"]],
        *,
        survey: Survey,
        draw: Draw,
    ) -> Float[Array, "*shape"]:
        del base, survey, draw
        return weighted_sum(
            [float32(expert) for expert in experts],
            weights=self.weights,
            is_mean=self.combine == "mean",
        )
