"""Orbax checkpoints: a tree of arrays in an OCDBT database or in folders, with `_METADATA` that describes the tree.

What it promises. Reading: what orbax-checkpoint 0.12 writes, from any sharding and any number of processes, in OCDBT or plain
folders, zarr 2 or 3; everything the files claim is checked before memory is taken for it, and only the bytes of a box are
read where chunks are not compressed, only its chunks where they are. Writing: what orbax-checkpoint restores, with and without
a target, by pieces, from several processes.

Format: `_METADATA` as orbax-checkpoint 0.12.8 reads and writes it (orbax/checkpoint/_src/metadata/tree.py): each leaf's keys
and kind. Arrays are named by their keys joined by `.`. Beside arrays a tree may hold None, empty containers and
strings: they are no leaves here, and go from a base into what is written like it. Orbax refuses to save arrays
without elements, but restores them; they are read and written.

What it leaves out: `_sharding` (a restore without a target gives numpy arrays), random keys' types, files of Orbax before 0.4
(`checkpoint` beside the arrays: see `t5x.py`, which reads those of T5X), checkpoints without a merged database.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from merging.checkpoints import ocdbt, zarr
from merging.checkpoints.boxes import Assembler, chunk_shape
from merging.checkpoints.folder import Blob, Folder
from merging.checkpoints.format import CheckpointError, LeafSpec
from merging.checkpoints.safetensors_header import load_json, show
from merging.checkpoints.storage import is_local, put_file
from merging.checkpoints.tree_writer import (
    CHUNK_BYTES,
    DatabaseStore,
    FolderStore,
    Leaf,
    Tree,
    TreeWriter,
    assembler,
    naming,
    plan_tree,
    specs_of,
    sync_folder,
    sync_tree,
)
from merging.checkpoints.trees import (
    Constant,
    Path,
    TreeReader,
    check_paths,
    file_bytes,
    name_of,
    stored_name,
)

METADATA_FILE = "_METADATA"
STEP_FILE = "_CHECKPOINT_METADATA"
_STRINGS_FILE = "_strings.json"
_COMMITTED_FILE = "commit_success.txt"

_MAX_METADATA_BYTES = 64 << 20
_SEQUENCE, _DICT = 1, 2  # kinds of keys
_EMPTY = {"None": None, "Dict": {}, "List": [], "Tuple": ()}
_HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"


class Reader(TreeReader):
    """An Orbax checkpoint, open for reading. Thread-safe.

    Args:
      path: a folder with `_METADATA`, or a step of a CheckpointManager (`default/`, `state/`, ...). Where a step has
        several such items, `params_path` begins with the item's name.
      params_path: where the parameters are in the tree, keys joined by `/` ("params"); see `TreeReader`.
      cache_bytes: of decoded chunks; default twice what the leaf with the widest rows of compressed chunks needs for
        boxes in order to decode each chunk once. Uncompressed chunks need none.

    Attributes:
      cache_bytes: the same, decided.

    Raises CheckpointError where a file isn't as the format says, and as `TreeReader` does.
    """

    format = "orbax"

    def __init__(
        self,
        path: epath.PathLike,
        *,
        params_path: str | None = None,
        cache_bytes: int | None = None,
    ):
        place, params_path = find_item(epath.Path(path), params_path)
        folder = Folder(place)
        raw, tree, where = _metadata(folder)
        leaves, constants = _entries(tree, folder, where)
        check_paths(leaves, where)
        context = zarr.Context()
        arrays = _open_arrays(
            leaves,
            folder,
            may_lack_chunks=tree.get("store_array_data_equal_to_fill_value") is not True,
            context=context,
        )
        wanted = 2 * max((array.cached_bytes for array in arrays.values()), default=0)
        self.cache_bytes = context.cache_bytes = wanted if cache_bytes is None else cache_bytes
        header = [raw, *(array.raw for array in arrays.values())]
        super().__init__(str(path), folder, header, arrays, constants, params_path)


def array_paths(path: epath.Path) -> list[Path]:
    """The paths of a tree's arrays, by its metadata alone. Errors as `find_item`, and where that isn't as the format says."""
    folder = Folder(find_item(path, None)[0])
    _, tree, where = _metadata(folder)
    return _entries(tree, folder, where)[0]


def find_item(path: epath.Path, params_path: str | None) -> tuple[epath.Path, str | None]:
    """The folder that holds the tree, and what is left of `params_path`."""
    if (path / METADATA_FILE).exists():
        return path, params_path
    items = items_of(path)
    first, _, below = (params_path or "").partition("/")
    if len(items) == 1:
        return _no_link(path / items[0]), params_path
    if first in items:
        return _no_link(path / first), below
    if items:
        raise CheckpointError(
            f"{path} is a step with several items that hold trees: {', '.join(items)}; give the path of one, or begin "
            "PARAMS_PATH with its name"
        )
    raise CheckpointError(f"{path} holds no {METADATA_FILE}: it is no Orbax checkpoint")


def _no_link(path: epath.Path) -> epath.Path:
    if is_local(path) and os.path.islink(path):
        raise CheckpointError(
            f"{path} is a symbolic link: a checkpoint is read from its own folder only; give the path that it leads to"
        )
    return path


def items_of(path: epath.Path) -> list[str]:
    """The names of a step's items that hold trees."""
    return sorted(
        child.name
        for child in path.iterdir()
        if child.is_dir() and (child / METADATA_FILE).exists()
    )


