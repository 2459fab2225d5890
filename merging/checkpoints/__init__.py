"""Checkpoint formats: one file each, recognised by what is on disk."""

from __future__ import annotations

from etils import epath

from merging.checkpoints import safetensors
from merging.checkpoints.format import CheckpointError, Reader

FORMATS = {"safetensors": safetensors}


def open_checkpoint(path: epath.PathLike, *, params_path: str | None = None) -> Reader:
    """Opens a checkpoint of any known format.

    `params_path`: where the parameters lie in a train state, for formats that hold one. Raises CheckpointError if nothing
    is there or nothing known.
    """
    if params_path is not None:
        raise CheckpointError(
            f"{path}: PARAMS_PATH is {params_path!r}, but safetensors files hold parameters only"
        )
    path = epath.Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: name a checkpoint's folder")
    return safetensors.Reader(path)


def format_of(reader: Reader) -> str:
    """The name of an open checkpoint's format."""
    return next(name for name, each in FORMATS.items() if isinstance(reader, each.Reader))
