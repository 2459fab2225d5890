"""Writes a tree of arrays in chunks: what the writers of Orbax and T5X have in common.

What it promises: boxes in any order, from several threads, put together into whole chunks (`boxes.Assembler`, whose memory
`boxes.held_bytes` tells from specs alone); nothing that a reader would take for a checkpoint before `commit`; all of it on
disk after that.

Several processes write one checkpoint, each its own leaves. The caller sees to it that the folder exists before any writer
is made, that all other processes have returned from `commit` before the main one (index 0) calls it, since it puts together
what they wrote, and that the folder is renamed or read only after that.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from etils import epath

from merging.checkpoints import boxes, storage, zarr
from merging.checkpoints.checksums import box_text, checksum
from merging.checkpoints.format import CheckpointError, Index, LeafSpec
from merging.checkpoints.huggingface import put_carried
from merging.checkpoints.left import Left
from merging.checkpoints.ocdbt import MANIFEST, kvstore
from merging.checkpoints.safetensors_header import show
from merging.checkpoints.storage import is_local, start_writeback
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
# Bytes after which what goes into a database is committed.
BATCH_BYTES = 32 << 20
# Threads that wait for the disk; most file systems put the waits of several together.
_SYNCING_THREADS = 8
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


@dataclasses.dataclass(frozen=True)
class Tree:
    """A tree to be written, known from headers alone.

    Attributes:
      params_path: where the parameters go, keys joined by `/`; "" is the root.
      leaves: all arrays, by their names from the root.
      rest: what is copied from the base beside the parameters, by the same names.
      extra: what a format adds to that.
      constants: what is no array.
    """

    params_path: str
    leaves: Mapping[str, Leaf]
    rest: Mapping[str, LeafSpec]
    extra: Mapping[str, LeafSpec]
    constants: Mapping[Path, Constant]

    @property
    def beside(self) -> dict[str, LeafSpec]:
        """All that is not parameters."""
        return {**self.rest, **self.extra}

    def rooted(self, name: str) -> str:
        """The name of a parameter from the root."""
        return _rooted(self.params_path, name)


def plan_tree(
    specs: Mapping[str, LeafSpec],
    *,
    like: TreeReader | None,
    optimizer_state: str,
    params_path: str | None,
    extra: Mapping[str, LeafSpec] | None = None,
) -> Tree:
    """The tree that a `TreeWriter` writes; arguments as there, `extra` without what `like` has of it.

    Raises ValueError for names, dtypes and choices that no format of trees can hold.
    """
    if optimizer_state not in OPTIMIZER_STATES:
        raise ValueError(
            f"optimizer_state is {optimizer_state!r}, wanted one of {OPTIMIZER_STATES}"
        )
    if optimizer_state == "base" and like is None:
        raise ValueError(
            "only checkpoints that are trees (Orbax, T5X) hold more than parameters: use OPTIMIZER_STATE='drop'"
        )
    if params_path is None:
        params_path = like.structure.params_path if like else ""
    rest = dict(like.rest) if like is not None and optimizer_state == "base" else {}
    extra = {name: spec for name, spec in (extra or {}).items() if name not in rest}
    everything = {_rooted(params_path, name): spec for name, spec in specs.items()} | rest | extra
    tree = Tree(
        params_path=params_path,
        leaves={
            name: Leaf(_path(name, params_path, like), dataclasses.replace(spec, name=name))
            for name, spec in everything.items()
        },
        rest=rest,
        extra=extra,
        constants=_carried_constants(params_path, like, optimizer_state),
    )
    try:
        check_paths((leaf.path for leaf in tree.leaves.values()), "the tree to be written")
    except CheckpointError as error:
        raise ValueError(str(error)) from None
    for name, leaf in tree.leaves.items():
        if leaf.spec.dtype not in zarr.DTYPES.values():
            raise ValueError(
                f"leaf {name} is {leaf.spec.dtype}, which Orbax and T5X do not store; wanted one of"
                f" {', '.join(zarr.DTYPES)}"
            )
    return tree


class TreeWriter:
    """A checkpoint being written into a staging folder, which the caller renames when all is done.

    Args:
      folder: exists; only this writer's own files are made or removed in it.
      specs: the parameters in storage order.
      tree: what is written, see `plan_tree`.
      like: the base, whose tree the output takes over: which keys are places in lists, what is no array, and where the
        parameters are. None: all keys are those of dictionaries.
      chunk_bytes: of a stored chunk, at most.
      process_index, process_count: of this process among those that write. 0 is the main one.
      version: of zarr.
      is_resumed: chunks that an earlier writer with the same arguments left are gone on with. What is copied beside the
        parameters is copied again.
      extra: the arrays of `tree.extra`, written by the main process.

    Formats also take, for `plan_tree`:
      optimizer_state: "base" copies what `like` holds beside the parameters (a share by each process, in `commit`);
        "drop" leaves it out.
      params_path: where the parameters go, keys joined by `/`; default as in `like`, or the root.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        specs: Mapping[str, LeafSpec],
        tree: Tree,
        *,
        like: TreeReader | None,
        chunk_bytes: int,
        process_index: int,
        process_count: int,
        store: ChunkStore,
        version: int,
        is_resumed: bool,
        extra: Mapping[str, np.ndarray] | None = None,
    ):
        assert 0 <= process_index < process_count
        self._folder = epath.Path(folder)
        self._store = store
        self._chunk_bytes = chunk_bytes
        self.is_main = process_index == 0
        self._like = like
        self.tree = tree
        self.params_path = tree.params_path
        self.checksums_beside: dict[str, dict[str, str]] = {}
        self._leaves = tree.leaves
        self._extra = {name: (extra or {})[name] for name in tree.extra}
        self.names_mine = shares(specs, process_count, self._is_inline)[process_index]
        self._mine = frozenset(self.names_mine)
        owners = (
            0 if self._is_inline(s) else i % process_count for i, s in enumerate(tree.rest.values())
        )
        self._rest_mine = [
            n for n, owner in zip(tree.rest, owners, strict=True) if owner == process_index
        ]
        self._assemblers: dict[str, boxes.Assembler] = {}
        self._lock = threading.Lock()  # guards _assemblers
        self._done: set[str] = set()
        self._version = version
        self._left = store.left() if is_resumed else None
        self._carried: Mapping[str, epath.Path | bytes] = {}

    def carry(self, files: Mapping[str, epath.Path | bytes]) -> None:
        """Small files that the main process puts beside the checkpoint; see `huggingface.carried_files`. Told before `commit`."""
        self._carried = files

    def write(self, name: str, index: Index, array: np.ndarray, *, is_stored: bool = False) -> None:
        """Stores a box, [*box] in the leaf's dtype: one of `names_mine`. See `format.Writer` for the order."""
        assert name in self._mine, f"{name} is not a leaf of this process's"
        self._put(self.tree.rooted(name), index, array, is_stored=is_stored)

    def holds(self, name: str, index: Index) -> bool:
        """Whether an earlier writer left all chunks that a box touches. Those that it was putting together are lost."""
        leaf = self._leaves[self.tree.rooted(name)]
        if self._left is None or self._is_inline(leaf.spec):
            return False
        chunk = boxes.chunk_shape(leaf.spec, self._chunk_bytes)
        return self._left.holds(leaf.stored, leaf.spec, chunk, self._version, index)

    def stored(self, name: str, index: Index) -> np.ndarray:
        """A box as an earlier writer left it; see `format.Writer`."""
        leaf = self._leaves[self.tree.rooted(name)]
        chunk = boxes.chunk_shape(leaf.spec, self._chunk_bytes)
        return self._left.read(leaf.stored, leaf.spec, chunk, self._version, index)

    def commit(self) -> None:
        """All this process wrote is on disk; if it is the main one, the checkpoint is there. See the module on order."""
        for name in self._rest_mine:
            for index in self._boxes(name):
                self._put_beside(name, index, self._like.read_rest(name, index))
        mine = [self.tree.rooted(name) for name in self.names_mine] + self._rest_mine
        if self.is_main:
            for name, array in self._extra.items():
                self._put_beside(name, boxes.whole(array.shape), array)
            mine += self._extra
        for name in mine:
            if not self._leaves[name].spec.size and name not in self._done:
                shape = self._leaves[name].spec.shape
                self._put(name, boxes.whole(shape), np.empty(shape, self._leaves[name].spec.dtype))
        wanting = [name for name in mine if name not in self._done]
        assert not wanting, f"commit before these leaves were written whole: {show(wanting)}"
        self._store.flush()
        if self.is_main:
            for path in self._made_last():
                remove(path)  # of a writer that was killed in here
            put_carried(self._folder, self._carried)
            self._finish()

    def close(self) -> None:
        """Ends without a commit; what is stored stays."""
        self._store.close()

    # ---- what a format adds ----------------------------------------------------------------------------------------

    def _is_inline(self, spec: LeafSpec) -> bool:
        """Whether the main process keeps a leaf to write it with the metadata."""
        return False

    def _begin(self, leaf: Leaf) -> boxes.Assembler:
        """What takes a leaf's boxes."""
        raise NotImplementedError

    def _made_last(self) -> list[epath.Path]:
        """What `_finish` makes."""
        raise NotImplementedError

    def _finish(self) -> None:
        """Makes a checkpoint of what all processes wrote; main process only."""
        raise NotImplementedError

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _put(self, name: str, index: Index, array: np.ndarray, *, is_stored: bool = False) -> None:
        with self._lock:
            if name not in self._assemblers:
                assert name not in self._done, f"{name}: elements came twice"
                self._assemblers[name] = self._begin(self._leaves[name])
            assembler = self._assemblers[name]
        assembler.put(index, array, is_stored=is_stored)
        with self._lock:
            if assembler.is_done and name not in self._done:
                self._done.add(name)
                del self._assemblers[name]

    def _put_beside(self, name: str, index: Index, array: np.ndarray) -> None:
        self.checksums_beside.setdefault(name, {})[box_text(index)] = checksum(array)
        self._put(name, index, array)

    def _boxes(self, name: str) -> Iterator[Index]:
        return boxes.row_boxes(self._leaves[name].spec.shape, _COPIED_ELEMENTS)


