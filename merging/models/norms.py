"""Norms over the last axis, with a scale and no bias; statistics are float32, the result has the activations' dtype."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) * scale (PaLM; arXiv 1607.06450 without its bias)."""

    epsilon: float
    dtype: DTypeLike
    param_dtype: DTypeLike
    axis: str = "embed"  # logical name of the normed axis

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        scale = _scale(self, x, nn.initializers.ones)
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        return (_over_root_mean_square(centred, self.epsilon) * scale).astype(self.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale (llama; arXiv 1910.07467)."""

    epsilon: float
    dtype: DTypeLike
    param_dtype: DTypeLike
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        scale = _scale(self, x, nn.initializers.ones)
        normed = _over_root_mean_square(x.astype(jnp.float32), self.epsilon)
        return (normed * scale).astype(self.dtype)


class ZeroCentredRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * (1 + scale): gemma's, whose stored scale is what differs from 1."""

    epsilon: float
    dtype: DTypeLike
    param_dtype: DTypeLike
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        scale = _scale(self, x, nn.initializers.zeros)
        normed = _over_root_mean_square(x.astype(jnp.float32), self.epsilon)
        return (normed * (1 + scale)).astype(self.dtype)


def _scale(module: nn.Module, x: Array, init: jax.nn.initializers.Initializer) -> Array:
    scale = module.param(
        "scale",
        nn.with_logical_partitioning(init, (module.axis,)),
        (x.shape[-1],),
        module.param_dtype,
    )
    return scale.astype(jnp.float32)


def _over_root_mean_square(x: Array, epsilon: float) -> Array:
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)
