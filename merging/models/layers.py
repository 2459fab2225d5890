"""The parametrised parts that all families are made of: token embedding, linear maps, gated hidden layers."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from merging.models.config import DecoderConfig


def linear(
    config: DecoderConfig, features: tuple[int, ...], axes: tuple[str, ...], *, over: int = 1
) -> Linear:
    """A linear map without bias from the last `over` axes to `features`; `axes` names those of the kernel."""
    return Linear(features, axes, over, config.activation_dtype, config.parameter_dtype)


class Linear(nn.Module):
    """x . kernel over the last axes of x and the first of the kernel, N(0, 1 / sqrt(n_in)).

    In place of flax's DenseGeneral, which constrains its kernel flattened to a matrix by the names of all of its axes, and
    so can't be traced on a mesh where it has more than two.
    """

    features: tuple[int, ...]
    axes: tuple[str, ...]
    over: int
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        inputs, outputs = range(self.over), range(self.over, len(self.axes))
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(
                nn.initializers.variance_scaling(1.0, "fan_in", "normal", inputs, outputs),
                self.axes,
            ),
            (*x.shape[-self.over :], *self.features),
            self.param_dtype,
        )
        return _product(x.astype(self.dtype), kernel.astype(self.dtype), self.over)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Array, kernel: Array, over: int) -> Array:
    """jnp.tensordot(x, kernel, over), whose kernel gradient is computed in the kernel's own orientation.

    Autodiff computes it transposed. XLA:CPU then writes the gradient of what follows transposed too, element by element,
    which took a quarter of a backward pass.
    """
    return jnp.tensordot(x, kernel, over)


def _product_forward(x: Array, kernel: Array, over: int) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, kernel, over), (x, kernel)


def _product_backward(
    over: int, saved: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    rows = tuple(range(x.ndim - over))
    outputs = tuple(range(over, kernel.ndim)), tuple(range(x.ndim - over, gradient.ndim))
    of_x = jax.lax.dot_general(gradient, kernel, ((outputs[1], outputs[0]), ((), ())))
    of_kernel = jax.lax.dot_general(x, gradient, ((rows, rows), ((), ())))
    return of_x, of_kernel


_product.defvjp(_product_forward, _product_backward)


class TokenEmbedder(nn.Module):
    """Embedding table, read in both directions.

    Attributes:
      encode_scale: factor of the embedded tokens.
      decode_scale: factor of the logits.
    """

    config: DecoderConfig
    encode_scale: float = 1.0
    decode_scale: float = 1.0

    def setup(self) -> None:
        self.embedding = self.param(
            "embedding",
            nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed")),
            (self.config.vocab_size, self.config.embed_dim),
            self.config.parameter_dtype,
        )

    def encode(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T d"]:
        """Rows of the table; NaN for a token that has none, which shows in the whole row."""
        rows = jnp.take(self.embedding, tokens, axis=0).astype(self.config.activation_dtype)
        return rows * jnp.asarray(self.encode_scale, rows.dtype)

    def decode(self, hidden: Float[Array, "*rows d"]) -> Float[Array, "*rows V"]:
        """float32 logits by `table`."""
        table, scale = self.table()
        return readout(hidden, table.astype(self.config.activation_dtype)) * jnp.float32(scale)

    def table(self) -> tuple[Float[Array, "V d"], float]:
        """The table that `decode` reads, in the parameters' dtype, and the factor of the logits."""
        return self.embedding, self.decode_scale


class UntiedTokenEmbedder(TokenEmbedder):
    """An embedding table, and another one for the readout."""

    def setup(self) -> None:
        super().setup()
        self.readout = self.param(
            "readout",
            nn.with_logical_partitioning(
                nn.initializers.variance_scaling(1.0, "fan_in", "normal", 1, 0), ("vocab", "embed")
            ),
            (self.config.vocab_size, self.config.embed_dim),
            self.config.parameter_dtype,
        )

    def table(self) -> tuple[Float[Array, "V d"], float]:
        return self.readout, self.decode_scale


def readout(hidden: Float[Array, "*rows d"], table: Float[Array, "V d"]) -> Float[Array, "*rows V"]:
    """hidden . table^T, summed and returned in float32."""
    last = hidden.ndim - 1
    logits = jax.lax.dot_general(
        hidden, table, (((last,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    if logits.ndim == 3:
        return nn.with_logical_constraint(logits, ("batch", "length", "vocab"))
    return logits


class GatedMlp(nn.Module):
    """wo(activation(wi_0 x) * wi_1 x): SwiGLU with swish (arXiv 2002.05202), GeGLU with gelu."""

    config: DecoderConfig
    activation: Callable[[Array], Array]

    def setup(self) -> None:
        self.wi_0 = linear(self.config, (self.config.mlp_dim,), ("embed", "mlp"))
        self.wi_1 = linear(self.config, (self.config.mlp_dim,), ("embed", "mlp"))
        self.wo = linear(self.config, (self.config.embed_dim,), ("mlp", "embed"))

    def __call__(self, x: Float[Array, "B T d"]) -> Float[Array, "B T d"]:
        hidden = self.activation(self.wi_0(x)) * self.wi_1(x)
        return self.wo(nn.with_logical_constraint(hidden, ("batch", "length", "mlp")))
