"""The parametrised parts that all families are made of: token embedding, linear maps, gated hidden layers."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from merging.models.config import DecoderConfig

# N(0, 1 / sqrt(n_in)), as PaLM has it: not truncated.
KERNEL_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
READOUT_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=0)


def linear(
    config: DecoderConfig, features: tuple[int, ...], axes: tuple[str, ...], *, over: int = 1
) -> nn.DenseGeneral:
    """A linear map without bias from the last `over` axes to `features`; `axes` names those of the kernel."""
    return nn.DenseGeneral(
        features=features,
        axis=tuple(range(-over, 0)),
        use_bias=False,
        dtype=config.activation_dtype,
        param_dtype=config.parameter_dtype,
        kernel_init=nn.with_logical_partitioning(KERNEL_INIT, axes),
    )


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
        """Rows of the table; NaN for a token that has none."""
        rows = jnp.take(self.embedding, tokens, axis=0).astype(self.config.activation_dtype)
        return rows * jnp.asarray(self.encode_scale, rows.dtype)

    def decode(self, hidden: Float[Array, "*rows d"]) -> Float[Array, "*rows V"]:
        """float32 logits by the same table."""
        return readout(hidden, self.embedding.astype(self.config.activation_dtype)) * jnp.float32(
            self.decode_scale
        )


class UntiedTokenEmbedder(TokenEmbedder):
    """An embedding table, and another one for the readout."""

    def setup(self) -> None:
        super().setup()
        self.readout = self.param(
            "readout",
            nn.with_logical_partitioning(READOUT_INIT, ("vocab", "embed")),
            (self.config.vocab_size, self.config.embed_dim),
            self.config.parameter_dtype,
        )

    def decode(self, hidden: Float[Array, "*rows d"]) -> Float[Array, "*rows V"]:
        """float32 logits by the readout's own table."""
        return readout(hidden, self.readout.astype(self.config.activation_dtype))


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
