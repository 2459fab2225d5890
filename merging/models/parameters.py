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
from merging.checkpoints.format import LeafSpec, Reader
from merging.checkpoints.huggingface import read_config
from merging.checkpoints.known_layouts import in_layout_of, named_layout
from merging.checkpoints.layout_reader import LayoutReader
from merging.checkpoints.safetensors_header import refuse, show
from merging.models import huggingface
from merging.models.config import DecoderConfig, Gemma3Config, LlamaConfig
from merging.models.decoder import Decoder, boxed_params
from merging.models.families import model_of


def read_params(
    checkpoint: epath.PathLike | Reader,
    config: DecoderConfig,
    mesh: Mesh,
    *,
    params_path: str | None = None,
    layout: str | None = None,
) -> Any:
    """The parameters of a model, sharded over a mesh by `partitioning.RULES`.

    Args:
      checkpoint: the folder of one of any format, or its reader, which stays open. Its leaves are the model's own, in any stacking
        and spelling, or Hugging Face's where the model is of such a family.
      config: of the model; its `param_dtype` is what the parameters are converted to, once.
      mesh: with devices.
      params_path: where they are in a train state.
      layout: a name of `known_layouts.LAYOUTS`, with options, that leads to the model's own tree.

    Returns:
      The model's tree of jax arrays.

    Raises CheckpointError where leaves are missing, left over, or of another shape, all in one message.
    """
    with contextlib.ExitStack() as opened:
        if not isinstance(checkpoint, Reader):
            folder = epath.Path(checkpoint)
            reader: Reader = opened.enter_context(
                contextlib.closing(open_checkpoint(folder, params_path=params_path))
            )
            described = read_config(folder if folder.is_dir() else None)
        else:
            reader, described = checkpoint, {}
        if layout is not None:
            reader = LayoutReader(reader, named_layout(layout, reader.specs(), described))
        return _read(as_model(reader, config), config, mesh)


def as_model(reader: Reader, config: DecoderConfig) -> Reader:
    """The reader, with leaves as the model has them. Raises CheckpointError where they can't be made so."""
    wanted = specs_of(model_of(config))
    reader = in_layout_of(wanted, own_names(reader, config))
    found = {name: list(spec.shape) for name, spec in reader.specs().items()}
    shapes = {name: list(spec.shape) for name, spec in wanted.items()}
    problems = [
        f"{show(name)} is {found.get(name, 'missing')}, wanted {shapes.get(name, 'none')}"
        for name in sorted(found.keys() | shapes.keys())
        if found.get(name) != shapes.get(name)
    ]
    refuse(reader.location, problems, f"these are not the parameters of {config}")
    return reader


def own_names(reader: Reader, config: DecoderConfig) -> Reader:
    """The reader, with the model's own names and shapes where it has Hugging Face's."""
    theirs = "model.embed_tokens.weight"
    if isinstance(config, LlamaConfig | Gemma3Config) and theirs in reader.specs():
        return LayoutReader(reader, huggingface.layout(config))
    return reader


def specs_of(model: Decoder) -> dict[str, LeafSpec]:
    """The leaves of a model's own tree by name, in its order, in the parameters' dtype."""
    tree = jax.tree.map(lambda box: box.value, boxed_params(model), is_leaf=partitioning.is_box)
    return {
        name: LeafSpec(name=name, shape=leaf.shape, dtype=np.dtype(leaf.dtype))
        for name, leaf in flax.traverse_util.flatten_dict(tree, sep="/").items()
    }


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
