"""Writes a tree of arrays in chunks: what the writers of Orbax and T5X have in common.

What it promises: boxes in any order, from several threads, put together into whole chunks (`boxes.Assembler`, whose memory
`boxes.held_bytes` tells from specs alone); nothing that a reader would take for a checkpoint before `commit`; all of it on
disk after that.

Several processes write one checkpoint, each its own leaves. The caller sees to it that the folder exists before any writer
is made, that all other processes have returned from `commit` before the main one (index 0) calls it, since it puts together
what they wrote, and that the folder is renamed or read only after that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from merging.checkpoints import boxes
from merging.checkpoints.format import CheckpointError, Index, LeafSpec
from merging.checkpoints.ocdbt import MANIFEST, kvstore
from merging.checkpoints.safetensors_header import show
from merging.checkpoints.storage import is_local
from merging.checkpoints.trees import (
    Constant,
    Path,
    TreeReader,
    check_paths,
    name_of,
    of_name,
    stored_name,
)

# Orbax's readers open a chunk each in parallel, ours read by range: large enough for a disk or bucket at full speed, small
# enough that many are in flight.
CHUNK_BYTES = 32 << 20
# Elements of a box in which what is not merged is copied.
_COPIED_ELEMENTS = 1 << 19

OPTIMIZER_STATES = ("drop", "base")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array of the tree: `spec` by its name from the root."""

    path: Path
    spec: LeafSpec

    @property
    def stored(self) -> str:
        return stored_name(self.path)


