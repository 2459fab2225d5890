"""A model's parameters from a checkpoint of any format, each device reading only the bytes that it holds."""

from __future__ import annotations

import contextlib
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from merging import partitioning
from merging.checkpoints import open_checkpoint
from merging.checkpoints.format import Reader
from merging.models.config import DecoderConfig
from merging.models.decoder import boxed_params
from merging.models.families import model_of
from merging.models.trees import as_model


def read_params(
    checkpoint: epath.PathLike | Reader,
    config: DecoderConfig,
    mesh: Mesh,
    *,
    params_path: str | None = None,
) -> Any:
    """The parameters of a model, sharded over a mesh by `partitioning.RULES`.

    Args:
      checkpoint: the folder of one of any format, or its reader, which stays open. Its leaves are the model's own, in any stacking
        and spelling, or Hugging Face's where the model is of such a family.
      config: of the model; its `param_dtype` is what the parameters are converted to, once.
      mesh: with devices.
      params_path: where they are in a train state.

    Returns:
      The model's tree of jax arrays.

    Raises CheckpointError where leaves are missing, left over, or of another shape, all in one message.
    """
    with contextlib.ExitStack() as opened:
        if isinstance(checkpoint, Reader):
            reader = checkpoint
        else:
            opening = open_checkpoint(checkpoint, params_path=params_path)
            reader = opened.enter_context(contextlib.closing(opening))
        return _read(as_model(reader, config), config, mesh)


def _read(reader: Reader, config: DecoderConfig, mesh: Mesh) -> Any:
    model = model_of(config)
    shardings = flax.traverse_util.flatten_dict(
        partitioning.shardings(boxed_params(model), mesh), sep="/"
    )
    leaves = {
        name: read_leaf(reader, name, shardings[name], config.parameter_dtype) for name in shardings
    }
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def read_leaf(
    reader: Reader, name: str, sharding: jax.sharding.Sharding, dtype: np.dtype
) -> jax.Array:
    """One leaf as an array that is sharded so: a box that several devices of this host hold is read once."""
    shape = reader.specs()[name].shape
    known: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def box(index: tuple[slice, ...]) -> np.ndarray:
        ends = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        if ends not in known:
            known[ends] = reader.read(name, tuple(slice(*each) for each in ends)).astype(
                dtype, copy=False
            )
        return known[ends]

    return jax.make_array_from_callback(shape, sharding, box, dtype=dtype)
