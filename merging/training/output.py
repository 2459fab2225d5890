"""The last output of a run: parameters alone, with what says what they are of, as merge and evaluate read them."""

from __future__ import annotations

import contextlib
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from merging.checkpoints import boxes, open_checkpoint, open_writer, storage
from merging.checkpoints.layout_reader import LayoutReader
from merging.engine import hosts
from merging.models import huggingface, model_file
from merging.models.config import DecoderConfig, Gemma3Config, LlamaConfig

PARAMS = "params"
SHARD_BYTES = 5_000_000_000


def write(
    folder: epath.PathLike,
    params: Any,
    config: DecoderConfig,
    vocabulary: model_file.Vocabulary | None,
    *,
    format: str = "orbax",
    like: epath.PathLike | None = None,
) -> None:
    """Writes parameters and model.json into a folder that exists; from all processes, each what it holds.

    Args:
      folder: gets `params`, an Orbax tree, or Hugging Face's files.
      params: of the model, sharded.
      format: "orbax" or "safetensors".
      like: a Hugging Face folder whose config.json and tokenizer go along with safetensors.
    """
    folder = epath.Path(folder)
    _save(folder / PARAMS, params)
    if hosts.is_main():
        if format == "safetensors":
            _as_safetensors(folder, config, like)
        else:
            model_file.write(folder, config, model_file.stacked_of(config), vocabulary)
    hosts.wait_for_all(f"parameters of {folder}")


def _save(path: epath.Path, params: Any) -> None:
    """Uncompressed, so that a merge reads it by ranges, straight from the files."""
    if path.exists() and hosts.is_main():
        path.rmtree()  # of a run that ended before its manifest
    hosts.wait_for_all(f"room for {path}")
    handler = ocp.PyTreeCheckpointHandler(use_compression=False)
    with contextlib.closing(ocp.Checkpointer(handler)) as checkpointer:
        checkpointer.save(storage.absolute(path), args=ocp.args.PyTreeSave(params))


def _as_safetensors(
    folder: epath.Path, config: LlamaConfig | Gemma3Config, like: epath.PathLike | None
) -> None:
    """Hugging Face's files in place of the Orbax tree."""
    with contextlib.closing(open_checkpoint(folder / PARAMS, is_ours=True)) as stored:
        reader = LayoutReader(stored, huggingface.layout(config).inverse())
        specs = reader.specs()
        writer = open_writer(
            "safetensors",
            folder,
            specs,
            like=reader,
            carry_from=like,
            shard_bytes=SHARD_BYTES,
            dtype=config.param_dtype,
        )
        for name, spec in specs.items():
            index = boxes.whole(spec.shape)
            writer.write(name, index, reader.read(name, index))
        writer.commit()
    (folder / PARAMS).rmtree()