def _rooted(params_path: str, name: str) -> str:
    return f"{params_path}/{name}" if params_path else name


def _path(name: str, params_path: str, like: TreeReader | None) -> Path:
    """The path of a leaf by its name from the root: as the base has it, else keys of dictionaries."""
    if like is None:
        return of_name(name)
    known = like.structure.paths
    if name in known:
        return known[name]
    theirs = like.structure.params_path
    inside = name.removeprefix(f"{params_path}/") if params_path else name
    path = known.get(_rooted(theirs, inside))
    if path is None:
        return of_name(name)
    ours = of_name(params_path) if params_path else ()
    return ours + path[len(of_name(theirs)) if theirs else 0 :]


def _carried_constants(
    params_path: str, like: TreeReader | None, optimizer_state: str
) -> dict[Path, Constant]:
    if like is None:
        return {}
    structure = like.structure
    theirs = structure.params_path
    depth = len(of_name(theirs)) if theirs else 0
    ours = of_name(params_path) if params_path else ()
    carried = {}
    for path, value in structure.constants.items():
        if name_of(path[:depth]) == theirs:
            carried[ours + path[depth:]] = value
        elif optimizer_state == "base":
            carried[path] = value
    return carried


def specs_of(arrays: Mapping[str, np.ndarray]) -> dict[str, LeafSpec]:
    """Specs of arrays by name."""
    return {n: LeafSpec(name=n, shape=a.shape, dtype=a.dtype) for n, a in arrays.items()}


