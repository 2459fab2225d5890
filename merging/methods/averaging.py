"""Averaging: the (weighted) mean of the experts; the base is not used. Model soups (arXiv 2203.05482)."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from merging.kernels.arithmetic import divide, float32
from merging.kernels.election import ordered_sum, weighted
from merging.methods.method import Draw, Method, Survey, Weights, check_weights


class Averaging(Method):
    """theta = sum w_i theta_i / sum w_i.

    Attributes:
      weights: one number per expert; None weighs all alike. They are normalised by their sum.
    """

    weights: Weights = None

    def __post_init__(self) -> None:
        check_weights("Averaging", self.weights, positive=False)
        if self.weights is not None and all(isinstance(w, float | int) for w in self.weights):
            if sum(self.weights) == 0:
                raise ValueError(
                    f"Averaging.weights are {tuple(self.weights)}: their sum is 0, so they have no mean"
                )

    def __call__(
        self,
        base: Float[Array, "*shape"],
        experts: Sequence[Float[Array, "*shape"]],
        *,
        survey: Survey,
        draw: Draw,
    ) -> Float[Array, "*shape"]:
        del base, survey, draw
        total = ordered_sum(weighted([float32(expert) for expert in experts], self.weights))
        if self.weights is None:
            return divide(total, len(experts))
        return divide(total, ordered_sum([jnp.asarray(w, jnp.float32) for w in self.weights]))