def _metadata(folder: Folder) -> tuple[bytes, Mapping[str, Any], str]:
    """The metadata of a tree as bytes and as JSON, and its file for messages."""
    raw = file_bytes(folder, METADATA_FILE, _MAX_METADATA_BYTES)
    where = f"{folder.path / METADATA_FILE}"
    return raw, load_json(raw, where), where


def _entries(
    tree: Mapping[str, Any], folder: Folder, where: str
) -> tuple[list[Path], dict[Path, Constant]]:
    """Paths of the arrays, and what is no array."""
    described = tree.get("tree_metadata")
    if not isinstance(described, dict):
        raise CheckpointError(f"{where}: tree_metadata is {show(described)}, wanted leaves by name")
    leaves: list[Path] = []
    constants: dict[Path, Constant] = {}
    strings: Mapping[str, Any] | None = None
    for name, entry in described.items():
        try:
            path = tuple(map(_key, entry["key_metadata"]))
            kind = entry["value_metadata"]["value_type"]
            if not path:
                raise ValueError("no keys")
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(
                f"{where}: leaf {show(name)} is described by {show(entry)}, wanted its keys and a value_type"
            ) from None
        if not isinstance(kind, str):
            raise CheckpointError(f"{where}: leaf {show(name)} has the value_type {show(kind)}")
        if kind in _EMPTY:
            constants[path] = _EMPTY[kind]
        elif kind == "NamedTuple":
            constants[path] = None  # as Orbax restores it
        elif kind == "string":
            strings = _strings(folder) if strings is None else strings
            if stored_name(path) not in strings:
                raise CheckpointError(f"{where}: {show(name)} is a string that no file holds")
            constants[path] = strings[stored_name(path)]
        else:
            leaves.append(path)
    return leaves, constants


def _key(described: Mapping[str, Any]) -> str | int:
    key, kind = described["key"], described["key_type"]
    if not isinstance(key, str) or kind not in (_SEQUENCE, _DICT):
        raise ValueError("no key")
    if kind == _DICT:
        return key
    if not re.fullmatch(r"0|[1-9][0-9]{0,8}", key):
        raise ValueError("no place in a list")
    return int(key)


def _strings(folder: Folder) -> Mapping[str, Any]:
    if _STRINGS_FILE not in folder.files:
        raise CheckpointError(f"{folder.path} has strings in its tree, but no {_STRINGS_FILE}")
    raw = file_bytes(folder, _STRINGS_FILE, _MAX_METADATA_BYTES)
    return load_json(raw, f"{folder.path / _STRINGS_FILE}")


