"""TIES-Merging (arXiv 2306.01708): trim, elect sign, disjoint mean.

Deviations from the authors' code (github.com/prateeky2806/ties-merging): the trim keeps every entry whose magnitude is
at least that of the int(density * d)-th largest, where their `kthvalue` keeps one entry more; where int(density * d) is 0
nothing is kept. Magnitudes below float32's smallest normal number count as zero, since XLA flushes them.
mergekit trims each tensor (`scope="tensor"`) and gives a vote of zero the sign + (`zero_sign="positive"`).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from merging.kernels.arithmetic import Number
from merging.kernels.election import disjoint_sum, elect
from merging.methods.method import (
    Combine,
    Density,
    Draw,
    Scope,
    Survey,
    TaskVectorMethod,
    Weights,
    ZeroSign,
    check_choice,
    check_fraction,
    check_scale,
    check_weights,
)


class Ties(TaskVectorMethod):
    """theta = theta_0 + scale * disjoint mean of the trimmed task vectors.

    Attributes:
      density: fraction of entries that the trim keeps (the paper keeps 20 %); or one number per expert.
      scale: the paper's lambda.
      weights: one number per expert, which enters the vote and the mean; None is 1 for each, 0 leaves one out.
      scope: trim over the whole flattened model (the authors) or each tensor (mergekit).
      zero_sign: what a vote of zero elects: the majority sign of all votes of the model (the authors; zero again acts as
        negative), + (mergekit), or nothing.
      combine: "mean" of the entries that agree with the elected sign, or their "sum".
    """

    density: Density = 0.2
    scale: Number = 1.0
    weights: Weights = None
    scope: Scope = "model"
    zero_sign: ZeroSign = "majority"
    combine: Combine = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("Ties", "density", self.density)
        check_scale("Ties", self.scale)
        check_weights("Ties", self.weights, is_vote=True)
        check_choice("Ties", "scope", self.scope, ("model", "tensor"))
        check_choice("Ties", "zero_sign", self.zero_sign, ("majority", "positive", "none"))
        check_choice("Ties", "combine", self.combine, ("mean", "sum"))

    @property
    def trim_fraction(self) -> Density:
        return self.density

    @property
    def trim_scope(self) -> Scope:
        return self.scope

    @property
    def asks_majority(self) -> bool:
        return self.zero_sign == "majority"

    def direction(
        self,
        base: Float[Array, "*shape"],
        experts: Sequence[Float[Array, "*shape"]],
        *,
        survey: Survey,
        draw: Draw,
    ) -> Float[Array, "*shape"]:
        vectors = trim(self.vectors(base, experts, survey=survey, draw=draw), survey)
        return disjoint_sum(
            vectors,
            elect(vectors, weights=self.weights),
            weights=self.weights,
            zero_sign=sign_of_zero(self.zero_sign, survey),
            is_mean=self.combine == "mean",
        )


def trim(vectors: Sequence[Float[Array, "*shape"]], survey: Survey) -> list[Float[Array, "*shape"]]:
    """The vectors with every entry below its expert's threshold set to zero."""
    return [
        jnp.where(jnp.abs(vector) >= threshold, vector, jnp.float32(0))
        for vector, threshold in zip(vectors, survey.thresholds, strict=True)
    ]


def sign_of_zero(zero_sign: ZeroSign, survey: Survey) -> Float[Array, ""]:
    """The sign that a vote of zero elects: +1, -1, or 0 for none."""
    if zero_sign == "majority":
        return survey.majority
    return jnp.float32(1 if zero_sign == "positive" else 0)
