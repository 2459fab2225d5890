"""Sizes of the models, as frozen dataclasses that check themselves, and PaLM's named sizes.

A configuration says everything that a model's parameters and arithmetic depend on, and is plain data: strings, numbers
and tuples. `num_params` is a formula; a test compares it with the shapes of the modules.

PaLM: arXiv 2204.02311, section 2 and table 1. PaLM-2's shapes are unpublished; `1b` to `64b` stand in for its sizes.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np

Remat = Literal["none", "dots", "full"]
LayerKind = Literal["local", "global"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What every decoder has.

    Attributes:
      vocab_size: rows of the embedding.
      embed_dim: width of the residual stream.
      num_layers: blocks.
      num_heads: query heads.
      head_dim: width of one head; even, since rotary positions turn pairs.
      mlp_dim: width of the gated hidden layer.
      rope_base: base of the rotary wavelengths.
      norm_epsilon: added to the variance (or mean square) in every norm.
      dropout_rate: on the embedded tokens and on what each block adds to the residual stream.
      dtype: of activations and the cache. Norms' statistics, attention probabilities and logits are float32 whatever it is.
      param_dtype: of parameters.
      scan_layers: one stacked parameter per kind under `layers` (axis 0 runs over layers), compiled once; else
        `layers_0`, `layers_1`, ...
      remat: what the backward pass computes again: nothing; all but the results of matrix products with parameters;
        or everything inside a block.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    rope_base: float = 10_000.0
    norm_epsilon: float = 1e-6
    dropout_rate: float = 0.0
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan_layers: bool = True
    remat: Remat = "none"

    max_positions = None  # no field but where a published model says what it has learnt

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embed_dim", "num_layers", "num_heads", "head_dim", "mlp_dim"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check("head_dim", self.head_dim % 2 == 0, "even: rotary positions turn pairs")
        self._check("dropout_rate", 0 <= self.dropout_rate < 1, "in [0, 1)")
        is_limit = self.max_positions is None or self.max_positions >= 1
        self._check("max_positions", is_limit, "at least 1, or None")
        self._check("remat", self.remat in get_args(Remat), f"one of {get_args(Remat)}")
        for name in ("dtype", "param_dtype"):
            self._check(name, getattr(self, name) in _FLOATS, f"one of {tuple(_FLOATS)}")

    def _check(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise ValueError(
                f"{type(self).__name__}.{name} is {getattr(self, name)!r}: it must be {wanted}"
            )

    @property
    def activation_dtype(self) -> np.dtype:
        """`dtype` as numpy knows it."""
        return _FLOATS[self.dtype]

    @property
    def parameter_dtype(self) -> np.dtype:
        """`param_dtype` as numpy knows it."""
        return _FLOATS[self.param_dtype]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PalmConfig(DecoderConfig):
    """PaLM: parallel blocks, SwiGLU, one key/value head, LayerNorm with scale alone, tied embeddings.

    Attributes:
      z_loss: coefficient of the loss's log^2 Z (PaLM, section 5); the loss reads it, the model doesn't.
    """

    z_loss: float = 1e-4

    num_kv_heads = 1  # multi-query attention; no field: it is what PaLM is

    def num_params(self) -> int:
        """V d + d + L (3 d d_ff + 2 d H h + 2 d h + d)."""
        d, heads = self.embed_dim, self.num_heads * self.head_dim
        layer = 3 * d * self.mlp_dim + 2 * d * heads + 2 * d * self.head_dim + d
        return self.vocab_size * d + d + self.num_layers * layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """llama: serial blocks, SwiGLU, grouped queries, RMSNorm.

    Attributes:
      num_kv_heads: key/value heads; divides num_heads.
      tied_embeddings: the readout uses the embedding, unscaled; else a table of its own.
      max_positions: the most tokens of a sequence that it was trained on; None: nobody says.
    """

    num_kv_heads: int
    tied_embeddings: bool = False
    max_positions: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        divides = self.num_kv_heads >= 1 and self.num_heads % self.num_kv_heads == 0
        self._check("num_kv_heads", divides, _GROUPS)

    def num_params(self) -> int:
        """(1 or 2) V d + d + L (3 d d_ff + 2 d H h + 2 d K h + 2 d)."""
        d = self.embed_dim
        tables = 1 if self.tied_embeddings else 2
        layer = _gated_layer(self, self.num_kv_heads) + 2 * d
        return tables * self.vocab_size * d + d + self.num_layers * layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Config(DecoderConfig):
    """gemma 3, text: llama's blocks with GeGLU, four norms, normed queries and keys, and mostly local layers.

    Attributes:
      num_kv_heads: key/value heads; divides num_heads.
      layer_kinds: "local" or "global" for each layer.
      window: tokens that a query of a local layer sees, itself included.
      local_rope_base: base of the rotary wavelengths in local layers (`rope_base` is that of global ones).
      query_scale: factor of the queries.
      max_positions: the most tokens of a sequence that it was trained on; None: nobody says.
    """

    num_kv_heads: int
    layer_kinds: tuple[LayerKind, ...]
    window: int
    rope_base: float = 1_000_000.0
    local_rope_base: float = 10_000.0
    query_scale: float
    max_positions: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        divides = self.num_kv_heads >= 1 and self.num_heads % self.num_kv_heads == 0
        self._check("num_kv_heads", divides, _GROUPS)
        self._check("layer_kinds", set(self.layer_kinds) <= set(get_args(LayerKind)), _KINDS)
        self._check("layer_kinds", len(self.layer_kinds) == self.num_layers, "one per layer")
        self._check("window", self.window >= 1, "at least 1")

    def num_params(self) -> int:
        """V d + d + L (3 d d_ff + 2 d H h + 2 d K h + 4 d + 2 h)."""
        d = self.embed_dim
        layer = _gated_layer(self, self.num_kv_heads) + 4 * d + 2 * self.head_dim
        return self.vocab_size * d + d + self.num_layers * layer


def named(name: str, **changes: Any) -> PalmConfig:
    """One of the named sizes, with some fields changed, e.g. `named("mini_s", vocab_size=1000, dtype="bfloat16")`."""
    if name not in SIZES:
        raise ValueError(f"there is no size {name!r}: the named sizes are {', '.join(SIZES)}")
    return dataclasses.replace(SIZES[name], **changes)


def _palm(num_layers: int, embed_dim: int, num_heads: int) -> PalmConfig:
    """PaLM's proportions: d_ff = 4 d, heads of 256, 256,000 entries."""
    return PalmConfig(
        vocab_size=256_000,
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        head_dim=256,
        mlp_dim=4 * embed_dim,
    )


