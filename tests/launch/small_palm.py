"""A small PaLM with random parameters, as a folder."""

from __future__ import annotations

import pathlib

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from merging.models import model_file
from merging.models.config import PalmConfig
from merging.models.palm import Palm


def written(folder: pathlib.Path, changes: dict[int, np.ndarray] | None = None) -> pathlib.Path:
    """A folder as finetune leaves it, but for the manifest; some rows of the embedding changed."""
    from tasks.miniature import vocabulary

    config = PalmConfig(
        vocab_size=vocabulary().vocab_size, embed_dim=16, num_layers=2, num_heads=2, head_dim=8, mlp_dim=32
    )  # fmt: skip
    params = Palm(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    leaves = {
        k: np.array(v)
        for k, v in flax.traverse_util.flatten_dict(nn.unbox(params), sep="/").items()
    }
    for token, row in (changes or {}).items():
        leaves["token_embedder/embedding"][token] = row
    folder.mkdir()
    save_file(leaves, folder / "model.safetensors")
    model_file.write(folder, config, {"layers": 0}, model_file.Vocabulary(name="miniature"))
    return folder