def memory_bytes(
    specs: Mapping[str, LeafSpec],
    *,
    chunk_bytes: int = CHUNK_BYTES,
    window_bytes: int,
    threads: int,
    is_database: bool,
) -> int:
    """Bytes that a writer may hold at once, from specs alone; arguments as in `boxes.held_bytes`.

    A database holds a batch that fills and one that is committed, each at most a chunk over its size, which the commit
    writes from where they are.
    """
    largest = boxes.largest_chunk_bytes(specs, chunk_bytes)
    batches = 2 * (BATCH_BYTES + largest) if is_database else 0
    held = boxes.held_bytes(
        specs, chunk_bytes=chunk_bytes, window_bytes=window_bytes, threads=threads
    )
    return held + batches


def shares(
    specs: Mapping[str, LeafSpec], count: int, is_inline: Callable[[LeafSpec], bool]
) -> list[list[str]]:
    """The leaves of each process: runs in storage order of about as many bytes each; inline ones are the main one's."""
    total = sum(spec.nbytes for spec in specs.values())
    before, names = 0, [[] for _ in range(count)]
    for name, spec in specs.items():
        owner = 0 if is_inline(spec) or not total else min(count - 1, before * count // total)
        before += spec.nbytes
        names[owner].append(name)
    return names


@runtime_checkable
class ChunkStore(Protocol):
    """Where the files of arrays are put: (array, name of the file, content). Thread-safe."""

    def put(self, array: str, key: str, value: memoryview) -> None: ...

    def flush(self) -> None:
        """All that was put is on disk. Raises the error of what could not be."""
        ...

    def left(self) -> Left:
        """What an earlier store left here; asked before anything is put."""
        ...

    def close(self) -> None:
        """Ends without a flush; what is stored stays."""
        ...


def assembler(
    store: ChunkStore,
    leaf: Leaf,
    chunk: boxes.Shape,
    *,
    version: int,
    gzip_level: int | None = None,
) -> boxes.Assembler:
    """Begins a new array and returns what takes its boxes."""
    file, content = zarr.metadata_file(version, leaf.spec, chunk, gzip_level)
    store.put(leaf.stored, file, memoryview(content))

    def emit(index: Index, data: np.ndarray) -> None:
        key = zarr.chunk_key(version, index, chunk)
        store.put(leaf.stored, key, zarr.encoded(data, chunk, gzip_level))

    return boxes.Assembler(leaf.spec, chunk, emit)


class FolderStore:
    """A folder for each array. Files are synced by threads of their own, so that nobody waits for the disk."""

    def __init__(self, folder: epath.Path):
        self._folder = folder
        self._made: dict[epath.Path, None] = {}  # folders of arrays, and below them
        self._goes_on = False
        self._lock = threading.Lock()  # guards _made and _syncs
        self._pool = concurrent.futures.ThreadPoolExecutor(_SYNCING_THREADS, "sync")
        self._syncs: collections.deque[concurrent.futures.Future[None]] = collections.deque()

    def put(self, array: str, key: str, value: memoryview) -> None:
        path = self._folder / array / key
        with self._lock:
            if path.parent not in self._made:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._made[path.parent] = None
        with naming(path), path.open("wb") as handle:
            handle.write(value if is_local(path) else bytes(value))
        if is_local(path):
            with self._lock:
                self._syncs.append(self._pool.submit(storage.sync, path))
                done = self._syncs.popleft() if self._syncs[0].done() else None
            if done is not None:
                done.result()

    def flush(self) -> None:
        while self._syncs:
            self._syncs.popleft().result()
        self._pool.shutdown()
        if self._goes_on:  # what is kept may not be on disk yet
            sync_tree(self._folder)
        for folder in self._made:
            sync_folder(folder)
        sync_folder(self._folder)

    def left(self) -> Left:
        self._goes_on = True
        return Left(self._folder, in_database=False)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class DatabaseStore:
    """An OCDBT database in a folder. Values go into it in batches, each one transaction, committed by a thread of its own.

    A transaction holds its values in memory until it is committed, but one for every value would make as many files, and
    as many versions of the tree, as there are values.
    """

    def __init__(self, folder: epath.Path):
        self._folder = folder
        self._lock = threading.Lock()  # guards what follows
        self._store: Any = None
        self._batch: Any = None
        self._batch_bytes = 0
        self._written: set[str] = set()  # files of which the disk was told
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "commit")
        self._commit: concurrent.futures.Future[None] | None = None

    def put(self, array: str, key: str, value: memoryview) -> None:
        import tensorstore as ts

        with self._lock:
            if self._store is None:
                self._store = self._open()
            if self._batch is None:
                self._batch = ts.Transaction()
            self._store.with_transaction(self._batch)[f"{array}/{key}"] = bytes(value)
            self._batch_bytes += len(value)
            if self._batch_bytes >= BATCH_BYTES:
                self._submit()

    def flush(self) -> None:
        with self._lock:
            if self._store is None:
                self._store = (
                    self._open()
                )  # empty, so that the folder is that of a process that wrote
            self._submit()
            self._wait()
        self._pool.shutdown()
        sync_tree(self._folder)

    def left(self) -> Left:
        found = Left(self._folder, in_database=True)
        if found.is_damaged:
            remove(self._folder)  # nothing can be added to it
        return found

    def close(self) -> None:
        self._pool.shutdown()  # after the batch that is being committed
        if self._batch is not None:
            self._batch.abort()

    def _open(self) -> Any:
        import tensorstore as ts

        spec = {"driver": "ocdbt", "base": kvstore(str(self._folder))}
        # Not synced at every commit, for which the next would wait; at the end, when most of it is on disk.
        return ts.KvStore.open(spec, context=ts.Context({"file_io_sync": False})).result()

    def _submit(self) -> None:
        """Hands the batch to the thread that commits, once it is done with the one before."""
        self._wait()
        if self._batch is not None:
            self._commit = self._pool.submit(self._committed, self._batch)
            self._batch, self._batch_bytes = None, 0

    def _committed(self, batch: Any) -> None:
        with naming(self._folder):
            batch.commit_async().result()
        if is_local(self._folder):
            for file in os.scandir(os.fspath(self._folder / "d")):
                if file.name not in self._written:
                    self._written.add(file.name)
                    _begin_writeback(file.path)

    def _wait(self) -> None:
        if self._commit is not None:
            self._commit.result()


