"""Checkpoints of a llama of 2 million random parameters, as `transformers` opens them: what commands are tried on."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Iterator, Mapping

import numpy as np

SEED = 0

# A llama of 2 million parameters, 4 MB in bfloat16: large enough to have all kinds of leaves, small enough for seconds.
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1024,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}

# Standard deviations. Task vectors of real fine-tuning are smaller than the weights by about this factor.
WEIGHT_SCALE = 0.02
TASK_VECTOR_SCALE = 0.002


def make_base(folder: pathlib.Path) -> pathlib.Path:
    """A random model, unless it is there."""
    rng = np.random.default_rng(SEED)
    if not folder.exists():
        leaves = {
            name: np.ones(shape, np.float32)
            if name.endswith("norm.weight")
            else WEIGHT_SCALE * rng.standard_normal(shape, np.float32)
            for name, shape in leaf_shapes()
        }
        write(folder, leaves)
    return folder


def make_expert(folder: pathlib.Path, base: pathlib.Path, *, number: int) -> pathlib.Path:
    """The base plus a random task vector, unless it is there."""
    rng = np.random.default_rng([SEED, 1 + number])
    if not folder.exists():
        leaves = {
            name: leaf + TASK_VECTOR_SCALE * rng.standard_normal(leaf.shape, np.float32)
            for name, leaf in read(base).items()
        }
        write(folder, leaves)
    return folder


def leaf_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the leaves, as `transformers` has them: [out, in]."""
    embed, mlp = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    heads = CONFIG["num_attention_heads"] * CONFIG["head_dim"]
    kv_heads = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    yield "model.embed_tokens.weight", (CONFIG["vocab_size"], embed)
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (embed,)
        yield f"{prefix}.self_attn.q_proj.weight", (heads, embed)
        yield f"{prefix}.self_attn.k_proj.weight", (kv_heads, embed)
        yield f"{prefix}.self_attn.v_proj.weight", (kv_heads, embed)
        yield f"{prefix}.self_attn.o_proj.weight", (embed, heads)
        yield f"{prefix}.post_attention_layernorm.weight", (embed,)
        yield f"{prefix}.mlp.gate_proj.weight", (mlp, embed)
        yield f"{prefix}.mlp.up_proj.weight", (mlp, embed)
        yield f"{prefix}.mlp.down_proj.weight", (embed, mlp)
    yield "model.norm.weight", (embed,)


def write(folder: pathlib.Path, leaves: Mapping[str, np.ndarray]) -> None:
    """A Hugging Face folder in bfloat16; made beside its place and renamed, so that it is whole or absent."""
    import ml_dtypes

    from merging.checkpoints import boxes
    from merging.checkpoints.format import LeafSpec
    from merging.checkpoints.safetensors import Writer

    making = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    dtype = np.dtype(ml_dtypes.bfloat16)
    specs = {
        name: LeafSpec(name=name, shape=leaf.shape, dtype=dtype) for name, leaf in leaves.items()
    }
    writer = Writer(making, specs, shard_bytes=1 << 30)
    for name in writer.names_mine:
        writer.write(name, boxes.whole(leaves[name].shape), leaves[name].astype(dtype))
    writer.commit()
    (making / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    making.rename(folder)


def read(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All leaves of a folder, float32."""
    from merging.checkpoints import boxes, open_checkpoint

    reader = open_checkpoint(folder)
    try:
        return {
            name: reader.read(name, boxes.whole(spec.shape)).astype(np.float32)
            for name, spec in reader.specs().items()
        }
    finally:
        reader.close()
