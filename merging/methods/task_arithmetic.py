"""Task Arithmetic (arXiv 2212.04089): add the scaled sum of the task vectors to the base."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Array, Float

from merging.kernels.arithmetic import Number
from merging.kernels.election import ordered_sum, weighted
from merging.methods.method import (
    Draw,
    Survey,
    TaskVectorMethod,
    Weights,
    check_scale,
    check_weights,
)


class TaskArithmetic(TaskVectorMethod):
    """theta = theta_0 + scale * sum w_i tau_i.

    Attributes:
      scale: the paper's lambda; 1/N with weights None is Averaging up to rounding.
      weights: one number per expert; None is 1 for each. Negative ones negate a task.
    """

    scale: Number = 0.4
    weights: Weights = None

    def __post_init__(self) -> None:
        check_scale("TaskArithmetic", self.scale)
        check_weights("TaskArithmetic", self.weights, positive=False)

    def direction(
        self,
        base: Float[Array, "*shape"],
        experts: Sequence[Float[Array, "*shape"]],
        *,
        survey: Survey,
        draw: Draw,
    ) -> Float[Array, "*shape"]:
        vectors = self.vectors(base, experts, survey=survey, draw=draw)
        return ordered_sum(weighted(vectors, self.weights))
