"""The trees that hold a model's parameters: our own and, of llama and gemma 3, Hugging Face's; each read as if it were the other.

Which of them a checkpoint has is told by the name of its embedding, in any stacking and spelling. The sizes that lie between the two
(heads, above all) are those of a model.json or a config.json.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping

import flax.traverse_util
import jax
import numpy as np
from etils import epath

from merging import partitioning
from merging.checkpoints.format import LeafSpec, Reader
from merging.checkpoints.known_layouts import in_layout_of
from merging.checkpoints.layout_reader import BUFFER_BYTES, LayoutReader
from merging.checkpoints.safetensors_header import refuse, show
from merging.models import huggingface, model_file
from merging.models.config import DecoderConfig, Gemma3Config, LlamaConfig
from merging.models.decoder import Decoder, boxed_params
from merging.models.families import family_of, model_of
from merging.paths import Stacked, canonical


def specs_of(model: Decoder) -> dict[str, LeafSpec]:
    """The leaves of a model's own tree by name, in its order, in the parameters' dtype."""
    tree = jax.tree.map(lambda box: box.value, boxed_params(model), is_leaf=partitioning.is_box)
    stacked = Stacked(model_file.stacked_of(model.config))
    return {
        name: LeafSpec(
            name=name, shape=leaf.shape, dtype=np.dtype(leaf.dtype), stacked=stacked.axis(name)
        )
        for name, leaf in flax.traverse_util.flatten_dict(tree, sep="/").items()
    }


def is_huggingface(names: Collection[str]) -> bool:
    """Whether leaves of these names are those of a Hugging Face tree."""
    return canonical(huggingface.EMBEDDING) in map(canonical, names)


def is_own(names: Collection[str]) -> bool:
    """Whether leaves of these names are those of our own tree."""
    return canonical(huggingface.OWN_EMBEDDING) in map(canonical, names)


def own_names(reader: Reader, config: DecoderConfig, *, buffer_bytes: int = BUFFER_BYTES) -> Reader:
    """The reader, with the model's own names and shapes where it has Hugging Face's."""
    if not isinstance(config, LlamaConfig | Gemma3Config) or not is_huggingface(reader.specs()):
        return reader
    layout = huggingface.layout(config)
    ours = specs_of(model_of(config))
    theirs = layout.inverse().join(ours, where="the model").specs
    reader = in_layout_of(theirs, reader, buffer_bytes=buffer_bytes // 2)
    return LayoutReader(reader, layout, buffer_bytes=buffer_bytes // 2)


def their_names(
    reader: Reader, config: LlamaConfig | Gemma3Config, *, buffer_bytes: int = BUFFER_BYTES
) -> Reader:
    """The reader of a model's own tree, with Hugging Face's names and shapes."""
    ours = specs_of(model_of(config))
    reader = in_layout_of(ours, reader, buffer_bytes=buffer_bytes // 2)
    layout = dataclasses.replace(huggingface.layout(config).inverse(), name="huggingface")
    return LayoutReader(reader, layout, buffer_bytes=buffer_bytes // 2)


def as_model(reader: Reader, config: DecoderConfig, *, buffer_bytes: int = BUFFER_BYTES) -> Reader:
    """The reader, with leaves as the model has them. Raises CheckpointError where they can't be made so."""
    wanted = specs_of(model_of(config))
    reader = own_names(reader, config, buffer_bytes=buffer_bytes // 2)
    reader = in_layout_of(wanted, reader, buffer_bytes=buffer_bytes // 2)
    found = {name: list(spec.shape) for name, spec in reader.specs().items()}
    shapes = {name: list(spec.shape) for name, spec in wanted.items()}
    problems = [
        f"{show(name)} is {found.get(name, 'missing')}, wanted {shapes.get(name, 'none')}"
        for name in sorted(found.keys() | shapes.keys())
        if found.get(name) != shapes.get(name)
    ]
    refuse(reader.location, problems, f"these are not the parameters of {config}")
    return reader


def as_huggingface(
    reader: Reader, config: DecoderConfig, *, buffer_bytes: int = BUFFER_BYTES
) -> Reader:
    """The reader, with leaves as Hugging Face has them; errors as `as_model`, and for a family that is not known there."""
    if not isinstance(config, LlamaConfig | Gemma3Config):
        problem = f"the model is of the family {family_of(config)}"
        refuse(reader.location, [problem], "Hugging Face's tree is known of llama and gemma 3")
    reader = as_model(reader, config, buffer_bytes=buffer_bytes // 2)
    return their_names(reader, config, buffer_bytes=buffer_bytes // 2)


def in_tree_of(
    wanted: Mapping[str, LeafSpec],
    reader: Reader,
    *,
    folders: tuple[epath.PathLike, epath.PathLike],
    buffer_bytes: int = BUFFER_BYTES,
) -> Reader:
    """The reader, in the tree and layout of the leaves `wanted` where that can be found; else as it is.

    `folders`: of those leaves, and of the reader. Where one is our own tree and the other Hugging Face's, the first of them to say
    what model it is, our own before Hugging Face's, says the sizes.
    """
    found, is_wanted = reader.specs(), is_huggingface(wanted)
    if is_own(found) if is_wanted else is_own(wanted) and is_huggingface(found):
        config = _config_of(reversed(folders) if is_wanted else folders)
        if isinstance(config, LlamaConfig | Gemma3Config):
            buffer_bytes //= 2
            renamed = their_names if is_wanted else own_names
            reader = renamed(reader, config, buffer_bytes=buffer_bytes)
    return in_layout_of(wanted, reader, buffer_bytes=buffer_bytes)


def _config_of(folders: Iterable[epath.PathLike]) -> DecoderConfig | None:
    described = (each for each in folders if model_file.is_described(each))
    first = next(described, None)
    return None if first is None else model_file.describe(first).config