class TreeWriter:
    """A checkpoint being written into a staging folder, which the caller renames when all is done.

    Args:
      folder: exists; only this writer's own files are made or removed in it.
      specs: the parameters in storage order.
      like: the base, whose tree the output takes over: which keys are places in lists, what is no array, and where the
        parameters are. None: all keys are those of dictionaries.
      optimizer_state: "base" copies what `like` holds beside the parameters (a share by each process, in `commit`);
        "drop" leaves it out.
      params_path: where the parameters go, keys joined by `/`; default as in `like`, or the root.
      chunk_bytes: of a stored chunk, at most.
      process_index, process_count: of this process among those that write. 0 is the main one.
      extra: small arrays by name from the root, written by the main process.

    Raises ValueError for names, dtypes or choices that the format can't hold, before anything is written.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        specs: Mapping[str, LeafSpec],
        *,
        like: TreeReader | None,
        optimizer_state: str,
        params_path: str | None,
        chunk_bytes: int,
        process_index: int,
        process_count: int,
        extra: Mapping[str, np.ndarray] | None = None,
    ):
        if optimizer_state not in OPTIMIZER_STATES:
            raise ValueError(
                f"optimizer_state is {optimizer_state!r}, wanted one of {OPTIMIZER_STATES}"
            )
        if optimizer_state == "base" and like is None:
            raise ValueError("optimizer_state='base' needs a base that is a tree (Orbax or T5X)")
        assert 0 <= process_index < process_count
        self._folder = epath.Path(folder)
        self._specs = dict(specs)
        self._chunk_bytes = chunk_bytes
        self.is_main = process_index == 0
        self._like = like
        self._params = (
            (like.structure.params_path if like else "") if params_path is None else params_path
        )
        rest = dict(like.rest) if like is not None and optimizer_state == "base" else {}
        self._extra = {name: np.asarray(a) for name, a in (extra or {}).items() if name not in rest}
        everything = {self._rooted(name): spec for name, spec in specs.items()} | rest
        everything |= {
            name: LeafSpec(name=name, shape=a.shape, dtype=a.dtype)
            for name, a in self._extra.items()
        }
        self._leaves = {
            name: Leaf(self._path(name), dataclasses.replace(spec, name=name))
            for name, spec in everything.items()
        }
        self._constants = self._carried_constants(optimizer_state)
        try:
            check_paths((leaf.path for leaf in self._leaves.values()), self._folder)
        except CheckpointError as error:
            raise ValueError(str(error)) from None
        self.names_mine = _share(specs, process_index, process_count, self._is_small)
        self._rest_mine = [n for i, n in enumerate(rest) if i % process_count == process_index]
        self._assemblers: dict[str, boxes.Assembler] = {}
        self._lock = threading.Lock()  # guards _assemblers
        self._done: set[str] = set()

    @property
    def leaf_names(self) -> list[str]:
        """Of all arrays of the tree, by their names from the root."""
        return list(self._leaves)

    def write(self, name: str, index: Index, array: np.ndarray) -> None:
        """Stores a box, [*box] in the leaf's dtype: one of `names_mine`. See `format.Writer` for the order."""
        assert name in self.names_mine, f"{name} is not a leaf of this process's"
        self._put(self._rooted(name), index, array)

    def commit(self) -> None:
        """All this process wrote is on disk; if it is the main one, the checkpoint is there. See the module on order."""
        for name in self._rest_mine:
            for index in self._boxes(name):
                self._put(name, index, self._like.read_rest(name, index))
        mine = [self._rooted(name) for name in self.names_mine] + self._rest_mine
        if self.is_main:
            for name, array in self._extra.items():
                self._put(name, boxes.whole(array.shape), array)
            mine += self._extra
        for name in mine:
            if not self._leaves[name].spec.size and name not in self._done:
                shape = self._leaves[name].spec.shape
                self._put(name, boxes.whole(shape), np.empty(shape, self._leaves[name].spec.dtype))
        wanting = [name for name in mine if name not in self._done]
        assert not wanting, f"commit before these leaves were written whole: {show(wanting)}"
        self._flush()
        if self.is_main:
            self._finish()

    def abort(self) -> None:
        """Removes what this writer wrote."""
        raise NotImplementedError

    # ---- what a format adds ----------------------------------------------------------------------------------------

    def _is_small(self, spec: LeafSpec) -> bool:
        """Whether the main process keeps a leaf to write it with the metadata."""
        return False

    def _begin(self, leaf: Leaf) -> boxes.Assembler:
        """What takes a leaf's boxes."""
        raise NotImplementedError

    def _flush(self) -> None:
        """Puts on disk what this process wrote."""
        raise NotImplementedError

    def _finish(self) -> None:
        """Makes a checkpoint of what all processes wrote; main process only."""
        raise NotImplementedError

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _put(self, name: str, index: Index, array: np.ndarray) -> None:
        with self._lock:
            if name not in self._assemblers:
                assert name not in self._done, f"{name}: elements came twice"
                self._assemblers[name] = self._begin(self._leaves[name])
            assembler = self._assemblers[name]
        assembler.put(index, array)
        with self._lock:
            if assembler.is_done and name not in self._done:
                self._done.add(name)
                del self._assemblers[name]

    def _boxes(self, name: str) -> Iterator[Index]:
        return boxes.row_boxes(self._leaves[name].spec.shape, _COPIED_ELEMENTS)

    def _rooted(self, name: str) -> str:
        return f"{self._params}/{name}" if self._params else name

    def _path(self, name: str) -> Path:
        """The path of a leaf by its name from the root: as the base has it, else keys of dictionaries."""
        if self._like is None:
            return of_name(name)
        known = self._like.structure.paths
        if name in known:
            return known[name]
        theirs = self._like.structure.params_path
        inside = name.removeprefix(f"{self._params}/") if self._params else name
        path = known.get(f"{theirs}/{inside}" if theirs else inside)
        if path is None:
            return of_name(name)
        ours = of_name(self._params) if self._params else ()
        return ours + path[len(of_name(theirs)) if theirs else 0 :]

    def _carried_constants(self, optimizer_state: str) -> dict[Path, Constant]:
        if self._like is None:
            return {}
        structure = self._like.structure
        theirs = structure.params_path
        depth = len(of_name(theirs)) if theirs else 0
        ours = of_name(self._params) if self._params else ()
        carried = {}
        for path, value in structure.constants.items():
            if name_of(path[:depth]) == theirs:
                carried[ours + path[depth:]] = value
            elif optimizer_state == "base":
                carried[path] = value
        return carried