def _mini(num_layers: int, embed_dim: int) -> PalmConfig:
    """PaLM in small: four heads that share the width, and the vocabulary of the built-in world."""
    return PalmConfig(
        vocab_size=1_024,
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=4,
        head_dim=embed_dim // 4,
        mlp_dim=4 * embed_dim,
    )


def _gated_layer(config: DecoderConfig, num_kv_heads: int) -> int:
    """Parameters of one block's kernels: 3 d d_ff + 2 d H h + 2 d K h."""
    heads = 2 * (config.num_heads + num_kv_heads) * config.head_dim
    return config.embed_dim * (3 * config.mlp_dim + heads)


_GROUPS = "a divisor of num_heads: each key/value head serves as many query heads"
_KINDS = f"of {get_args(LayerKind)}"

_FLOATS = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}

SIZES = {
    # About 3 times apart; parameters besides the embedding:
    "mini_xs": _mini(2, 64),  # 0.12 M
    "mini_s": _mini(3, 96),  # 0.40 M
    "mini_m": _mini(5, 128),  # 1.19 M
    "mini_l": _mini(6, 192),  # 3.21 M
    # In place of PaLM-2's sizes; all parameters:
    "1b": _palm(18, 1_536, 6),  # 1.002 B
    "8b": _palm(32, 4_096, 16),  # 8.632 B
    "24b": _palm(42, 6_144, 24),  # 23.90 B
    "64b": _palm(66, 8_192, 32),  # 64.38 B
    # PaLM's own:
    "palm_8b": _palm(32, 4_096, 16),  # 8.63 B
    "palm_62b": _palm(64, 8_192, 32),  # 62.50 B
    "palm_540b": _palm(118, 18_432, 48),  # 540.35 B
}
