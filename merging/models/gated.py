"""The llama and gemma 3 text families: serial blocks, gated hidden layers, grouped queries, RMSNorm.

llama: arXiv 2302.13971 and 2307.09288. gemma 3: arXiv 2503.19786. They are here to be fine-tuned, merged and evaluated from
their published weights (`huggingface.py`); drawn afresh, kernels start as PaLM's do. Left out: scaled rotary positions,
biases, capped logits, and a cache of the window's size in local layers (it holds all slots).
"""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float

from merging.models.attention import KeysValues, View, self_attention
from merging.models.config import Gemma3Config, LlamaConfig
from merging.models.decoder import Decoder
from merging.models.layers import GatedMlp, TokenEmbedder, UntiedTokenEmbedder, linear
from merging.models.norms import RMSNorm, ZeroCentredRMSNorm


class Llama(Decoder):
    """Parameters: token_embedder/embedding [V, d] (and /readout), layers/{attention_norm, attention, mlp_norm, mlp}."""

    config: LlamaConfig

    def make_embedder(self) -> TokenEmbedder:
        embedder = TokenEmbedder if self.config.tied_embeddings else UntiedTokenEmbedder
        return embedder(self.config)

    def make_block(self) -> LlamaBlock:
        return LlamaBlock(self.config)

    def make_norm(self) -> RMSNorm:
        return _rms_norm(self.config)


class LlamaBlock(nn.Module):
    """x + Attention(norm(x)), then + MLP(norm(that))."""

    config: LlamaConfig

    def setup(self) -> None:
        self.attention_norm = _rms_norm(self.config)
        self.attention = GroupedQueryAttention(self.config, self.config.head_dim**-0.5)
        self.mlp_norm = _rms_norm(self.config)
        self.mlp = GatedMlp(self.config, nn.swish)
        self.dropout = nn.Dropout(self.config.dropout_rate)

    def __call__(
        self, x: Float[Array, "B T d"], view: View, past: KeysValues | None, deterministic: bool
    ) -> tuple[Float[Array, "B T d"], KeysValues]:
        attended, new = self.attention(self.attention_norm(x), view, past)
        x = x + self.dropout(attended, deterministic=deterministic)
        x = x + self.dropout(self.mlp(self.mlp_norm(x)), deterministic=deterministic)
        return nn.with_logical_constraint(x, ("batch", "length", "embed")), new


class Gemma3(Decoder):
    """Parameters: token_embedder/embedding [V, d], layers/{four norms, attention, mlp}, final_norm/scale [d].

    The embedded tokens are scaled by sqrt(d).
    """

    config: Gemma3Config

    def make_embedder(self) -> TokenEmbedder:
        return TokenEmbedder(self.config, encode_scale=self.config.embed_dim**0.5)

    def make_block(self) -> Gemma3Block:
        return Gemma3Block(self.config)

    def make_norm(self) -> ZeroCentredRMSNorm:
        return _zero_centred_norm(self.config)

    def kinds(self) -> list[tuple[float, int | None]]:
        return [(self.config.local_rope_base, self.config.window), (self.config.rope_base, None)]

    def layer_kinds(self) -> list[int]:
        return [("local", "global").index(kind) for kind in self.config.layer_kinds]


class Gemma3Block(nn.Module):
    """llama's block with a norm behind each part as well as before it."""

    config: Gemma3Config

    def setup(self) -> None:
        self.attention_norm = _zero_centred_norm(self.config)
        self.attention = NormedQueryAttention(self.config, self.config.query_scale)
        self.post_attention_norm = _zero_centred_norm(self.config)
        self.mlp_norm = _zero_centred_norm(self.config)
        self.mlp = GatedMlp(self.config, nn.gelu)
        self.post_mlp_norm = _zero_centred_norm(self.config)
        self.dropout = nn.Dropout(self.config.dropout_rate)

    def __call__(
        self, x: Float[Array, "B T d"], view: View, past: KeysValues | None, deterministic: bool
    ) -> tuple[Float[Array, "B T d"], KeysValues]:
        attended, new = self.attention(self.attention_norm(x), view, past)
        x = x + self.dropout(self.post_attention_norm(attended), deterministic=deterministic)
        widened = self.post_mlp_norm(self.mlp(self.mlp_norm(x)))
        x = x + self.dropout(widened, deterministic=deterministic)
        return nn.with_logical_constraint(x, ("batch", "length", "embed")), new


class GroupedQueryAttention(nn.Module):
    """H query heads on K key/value heads (arXiv 2305.13245). Kernels: query [d, H, h], key, value [d, K, h], out [H, h, d]."""

    config: LlamaConfig | Gemma3Config
    query_scale: float

    def setup(self) -> None:
        c = self.config
        self.query = linear(c, (c.num_heads, c.head_dim), ("embed", "heads", "kv"))
        self.key = linear(c, (c.num_kv_heads, c.head_dim), ("embed", "kv_heads", "kv"))
        self.value = linear(c, (c.num_kv_heads, c.head_dim), ("embed", "kv_heads", "kv"))
        self.out = linear(c, (c.embed_dim,), ("heads", "kv", "embed"), over=2)

    def __call__(
        self, x: Float[Array, "B T d"], view: View, past: KeysValues | None
    ) -> tuple[Float[Array, "B T d"], KeysValues]:
        mixed, new = self_attention(
            self.query(x), self.key(x), self.value(x), view=view, past=past, scale=self.query_scale
        )
        return self.out(mixed), new


class NormedQueryAttention(GroupedQueryAttention):
    """Grouped queries whose queries and keys are normed, head by head, before they are rotated."""

    def setup(self) -> None:
        super().setup()
        self.query_norm = _zero_centred_norm(self.config, "kv")
        self.key_norm = _zero_centred_norm(self.config, "kv")

    def __call__(
        self, x: Float[Array, "B T d"], view: View, past: KeysValues | None
    ) -> tuple[Float[Array, "B T d"], KeysValues]:
        mixed, new = self_attention(
            self.query_norm(self.query(x)),
            self.key_norm(self.key(x)),
            self.value(x),
            view=view,
            past=past,
            scale=self.query_scale,
        )
        return self.out(mixed), new


def _rms_norm(config: LlamaConfig) -> RMSNorm:
    return RMSNorm(config.norm_epsilon, config.activation_dtype, config.parameter_dtype)


def _zero_centred_norm(config: Gemma3Config, axis: str = "embed") -> ZeroCentredRMSNorm:
    return ZeroCentredRMSNorm(
        config.norm_epsilon, config.activation_dtype, config.parameter_dtype, axis
    )
