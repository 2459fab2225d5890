"""DARE-TIES: DARE's drop (arXiv 2311.03099), then TIES' sign election and disjoint mean (arXiv 2306.01708).

No magnitude trim unless `trim_density` is given. As in DARE's own code, a vote of zero takes the majority sign of the
whole model. Deviations: the division by the share kept comes once, after the mean (see `dare.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Array, Float

from merging.kernels.arithmetic import Number
from merging.kernels.election import disjoint_sum, elect
from merging.methods.dare import check_rescale, drop, restore_l1, undo_drop
from merging.methods.method import (
    Combine,
    Density,
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
      density: probability of keeping an entry, the paper's 1 - p; or one number per expert, with another rescale.
      scale: TIES' lambda.
      weights: one number per expert, which enters the vote and the mean; None is 1 for each, 0 leaves one out.
      trim_density: fraction of entries, of all of the model, that a magnitude trim keeps after the drop; None trims none.
      rescale: "inverse_keep" divides by `density` (the paper); "l1" restores each tensor's L1 norm (mergekit); or "none".
      zero_sign: what a vote of zero elects, as in `Ties`.
      combine: "mean" of the entries that agree with the elected sign, or their "sum" (mergekit's default).
    """

    density: Density = 0.5
    scale: Number = 1.0
    weights: Weights = None
    trim_density: Number | None = None
    rescale: Rescale = "inverse_keep"
    zero_sign: ZeroSign = "majority"
    combine: Combine = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("DareTies", "density", self.density)
        check_scale("DareTies", self.scale)
        check_weights("DareTies", self.weights, is_vote=True)
        check_fraction("DareTies", "trim_density", self.trim_density)
        check_rescale("DareTies", self.rescale, self.density)
        check_choice("DareTies", "zero_sign", self.zero_sign, ("majority", "positive", "none"))
        check_choice("DareTies", "combine", self.combine, ("mean", "sum"))

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
        combined = disjoint_sum(
            vectors,
            elect(vectors, weights=self.weights),
            weights=self.weights,
            zero_sign=sign_of_zero(self.zero_sign, survey),
            is_mean=self.combine == "mean",
        )
        return undo_drop(combined, self.density, self.rescale)
