"""DARE-TIES: DARE's drop (arXiv 2311.03099), then TIES' sign election and disjoint mean (arXiv 2306.01708).

No magnitude trim unless `trim_density` is given. As in DARE's own code, a vote of zero takes the majority sign of the
whole model. Deviations: the division by the share kept comes once, after the mean (see `dare.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Array, Float

from merging.kernels.arithmetic import Number
from merging.kernels.election import disjoint_mean, elect
from merging.methods.dare import drop, restore_l1, undo_drop
from merging.methods.method import (
    Draw,
    Rescale,
    Survey,
    TaskVectorMethod,
    Weights,
    ZeroSign,
    check_choice,
    check_fraction,
    check_scale,
    check_weights,
)
from merging.methods.ties import sign_of_zero, trim


class DareTies(TaskVectorMethod):
    """theta = theta_0 + scale * disjoint mean of the dropped task vectors / density.

    Attributes:
      density: probability of keeping an entry, the paper's 1 - p.
      scale: TIES' lambda.
      weights: one positive number per expert, which enters the vote and the mean; None is 1 for each.
      trim_density: fraction of entries, of all of the model, that a magnitude trim keeps after the drop; None trims none.
      rescale: "inverse_keep" divides by `density` (the paper); "l1" restores each tensor's L1 norm (mergekit).
      zero_sign: what a vote of zero elects, as in `Ties`.
    """

    density: Number = 0.5
    scale: Number = 1.0
    weights: Weights = None
    trim_density: Number | None = None
    rescale: Rescale = "inverse_keep"
    zero_sign: ZeroSign = "majority"

    def __post_init__(self) -> None:
        check_fraction("DareTies", "density", self.density)
        check_scale("DareTies", self.scale)
        check_weights("DareTies", self.weights, positive=True)
        check_fraction("DareTies", "trim_density", self.trim_density)
        check_choice("DareTies", "rescale", self.rescale, ("inverse_keep", "l1"))
        check_choice("DareTies", "zero_sign", self.zero_sign, ("majority", "positive", "none"))

    @property
    def draws_masks(self) -> bool:
        return True

    @property
    def trim_fraction(self) -> Number | None:
        return self.trim_density

    @property
    def asks_majority(self) -> bool:
        return self.zero_sign == "majority"

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
        if self.trim_density is not None:
            vectors = trim(vectors, survey)
        mean = disjoint_mean(
            vectors,
            elect(vectors, weights=self.weights),
            weights=self.weights,
            zero_sign=sign_of_zero(self.zero_sign, survey),
        )
        return undo_drop(mean, self.density, self.rescale)