def _open_arrays(
    leaves: list[Path], folder: Folder, *, may_lack_chunks: bool, context: zarr.Context
) -> dict[Path, zarr.Array]:
    in_database = ocdbt.MANIFEST in folder.files
    if in_database:
        blobs: Mapping[str, Blob] = ocdbt.entries(folder)
    else:
        if any(name.startswith("ocdbt.process_") for name in folder.files):
            raise CheckpointError(
                f"{folder.path} has databases of processes but none that joins them: the checkpoint is unfinished"
            )
        blobs = {name: Blob(found.size, name) for name, found in folder.files.items()}
    by_array = group(blobs)
    arrays = {}
    for path in leaves:
        name = stored_name(path)
        if name not in by_array or "/" in name:
            raise CheckpointError(
                f"{folder.path}: leaf {show(name_of(path))} is in {METADATA_FILE}, but no array of that name is stored"
            )
        arrays[path] = zarr.Array(
            folder,
            name,
            by_array[name],
            in_database=in_database,
            may_lack_chunks=may_lack_chunks,
            context=context,
        )
    return arrays


def group(blobs: Mapping[str, Blob]) -> dict[str, dict[str, Blob]]:
    """Blobs by array, and by what comes behind the array's name."""
    found: dict[str, dict[str, Blob]] = {}
    for key, blob in blobs.items():
        array, slash, below = key.partition("/")
        if slash:
            found.setdefault(array, {})[below] = blob
    return found


# --- Writing ------------------------------------------------------------------------------------

STORAGES = ("ocdbt", "zarr", "zarr3")


def plan(
    specs: Mapping[str, LeafSpec],
    *,
    like: TreeReader | None = None,
    optimizer_state: str = "drop",
    params_path: str | None = None,
    extra: Mapping[str, LeafSpec] | None = None,
) -> Tree:
    """The tree that `Writer` writes; arguments and errors as of `plan_tree`."""
    tree = plan_tree(
        specs, like=like, optimizer_state=optimizer_state, params_path=params_path, extra=extra
    )
    for path, value in tree.constants.items():
        if _kind(value) is None:
            raise ValueError(
                f"{name_of(path)} of the base is {show(value)} and no array, which Orbax does not store; use"
                " OPTIMIZER_STATE='drop'"
            )
    return tree


