"""Checkpoint formats: one file each, recognised by what is on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from merging.checkpoints import safetensors
from merging.checkpoints.format import CheckpointError, Reader

# Writers by the names that FORMAT takes. Their arguments behind (folder, specs) are their own.
FORMATS: Mapping[str, Callable[..., Any]] = {"safetensors": safetensors.Writer}


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


def format_of(path: epath.Path) -> str:
    """The name of a checkpoint's format, by what is on disk."""
    return "safetensors"  # whose reader says what it wanted and what is there
