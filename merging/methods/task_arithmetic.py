"""Task Arithmetic (arXiv 2212.04089): add the scaled sum of the task vectors to the base."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Array, Float

from merging.kernels.arithmetic import Number
from merging.kernels.election import weighted_sum
from merging.methods.method import (
    Combine,
    Draw,
    Survey,
    TaskVectorMethod,
    Weights,
    check_choice,
    check_scale,
    check_weights,
)


class TaskArithmetic(TaskVectorMethod):
    """theta = theta_0 + scale * sum w_i tau_i.

    Attributes:
      scale: the paper's lambda; 1/N with weights None is Averaging up to rounding.
      weights: one number per expert; None is 1 for each. Negative ones negate a task.
      combine: "sum", or "mean": divided by the sum of the weights.
    """

    scale: Number = 0.4
    weights: Weights = None
    combine: Combine = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale("TaskArithmetic", self.scale)
        check_choice("TaskArithmetic", "combine", self.combine, ("mean", "sum"))
        check_weights("TaskArithmetic", self.weights, is_mean=self.combine == "mean")

    def direction(
        self,
        base: Float[Array, "*shape"],
        experts: Sequence[Float[Array, "*shape"]],
        *,
        survey: Survey,
        draw: Draw,
    ) -> Float[Array, "*shape"]:
        vectors = self.vectors(base, experts, survey=survey, draw=draw)
        return weighted_sum(vectors, weights=self.weights, is_mean=self.combine == "mean")
