"""Checkpoint formats: one file each, recognised by what is on disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from merging.checkpoints import orbax, safetensors, t5x, tree_writer
from merging.checkpoints.format import UNFINISHED_FILE, CheckpointError, LeafSpec, Reader, Writer
from merging.checkpoints.huggingface import carried_files
from merging.checkpoints.tree_writer import Tree
from merging.checkpoints.trees import TreeReader

# Writers by the names that FORMAT takes. Their arguments behind (folder, specs) are their own.
FORMATS: Mapping[str, Callable[..., Any]] = {
    "safetensors": safetensors.Writer,
    "orbax": orbax.Writer,
    "t5x": t5x.Writer,
    "t5x_orbax": t5x.OrbaxWriter,
}

# What each of them writes that is a tree.
_TREES: Mapping[str, Callable[..., Tree]] = {
    "orbax": orbax.plan,
    "t5x": t5x.plan,
    "t5x_orbax": t5x.plan_orbax,
}

_STEP = re.compile(r"(?:[A-Za-z0-9-]+_)?\d+")


def open_checkpoint(
    path: epath.PathLike, *, params_path: str | None = None, is_ours: bool = False
) -> Reader:
    """Opens a checkpoint of any known format.

    Args:
      path: a Hugging Face folder or a safetensors file; an Orbax folder or a step of a CheckpointManager; a step of T5X.
      params_path: where the parameters are in a tree (Orbax, T5X), keys joined by `/`.
      is_ours: who asks is the run that writes there, and knows that what it opens is whole.

    Raises CheckpointError if nothing is there or nothing known, or if it is part of an output that is not finished; for a
    folder of steps it lists them.
    """
    path = epath.Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: name a checkpoint's folder")
    unfinished = [each for each in (path, *path.parents[:2]) if (each / UNFINISHED_FILE).exists()]
    if unfinished and not is_ours:
        raise CheckpointError(
            f"{path} is not finished: a run is writing to {unfinished[0]}, or was stopped there; the same command again"
            " finishes it"
        )
    known = _format_of(path)
    if known == "t5x_orbax":
        return t5x.OrbaxReader(path, params_path=params_path)
    if known == "orbax":
        return orbax.Reader(path, params_path=params_path)
    if known == "t5x":
        return t5x.Reader(path, params_path=params_path)
    if params_path:
        raise CheckpointError(f"{path} has no tree in which PARAMS_PATH={params_path!r} could be")
    return safetensors.Reader(path)


def _format_of(path: epath.Path) -> str:
    """A name of FORMATS, by what is on disk. Raises CheckpointError with what was found instead."""
    if path.is_file():
        return "safetensors"
    names = sorted(child.name for child in path.iterdir())
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return "safetensors"
    items = orbax.items_of(path)
    if orbax.METADATA_FILE in names or items:
        is_one_tree = orbax.METADATA_FILE in names or len(items) == 1
        is_t5x = is_one_tree and t5x.is_train_state(orbax.array_paths(path))
        return "t5x_orbax" if is_t5x else "orbax"
    if t5x.FILE in names and (path / t5x.FILE).is_file():
        return "t5x"
    if (path / "state" / t5x.FILE).exists():
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


def check_writable(
    name: str,
    specs: Mapping[str, LeafSpec],
    *,
    like: Reader,
    carry_from: epath.PathLike | None = None,
    shard_bytes: int,
    dtype: str | None = None,
    optimizer_state: str = "drop",
) -> Mapping[str, LeafSpec]:
    """What `open_writer` would write beside the parameters, by names from the root; from headers alone, arguments as there.

    Raises ValueError for what the format can't hold, as `open_writer` does, and CheckpointError for files that can't go along.
    """
    if name == "safetensors":
        _refuse_state(optimizer_state)
        safetensors.check(specs, shard_bytes=shard_bytes, carry_from=carry_from, config_dtype=dtype)
        return {}
    like = like if isinstance(like, TreeReader) else None
    return _TREES[name](specs, like=like, optimizer_state=optimizer_state).beside


def open_writer(
    name: str,
    folder: epath.PathLike,
    specs: Mapping[str, LeafSpec],
    *,
    like: Reader,
    carry_from: epath.PathLike | None = None,
    shard_bytes: int,
    dtype: str | None = None,
    optimizer_state: str = "drop",
    process_index: int = 0,
    process_count: int = 1,
    is_resumed: bool = False,
) -> Writer:
    """A writer of one of FORMATS, with its share of the leaves for this process.

    Args:
      name: of the format.
      folder, specs: where, and all leaves in storage order.
      like: the checkpoint whose tree, beside the parameters, the output takes over, where the format has one.
      carry_from: a folder whose files of Hugging Face's, config and tokenizer, go along where it has them.
      shard_bytes: of data per file of safetensors, at most.
      dtype: what config.json shall say of the weights' type; None leaves it.
      optimizer_state: "drop", or "base": with what `like` holds beside the parameters.
      is_resumed: goes on where an earlier writer with the same arguments was; see `format.Writer`.

    Processes share a folder: all others commit before process 0 does. Raises ValueError for what the format can't hold.
    """
    if name != "safetensors":
        carried = carried_files(carry_from, dtype) if process_index == 0 else {}
        writer = FORMATS[name](
            folder,
            specs,
            like=like if isinstance(like, TreeReader) else None,
            optimizer_state=optimizer_state,
            process_index=process_index,
            process_count=process_count,
            is_resumed=is_resumed,
        )
        writer.carry(carried)
        return writer
    _refuse_state(optimizer_state)
    shard_bytes = _shared_shard_bytes(specs, shard_bytes, process_count)
    number = len(safetensors.plan_shards(specs, shard_bytes))
    return safetensors.Writer(
        folder,
        specs,
        shard_bytes=shard_bytes,
        carry_from=carry_from,
        shards_mine=_shards_of(process_index, number, process_count),
        is_main=process_index == 0,
        config_dtype=dtype,
        is_resumed=is_resumed,
    )


def shares(
    name: str, specs: Mapping[str, LeafSpec], *, shard_bytes: int, process_count: int
) -> list[list[str]]:
    """The leaves that the writer of each process would write; arguments as `open_writer`'s.

    A leaf is never cut: where few leaves hold most bytes, shares are uneven.
    """
    if name != "safetensors":
        is_inline = t5x.is_inline if name == "t5x" else lambda spec: False
        return tree_writer.shares(specs, process_count, is_inline)
    shards = safetensors.plan_shards(specs, _shared_shard_bytes(specs, shard_bytes, process_count))
    return [
        [leaf for shard in _shards_of(i, len(shards), process_count) for leaf in shards[shard]]
        for i in range(process_count)
    ]


def _shared_shard_bytes(specs: Mapping[str, LeafSpec], shard_bytes: int, process_count: int) -> int:
    """Shards are what processes share out among themselves, so there must be enough of them."""
    total = sum(spec.nbytes for spec in specs.values())
    return min(shard_bytes, max(1, -(-total // process_count)))


def _shards_of(process_index: int, number: int, process_count: int) -> range:
    return range(process_index, number, process_count)


def _refuse_state(optimizer_state: str) -> None:
    """Of safetensors."""
    if optimizer_state != "drop":
        raise ValueError(
            "safetensors files hold parameters only: choose FORMAT='orbax' or 't5x', or OPTIMIZER_STATE='drop'"
        )