@contextlib.contextmanager
def naming(path: epath.Path) -> Iterator[None]:
    """`storage.naming`, of what tensorstore does as well."""
    try:
        with storage.naming(path):
            yield
    except ValueError as error:
        number = errno.ENOSPC if "No space left" in str(error) else errno.EIO
        raise OSError(number, str(error), os.fspath(path)) from None


def sync_tree(folder: epath.Path) -> None:
    """All files and folders below, and the folder itself, are on a local disk when it returns."""
    if not is_local(folder):
        return
    for place, _, files in os.walk(folder):
        for file in files:
            storage.sync(os.path.join(place, file))
        storage.sync(place)


def sync_folder(folder: epath.Path) -> None:
    """The names of what lies in a folder, and the manifest of a database there, are on a local disk when it returns."""
    for path in (folder / MANIFEST, folder):
        if path.exists():
            storage.sync(path)


def _begin_writeback(path: str) -> None:
    with open(path, "rb") as handle:
        start_writeback(handle.fileno(), 0, 0)  # 0 bytes: to the end


def remove(path: epath.Path) -> None:
    """Removes a file or a folder, where there is one."""
    if path.is_dir():
        shutil.rmtree(path) if is_local(path) else path.rmtree()
    else:
        path.unlink(missing_ok=True)
