"""Hugging Face checkpoints: a folder of safetensors files, or one such file.

What it promises. Reading: a file is taken only if its header says where every byte of it belongs,
and all that is wrong is told before any array is read; `read` touches the bytes of the box and no
others. Writing: shards and index as `transformers` writes them, in one sequential pass without a
copy of the arrays, synced to disk while others compute, with checksums.

Format: https://github.com/huggingface/safetensors#format (see `safetensors_header.py`); what lies
beside the arrays is in `huggingface.py`. What it leaves out: quantised and complex types,
big-endian hosts, and the rename that makes a written folder visible (the caller's).
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import BinaryIO

import numpy as np
from crc32c import crc32c
from etils import epath

from merging.checkpoints.format import CheckpointError, Index, LeafSpec
from merging.checkpoints.huggingface import (
    INDEX_FILE,
    carried_files,
    find_weights,
    index_json,
    shard_names,
)
from merging.checkpoints.safetensors_header import build_header, read_header, refuse, show
from merging.checkpoints.storage import ByteSource, is_local, start_writeback

assert sys.byteorder == "little", "safetensors data are little-endian, and so must the host be"


class Reader:
    """A checkpoint in safetensors files, open for reading. Thread-safe.

    Args:
      path: a Hugging Face folder (`model.safetensors`, or an index and its shards, or exactly one
        file of another name ending in .safetensors), or one file.

    Attributes:
      location: the path, for messages.
      folder: the folder, whose config and tokenizer belong to the weights; None where `path` is a
        file, which may lie anywhere.

    Raises CheckpointError where the path, the index or a file isn't as the format says.
    """

    def __init__(self, path: epath.PathLike):
        path = epath.Path(path)
        self.location = os.fspath(path)
        self.folder = path if path.is_dir() else None
        self._stored: dict[str, _Stored] = {}
        self._digest = hashlib.sha256()
        with contextlib.ExitStack() as sources:
            if self.folder is None:
                self._open(path, sources)
            else:
                files, weight_map = find_weights(path)
                for file in files:
                    self._open(path / file, sources)
                if weight_map is not None:
                    self._check_index(weight_map)
            self._sources = sources.pop_all()

    def specs(self) -> Mapping[str, LeafSpec]:
        """All leaves, by the names of their files and then by offset; known since the opening."""
        return {name: stored.spec for name, stored in self._stored.items()}

    def read(self, name: str, index: Index, *, out: np.ndarray | None = None) -> np.ndarray:
        """The box `index` of a leaf, [*box] in the leaf's dtype; one read per contiguous run.

        `out`, where given, is C-contiguous [*box] of that dtype, receives the box and is returned.
        Raises CheckpointError, with file and leaf, where the file is not the one that was opened.
        """
        stored = self._get(name)
        spec = stored.spec
        box = _box_shape(spec, index)
        if out is None:
            out = np.empty(box, spec.dtype)
        elif (out.shape, out.dtype) != (box, spec.dtype) or not out.flags.c_contiguous:
            raise ValueError(
                f"{name}: out is {out.dtype}{list(out.shape)}, C-contiguous: "
                f"{out.flags.c_contiguous}; wanted {spec.dtype}{list(box)}, C-contiguous"
            )
        if not out.size:
            return out
        buffer = memoryview(_bytes_of(out))
        run, starts = _runs(spec.shape, index)
        run_bytes = run * spec.dtype.itemsize
        try:
            for position, start in enumerate(starts):
                piece = buffer[position * run_bytes : (position + 1) * run_bytes]
                stored.source.read_into(stored.offset + start * spec.dtype.itemsize, piece)
        except CheckpointError as error:
            raise CheckpointError(f"leaf {name}: {error}") from None
        return out

    def digest(self) -> str:
        """sha256 hex digest of each file's name, size (bytes), mtime (ns) and raw header."""
        return self._digest.hexdigest()

    def file_of(self, name: str) -> str:
        """The name of the file (without folder) that holds a leaf."""
        return self._get(name).source.path.name

    def check_unchanged(self) -> None:
        """Raises CheckpointError unless every file is the one that was opened."""
        for source in dict.fromkeys(stored.source for stored in self._stored.values()):
            source.check_unchanged()

    def close(self) -> None:
        """Closes all files. Safe to call twice."""
        self._sources.close()

    def _get(self, name: str) -> _Stored:
        assert name in self._stored, f"{self.location} has no leaf {name!r}; ask specs() for names"
        return self._stored[name]

    def _open(self, path: epath.Path, sources: contextlib.ExitStack) -> None:
        """Adds the leaves of one file, after checking its header."""
        source = ByteSource(path)
        sources.callback(source.close)
        header = read_header(source)
        refuse(
            path,
            [
                f"leaf {show(name)} is also in {self.file_of(name)}"
                for name in header.specs
                if name in self._stored
            ],
            "a leaf may be in one shard only: write the checkpoint again",
        )
        for name, spec in header.specs.items():
            self._stored[name] = _Stored(spec, source, header.offsets[name])
        # The header by its own digest, so that fields can't run into one another.
        digest = hashlib.sha256(header.raw).hexdigest()
        identity = [path.name, source.size, source.mtime_ns, digest]
        self._digest.update(json.dumps(identity).encode())

    def _check_index(self, weight_map: Mapping[str, str]) -> None:
        """Every leaf must be in the shard that the index names, and none anywhere else."""
        problems = []
        for name, file in weight_map.items():
            if name not in self._stored:
                problems.append(f"leaf {show(name)} should be in {file}, which does not hold it")
            elif self.file_of(name) != file:
                found = self.file_of(name)
                problems.append(f"leaf {show(name)} should be in {file}, but is in {found}")
        problems += [
            f"leaf {show(name)} of {self.file_of(name)} is not in the index"
            for name in self._stored
            if name not in weight_map
        ]
        refuse(
            self.folder / INDEX_FILE,
            problems,
            "index and shards are of different checkpoints: fetch or write both again",
        )


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A leaf in a file; `offset` is of its first byte, from the beginning of the file."""

    spec: LeafSpec
    source: ByteSource
    offset: int


# --- Boxes --------------------------------------------------------------------------------------


def _box_shape(spec: LeafSpec, index: Index) -> tuple[int, ...]:
    """The shape of a box, after checking that it is one of this leaf."""
    assert len(index) == len(spec.shape) and all(
        part.step in (None, 1) and 0 <= part.start <= part.stop <= size
        for part, size in zip(index, spec.shape, strict=True)
    ), f"{spec.name}: {index} is no box of shape {spec.shape}"
    return tuple(part.stop - part.start for part in index)


def _runs(shape: tuple[int, ...], index: Index) -> tuple[int, Iterator[int]]:
    """Length of the contiguous runs of a box, and where each starts; in elements, C order."""
    run, inner = 1, len(shape)
    # Trailing dimensions taken whole join into one run; the first one taken in part ends it.
    while inner:
        inner -= 1
        length = index[inner].stop - index[inner].start
        run *= length
        if length != shape[inner]:
            break
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    first = sum(part.start * stride for part, stride in zip(index, strides, strict=True))
    outer = [
        range(0, (part.stop - part.start) * stride, stride)
        for part, stride in zip(index[:inner], strides[:inner], strict=True)
    ]
    return run, (first + sum(steps) for steps in itertools.product(*outer))


def _bytes_of(array: np.ndarray) -> np.ndarray:
    """[n] uint8 view of a C-contiguous array (bfloat16 has no buffer of its own)."""
    return array.reshape(-1).view(np.uint8)


# --- Writing ------------------------------------------------------------------------------------

# Bytes after which a local disk is told to begin writing them. Left alone, Linux keeps up to a tenth of memory dirty and
# then stalls the writer, or commit, for all of it. Smaller: more calls for nothing. Larger: longer bursts, for which
# the next writes wait (64 MiB: four times as long as 16), and the last, which nothing overlaps, grows.
_WRITEBACK_BYTES = 16 << 20
# Bytes checksummed and written at a time: still in the core's cache for the second checksum and the
# write.
_CHUNK_BYTES = 1 << 20

_METADATA = types.MappingProxyType({"format": "pt"})  # transformers refuses a file without it


def plan_shards(specs: Mapping[str, LeafSpec], shard_bytes: int) -> list[list[str]]:
    """Names per shard: greedy, in order; a leaf larger than `shard_bytes` has a shard to itself."""
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes is {shard_bytes}, wanted a positive number of bytes")
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.nbytes
    return shards


class Writer:
    """A checkpoint being written into a staging folder, which the caller renames when all is done.

    Args:
      folder: exists; only this writer's own files are made or removed in it.
      specs: all leaves in the order in which their boxes will arrive.
      shard_bytes: of data per file, see `plan_shards`.
      carry_from: a Hugging Face folder whose config and tokenizer files go along.
      metadata: strings for each header.
      shards_mine: which shards of the plan this process writes (default all).
      is_main: whether this process writes the index and the carried files.
      config_dtype: what config.json shall say of the weights' type ("bfloat16"); None leaves it.

    Attributes:
      shards: names per shard, all of them.
      checksums: crc32c per leaf written by this process, complete after `commit`.
      files: {file: {"bytes", "crc32c" (8 hex digits)}} of every file this process wrote.

    Raises ValueError for a leaf that the format can't hold, CheckpointError for a config that can't
    be carried, both before anything is written. OSErrors name the file.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        specs: Mapping[str, LeafSpec],
        *,
        shard_bytes: int,
        carry_from: epath.PathLike | None = None,
        metadata: Mapping[str, str] = _METADATA,
        shards_mine: Sequence[int] | None = None,
        is_main: bool = True,
        config_dtype: str | None = None,
    ):
        self._folder = epath.Path(folder)
        self._specs = specs
        self._is_main = is_main
        self.shards = plan_shards(specs, shard_bytes)
        self.checksums: dict[str, int] = {}
        self.files: dict[str, dict[str, int | str]] = {}
        names = shard_names(len(self.shards))
        mine = range(len(self.shards)) if shards_mine is None else sorted(set(shards_mine))
        assert all(0 <= i < len(names) for i in mine), f"shards {mine} of {len(names)}"
        shards = {
            _File(self._folder / names[i]): [specs[name] for name in self.shards[i]] for i in mine
        }
        self._heads = {file: build_header(leaves, metadata) for file, leaves in shards.items()}
        self._leaves = [(file, spec) for file, leaves in shards.items() for spec in leaves]
        self._carried = carried_files(carry_from, config_dtype) if is_main else {}
        self._at = 0  # the leaf whose turn it is
        self._filled = 0  # elements of it written
        self._crc = 0  # of those
        self._opened: list[_File] = []
        # One worker: the disk is one. Its errors surface at the next write or commit.
        self._disk = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="disk")
        self._tasks: collections.deque[concurrent.futures.Future[None]] = collections.deque()

    @property
    def names_mine(self) -> list[str]:
        """The leaves that this process writes, in the order in which it wants them."""
        return [spec.name for _, spec in self._leaves]

    def write(self, name: str, index: Index, array: np.ndarray) -> None:
        """Appends a box, [*box] in the leaf's dtype. One thread; see `format.Writer` for the order.

        A leaf without elements may be written or left out.
        """
        self._raise_disk_errors()
        self._skip_empty(until=name)
        assert self._at < len(self._leaves), f"{name} came after all leaves of this writer"
        file, spec = self._leaves[self._at]
        assert name == spec.name, (
            f"{name} came out of order: it is the turn of {spec.name}, of which {self._filled} of "
            f"{spec.size} elements are written"
        )
        box = _box_shape(spec, index)
        if (array.shape, array.dtype) != (box, spec.dtype):
            raise ValueError(
                f"{name}: got {array.dtype}{list(array.shape)}, wanted {spec.dtype}{list(box)}"
            )
        if array.size:
            run, starts = _runs(spec.shape, index)
            assert run == array.size and next(starts) == self._filled, (
                f"{name}: box {index} is not what follows the first {self._filled} elements of "
                f"shape {spec.shape}"
            )
            self._append(file, _bytes_of(np.ascontiguousarray(array)))
            self._filled += array.size
        if self._filled == spec.size:
            self._end_leaf()

    def commit(self) -> None:
        """Files and folder are on disk when it returns, index and carried files among them."""
        self._skip_empty(until=None)
        missing = [spec.name for _, spec in self._leaves[self._at :]]
        assert not missing, f"commit before these leaves were written whole: {show(missing)}"
        for file in self._heads:
            self._close(file)
        self._disk.shutdown(wait=True)
        self._raise_disk_errors()
        if self._is_main:
            if len(self.shards) > 1:
                self._put(INDEX_FILE, index_json(self.shards, self._specs))
            for name, content in self._carried.items():
                self._put(name, content if isinstance(content, bytes) else content.read_bytes())
        if is_local(self._folder):
            _sync_folder(self._folder)

    def abort(self) -> None:
        """Removes the files of this writer. Raises nothing for a disk that already failed."""
        self._disk.shutdown(wait=True, cancel_futures=True)
        for file in self._opened:
            file.discard()

    def _append(self, file: _File, data: np.ndarray) -> None:
        """data: [n] uint8, the next bytes of the current leaf."""
        self._open(file)
        for start in range(0, len(data), _CHUNK_BYTES):
            chunk = data[start : start + _CHUNK_BYTES]
            self._crc = crc32c(chunk, self._crc)
            file.append(chunk)
            if file.waiting_bytes >= _WRITEBACK_BYTES:
                file.begin_writeback()

    def _end_leaf(self) -> None:
        file, spec = self._leaves[self._at]
        self.checksums[spec.name] = self._crc
        self._at += 1
        self._filled = self._crc = 0
        if self._at == len(self._leaves) or self._leaves[self._at][0] is not file:
            self._close(file)

    def _skip_empty(self, until: str | None) -> None:
        while self._at < len(self._leaves):
            spec = self._leaves[self._at][1]
            if spec.size or spec.name == until:
                return
            self._end_leaf()

    def _open(self, file: _File) -> None:
        if file not in self._opened:
            self._opened.append(file)
            file.open()
            file.append(np.frombuffer(self._heads[file], np.uint8))

    def _close(self, file: _File) -> None:
        """In the background. A file whose leaves are all empty has only its header."""
        if file.path.name not in self.files:
            self._open(file)
            self.files[file.path.name] = file.summary()
            self._tasks.append(self._disk.submit(file.close))

    def _put(self, name: str, content: bytes) -> None:
        """A small file, whole."""
        file = _File(self._folder / name)
        self._opened.append(file)
        file.open()
        file.append(np.frombuffer(content, np.uint8))
        file.close()
        self.files[name] = file.summary()

    def _raise_disk_errors(self) -> None:
        while self._tasks and self._tasks[0].done():
            self._tasks[0].result()  # a failed one stays: what it lost is not on disk later either
            self._tasks.popleft()


