"""PaLM (arXiv 2204.02311, section 2), the family this system is about.

Parallel blocks, y = x + MLP(LN(x)) + Attention(LN(x)); SwiGLU; multi-query attention; rotary positions; LayerNorm with scale
alone; no biases; input and output embeddings shared, logits scaled by 1 / sqrt(d). Kernels are drawn from
N(0, 1 / sqrt(n_in)), embeddings from N(0, 1). Causal, or a prefix-LM with a prefix mask.

The paper leaves open: dropout (here on the embedded tokens and on what a block adds), the rotary pairing (here halves), where
the query is scaled (here 1 / sqrt(h), before the product), and the norms' epsilon (1e-6).
"""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float

from merging.models.attention import KeysValues, View, self_attention
from merging.models.config import PalmConfig
from merging.models.decoder import Decoder
from merging.models.layers import GatedMlp, TokenEmbedder, linear
from merging.models.norms import LayerNorm


class Palm(Decoder):
    """Parameters: token_embedder/embedding [V, d], layers/{norm, attention, mlp}, final_norm/scale [d]."""

    config: PalmConfig

    def make_embedder(self) -> TokenEmbedder:
        return TokenEmbedder(self.config, decode_scale=self.config.embed_dim**-0.5)

    def make_block(self) -> PalmBlock:
        return PalmBlock(self.config)

    def make_norm(self) -> LayerNorm:
        return _norm(self.config)


class PalmBlock(nn.Module):
    """x + Attention(LN(x)) + MLP(LN(x)), one norm for both."""

    config: PalmConfig

    def setup(self) -> None:
        self.norm = _norm(self.config)
        self.attention = MultiQueryAttention(self.config)
        self.mlp = GatedMlp(self.config, nn.swish)
        self.dropout = nn.Dropout(self.config.dropout_rate)

    def __call__(
        self, x: Float[Array, "B T d"], view: View, past: KeysValues | None, deterministic: bool
    ) -> tuple[Float[Array, "B T d"], KeysValues]:
        normed = self.norm(x)
        attended, new = self.attention(normed, view, past)
        added = self.dropout(attended + self.mlp(normed), deterministic=deterministic)
        return nn.with_logical_constraint(x + added, ("batch", "length", "embed")), new


class MultiQueryAttention(nn.Module):
    """H query heads on one key/value head (arXiv 1911.02150). Kernels: query [d, H, h], key and value [d, h], out [H, h, d]."""

    config: PalmConfig

    def setup(self) -> None:
        c = self.config
        self.query = linear(c, (c.num_heads, c.head_dim), ("embed", "heads", "kv"))
        self.key = linear(c, (c.head_dim,), ("embed", "kv"))
        self.value = linear(c, (c.head_dim,), ("embed", "kv"))
        self.out = linear(c, (c.embed_dim,), ("heads", "kv", "embed"), over=2)

    def __call__(
        self, x: Float[Array, "B T d"], view: View, past: KeysValues | None
    ) -> tuple[Float[Array, "B T d"], KeysValues]:
        mixed, new = self_attention(
            self.query(x),
            self.key(x)[:, :, None],
            self.value(x)[:, :, None],
            view=view,
            past=past,
            scale=self.config.head_dim**-0.5,
        )
        return self.out(mixed), new


def _norm(config: PalmConfig) -> LayerNorm:
    return LayerNorm(config.norm_epsilon, config.activation_dtype, config.parameter_dtype)
