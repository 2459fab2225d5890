"""Checkpoint formats: one file each, recognised by what is on disk."""

from __future__ import annotations

from etils import epath

from merging.checkpoints import safetensors
from merging.checkpoints.format import CheckpointError, Reader


def open_checkpoint(path: epath.PathLike) -> Reader:
    """Opens a checkpoint of any known format.

    Raises CheckpointError if nothing is there or nothing known.
    """
    path = epath.Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: name a checkpoint's folder")
    return safetensors.Reader(path)
