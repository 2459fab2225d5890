"""Checkpoint formats: one file each, recognised by what is on disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from merging.checkpoints import orbax, safetensors, t5x
from merging.checkpoints.format import CheckpointError, Reader

# Writers by the names that FORMAT takes. Their arguments behind (folder, specs) are their own.
FORMATS: Mapping[str, Callable[..., Any]] = {
    "safetensors": safetensors.Writer,
    "orbax": orbax.Writer,
    "t5x": t5x.Writer,
    "t5x_orbax": t5x.OrbaxWriter,
}

_STEP = re.compile(r"(?:[A-Za-z0-9-]+_)?\d+")


def open_checkpoint(path: epath.PathLike, *, params_path: str | None = None) -> Reader:
    """Opens a checkpoint of any known format.

    Args:
      path: a Hugging Face folder or a safetensors file; an Orbax folder or a step of a CheckpointManager; a step of T5X.
      params_path: where the parameters are in a tree (Orbax, T5X), keys joined by `/`.

    Raises CheckpointError if nothing is there or nothing known; for a folder of steps it lists them.
    """
    path = epath.Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: name a checkpoint's folder")
    known = format_of(path)
    if known == "orbax":
        # What T5X wrote is known by its tree, which the first opening tells.
        if params_path is None and t5x.is_train_state(orbax.Reader(path, params_path="")):
            return t5x.open_orbax(path)
        return orbax.Reader(path, params_path=params_path)
    if known == "t5x":
        return t5x.Reader(path, params_path=params_path)
    if params_path:
        raise CheckpointError(f"{path} has no tree in which PARAMS_PATH={params_path!r} could be")
    return safetensors.Reader(path)


def format_of(path: epath.Path) -> str:
    """ "safetensors", "orbax" or "t5x", by what is on disk. Raises CheckpointError with what was found instead."""
    if path.is_file():
        return "safetensors"
    names = sorted(child.name for child in path.iterdir())
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return "safetensors"
    if orbax.METADATA_FILE in names or orbax.items_of(path):
        return "orbax"
    if t5x.FILE in names and (path / t5x.FILE).is_file():
        return "t5x"
    if t5x.FILE in {child.name for child in (path / "state").iterdir()} if "state" in names else ():
        raise CheckpointError(f"{path}: give {path / 'state'}, which holds a T5X checkpoint")
    steps = [name for name in names if _STEP.fullmatch(name) and (path / name).is_dir()]
    if steps:
        steps.sort(key=lambda name: int(re.search(r"\d+$", name)[0]))
        raise CheckpointError(
            f"{path} is a folder of steps: {', '.join(steps)}; give the path of one, e.g. {path / steps[-1]}"
        )
    if any(".orbax-checkpoint-tmp" in name or ".tmp-" in name for name in (path.name, *names)):
        raise CheckpointError(
            f"{path} is a checkpoint that was never finished: it holds {names[:8]}"
        )
    return "safetensors"  # whose reader says what it wanted and what is there