def _share(specs: Mapping[str, LeafSpec], index: int, count: int, is_small: Any) -> list[str]:
    """The leaves of one process: runs in storage order of about as many bytes each; small ones are the main one's."""
    total = sum(spec.nbytes for spec in specs.values())
    before, mine = 0, []
    for name, spec in specs.items():
        owner = 0 if is_small(spec) or not total else min(count - 1, before * count // total)
        before += spec.nbytes
        if owner == index:
            mine.append(name)
    return mine


class ChunkStore:
    """Where arrays in chunks are put by tensorstore: a folder, or an OCDBT database in a folder.

    Args:
      folder: exists or is made.
      is_database: an OCDBT database; else a folder for each array.
    """

    def __init__(self, folder: epath.PathLike, *, is_database: bool):
        self.folder = epath.Path(folder)
        self._is_database = is_database
        self._made: Any = None
        self._lock = threading.Lock()

    def assembler(
        self, leaf: Leaf, chunk_bytes: int, metadata: Any, driver: str = "zarr"
    ) -> boxes.Assembler:
        """Creates an array and returns what takes its boxes. `metadata`: (spec, chunk shape) -> what it shall say."""
        import tensorstore as ts

        chunk = boxes.chunk_shape(leaf.spec, chunk_bytes)
        base = kvstore(str(self.folder))
        store = (
            {"driver": "ocdbt", "base": base, "path": f"{leaf.stored}/"}
            if self._is_database
            else {**base, "path": f"{base['path']}{leaf.stored}/"}
        )
        spec = {
            "driver": driver,
            "kvstore": store,
            "metadata": metadata(leaf.spec, chunk),
            "store_data_equal_to_fill_value": True,
        }
        with self.naming(leaf.stored):
            array = ts.open(spec, create=True, open=False, context=self.context()).result()

        def emit(index: Index, data: np.ndarray) -> None:
            with self.naming(leaf.stored):
                array[index].write(data).result()

        return boxes.Assembler(leaf.spec, chunk, emit)

    def context(self) -> Any:
        """tensorstore's. Files are synced at the end, all at once: one at a time the disk would wait for each."""
        import tensorstore as ts

        with self._lock:
            if self._made is None:
                self._made = ts.Context({"file_io_sync": False})
            return self._made

    @contextlib.contextmanager
    def naming(self, array: str) -> Iterator[None]:
        """tensorstore's errors as those of the file system."""
        try:
            yield
        except ValueError as error:
            number = errno.ENOSPC if "No space left" in str(error) else errno.EIO
            raise OSError(number, str(error), os.fspath(self.folder / array)) from None


def put_file(path: epath.Path, content: bytes) -> None:
    """A small file, whole, on disk."""
    with path.open("wb") as handle:
        handle.write(content)
        if is_local(path):
            handle.flush()
            os.fsync(handle.fileno())


def sync_tree(folder: epath.Path) -> None:
    """All files and folders below, and the folder itself, are on a local disk when it returns."""
    if not is_local(folder):
        return
    for place, _, files in os.walk(folder):
        for file in files:
            _sync(os.path.join(place, file))
        _sync(place)


def sync_folder(folder: epath.Path) -> None:
    """The names of what lies in a folder, and the manifest of a database there, are on a local disk when it returns."""
    if is_local(folder):
        for path in (folder / MANIFEST, folder):
            if path.exists():
                _sync(os.fspath(path))


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: epath.Path) -> None:
    """Removes a file or a folder, where there is one."""
    if path.is_dir():
        shutil.rmtree(path) if is_local(path) else path.rmtree()
    else:
        path.unlink(missing_ok=True)
