"""One small model of each family, with parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from merging.models.config import DecoderConfig, Gemma3Config, LlamaConfig, PalmConfig
from merging.models.decoder import Decoder, abstract_params
from merging.models.gated import Gemma3, Llama
from merging.models.palm import Palm

_SMALL = {"vocab_size": 40, "embed_dim": 32, "num_heads": 4, "head_dim": 8, "mlp_dim": 48}

CONFIGS: dict[str, DecoderConfig] = {
    "palm": PalmConfig(**_SMALL, num_layers=3),
    "llama": LlamaConfig(**_SMALL, num_layers=3, num_kv_heads=2),
    "gemma3": Gemma3Config(
        **_SMALL,
        num_layers=4,
        num_kv_heads=1,
        layer_kinds=("local", "global", "local", "local"),
        window=4,
        query_scale=0.3,
    ),
}
MODELS: dict[type[DecoderConfig], type[Decoder]] = {
    PalmConfig: Palm,
    LlamaConfig: Llama,
    Gemma3Config: Gemma3,
}


def build(family: str, **changes: Any) -> Decoder:
    """The family's model with some fields of its configuration changed."""
    config = dataclasses.replace(CONFIGS[family], **changes)
    return MODELS[type(config)](config)


def params_of(model: Decoder, seed: int = 0) -> Any:
    """Parameters drawn so that every part matters: wide kernels, scales of norms that differ."""
    rng = np.random.default_rng(seed)
    leaves = {}
    shapes = flax.traverse_util.flatten_dict(abstract_params(model), sep="/")
    for name, leaf in shapes.items():
        noise = rng.standard_normal(leaf.shape, dtype=np.float32)
        if name.endswith("scale"):
            noise = np.float32(0.2) * noise + (0 if model.config.__class__ is Gemma3Config else 1)
        if name.endswith("kernel"):
            noise *= np.float32(0.3)
        leaves[name] = jnp.asarray(noise, leaf.dtype)
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def unstacked(params: Any) -> Any:
    """The unscanned tree of a scanned one."""
    rest = {name: value for name, value in params.items() if name != "layers"}
    count = len(jax.tree.leaves(params["layers"])[0])
    layers = {
        f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(count)
    }
    return rest | layers


def tokens_of(model: Decoder, shape: tuple[int, ...], seed: int = 1) -> np.ndarray:
    """Tokens drawn alike, int32."""
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, shape).astype(np.int32)