class _File:
    """A file being appended to, with its checksum. Its OSErrors carry its name."""

    def __init__(self, path: epath.Path):
        self.path = path
        self.is_local = is_local(path)
        self.waiting_bytes = 0  # since the disk was last told to write
        self._nbytes = 0
        self._crc = 0
        self._closing = contextlib.ExitStack()
        self._handle: BinaryIO | None = None

    def open(self) -> None:
        with self._naming():
            self._handle = self._closing.enter_context(self.path.open("wb"))

    def append(self, data: np.ndarray) -> None:
        """data: [n] uint8."""
        self._crc = crc32c(data, self._crc)
        with self._naming():
            # TensorFlow's GFile takes nothing but bytes.
            self._handle.write(data if self.is_local else data.tobytes())
        self._nbytes += len(data)
        self.waiting_bytes += len(data)

    def begin_writeback(self) -> None:
        """Has a local disk begin on what waits, without waiting for it; its errors surface when the file is closed."""
        if self.is_local:
            start_writeback(
                self._handle.fileno(), self._nbytes - self.waiting_bytes, self.waiting_bytes
            )
        self.waiting_bytes = 0

    def close(self) -> None:
        with self._naming(), self._closing:
            if self.is_local:
                self._handle.flush()
                os.fsync(self._handle.fileno())

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            self._closing.close()
        self.path.unlink(missing_ok=True)

    def summary(self) -> dict[str, int | str]:
        return {"bytes": self._nbytes, "crc32c": f"{self._crc:08x}"}

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = error.strerror or str(error)
            raise OSError(error.errno, message, os.fspath(self.path)) from error


def _sync_folder(folder: epath.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