class Writer(TreeWriter):
    """An Orbax checkpoint being written; see `TreeWriter` for the arguments, and the module there for several processes.

    Args:
      storage: "ocdbt" (one database, Orbax's default), "zarr" or "zarr3" (a folder for each array). Chunks are not
        compressed, so that they can be read by range.
      item: name of a folder for the tree in a step's folder; "" for a bare tree.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        specs: Mapping[str, LeafSpec],
        *,
        like: TreeReader | None = None,
        optimizer_state: str = "drop",
        params_path: str | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        storage: str = "ocdbt",
        item: str = "",
        process_index: int = 0,
        process_count: int = 1,
        is_resumed: bool = False,
        extra: Mapping[str, np.ndarray] | None = None,
    ):
        if storage not in STORAGES:
            raise ValueError(f"storage is {storage!r}, wanted one of {STORAGES}")
        self._item, self._storage = item, storage
        self._tree = epath.Path(folder) / item if item else epath.Path(folder)
        database = self._tree / f"ocdbt.process_{process_index}"
        tree = plan(
            specs,
            like=like,
            optimizer_state=optimizer_state,
            params_path=params_path,
            extra=specs_of(extra or {}),
        )
        super().__init__(
            folder,
            specs,
            tree,
            like=like,
            chunk_bytes=chunk_bytes,
            process_index=process_index,
            process_count=process_count,
            store=DatabaseStore(database) if storage == "ocdbt" else FolderStore(self._tree),
            version=3 if storage == "zarr3" else 2,
            is_resumed=is_resumed,
            extra=extra,
        )

    def _begin(self, leaf: Leaf) -> Assembler:
        chunk = chunk_shape(leaf.spec, self._chunk_bytes)
        return assembler(self._store, leaf, chunk, version=self._version)

    def _made_last(self) -> list[epath.Path]:
        in_tree = (METADATA_FILE, _STRINGS_FILE, _COMMITTED_FILE, ocdbt.MANIFEST, "d")
        return [self._tree / name for name in in_tree] + [
            self._folder / name for name in (STEP_FILE, _COMMITTED_FILE)
        ]

    def _finish(self) -> None:
        self._tree.mkdir(parents=True, exist_ok=True)
        if self._storage == "ocdbt":
            self._join()
        strings = {stored_name(p): v for p, v in self.tree.constants.items() if isinstance(v, str)}
        if strings:
            put_file(self._tree / _STRINGS_FILE, json.dumps(strings).encode())
        put_file(self._tree / METADATA_FILE, json.dumps(self._metadata()).encode())
        if self._item:
            put_file(self._tree / _COMMITTED_FILE, b"")
        put_file(self._folder / STEP_FILE, json.dumps(self._step_metadata()).encode())
        put_file(self._folder / _COMMITTED_FILE, b"")
        sync_tree(self._tree / "d")
        for folder in dict.fromkeys((self._tree, self._folder)):
            sync_folder(folder)

    def _join(self) -> None:
        """One database that refers to those of all processes, whose files stay where they are."""
        import tensorstore as ts

        with naming(self._tree / ocdbt.MANIFEST):
            base = {"driver": "ocdbt", "base": ocdbt.kvstore(str(self._tree))}
            context = ts.Context()  # one for all: values are referred to only within one
            joined = ts.KvStore.open(base, context=context).result()
            transaction = ts.Transaction(atomic=True)
            for process in sorted(self._tree.glob("ocdbt.process_*")):
                base = {"driver": "ocdbt", "base": ocdbt.kvstore(str(process))}
                one = ts.KvStore.open(base, context=context).result()
                one.experimental_copy_range_to(joined.with_transaction(transaction)).result()
            transaction.commit_async().result()

    def _metadata(self) -> dict[str, Any]:
        kinds: dict[Path, str] = {leaf.path: "np.ndarray" for leaf in self._leaves.values()}
        kinds |= {path: _kind(value) for path, value in self.tree.constants.items()}
        return {
            "tree_metadata": {
                str(tuple(map(str, path))): {
                    "key_metadata": [
                        {"key": str(key), "key_type": _SEQUENCE if isinstance(key, int) else _DICT}
                        for key in path
                    ],
                    "value_metadata": {
                        "value_type": kinds[path],
                        "skip_deserialize": kinds[path] in _EMPTY,
                    },
                }
                for path in _in_tree_order(list(kinds))
            },
            "use_ocdbt": self._storage == "ocdbt",
            "use_zarr3": self._storage == "zarr3",
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }

    def _step_metadata(self) -> dict[str, Any]:
        now = time.time_ns()
        return {
            "item_handlers": {self._item: _HANDLER} if self._item else _HANDLER,
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": now,
            "commit_timestamp_nsecs": now,
            "custom_metadata": {},
        }


def _kind(value: Constant) -> str | None:
    """What Orbax calls a value that is no array; None for one that it has no name for."""
    if isinstance(value, str):
        return "string"
    return next((kind for kind, empty in _EMPTY.items() if type(empty) is type(value)), None)


def _in_tree_order(paths: list[Path], depth: int = 0) -> list[Path]:
    """Paths with the same first keys together, and places of lists ascending, as Orbax builds its lists."""
    by_key: dict[str | int, list[Path]] = {}
    for path in paths:
        if len(path) == depth:
            return [path]
        by_key.setdefault(path[depth], []).append(path)
    keys = sorted(by_key) if all(isinstance(key, int) for key in by_key) else list(by_key)
    return [path for key in keys for path in _in_tree_order(by_key[key], depth + 1)]
