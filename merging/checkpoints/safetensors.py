"""Hugging Face checkpoints: a folder of safetensors files, or one such file.

What it promises. Reading: a file is taken only if its header says where every byte of it belongs,
and all that is wrong is told before any array is read; `read` touches the bytes of the box and no
others. Writing: shards and index as `transformers` writes them, piece by piece in any order without a
copy of the arrays, synced to disk while others compute.

Format: https://github.com/huggingface/safetensors#format (see `safetensors_header.py`); what lies
beside the arrays is in `huggingface.py`. What it leaves out: quantised and complex types,
big-endian hosts, and the rename that makes a written folder visible (the caller's).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import sys
import threading
import types
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from merging.checkpoints import boxes
from merging.checkpoints.format import CheckpointError, Index, LeafSpec
from merging.checkpoints.huggingface import (
    INDEX_FILE,
    carried_files,
    find_weights,
    index_json,
    put_carried,
    shard_names,
)
from merging.checkpoints.safetensors_header import build_header, read_header, refuse, show
from merging.checkpoints.storage import ByteSink, ByteSource, is_local, put_file, sync
from merging.checkpoints.zarr import read_part

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

    format = "safetensors"

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
        out = boxes.receiver(spec, index, out)
        if not out.size:
            return out
        buffer = boxes.bytes_of(out)
        run, starts = boxes.runs(spec.shape, index)
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


# --- Writing ------------------------------------------------------------------------------------

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


def check(
    specs: Mapping[str, LeafSpec],
    *,
    shard_bytes: int,
    carry_from: epath.PathLike | None = None,
    config_dtype: str | None = None,
) -> None:
    """Raises what `Writer` raises before anything is written; arguments as there."""
    for names in plan_shards(specs, shard_bytes):
        build_header([specs[name] for name in names], _METADATA)
    carried_files(carry_from, config_dtype)


class Writer:
    """A checkpoint being written into a staging folder, which the caller renames when all is done. Thread-safe.

    Args:
      folder: exists; only this writer's own files are made or removed in it.
      specs: all leaves, in the order in which they will lie in the files.
      shard_bytes: of data per file, see `plan_shards`.
      carry_from: a Hugging Face folder whose config and tokenizer files go along.
      metadata: strings for each header.
      shards_mine: which shards of the plan this process writes (default all).
      is_main: whether this process writes the index and the carried files.
      config_dtype: what config.json shall say of the weights' type ("bfloat16"); None leaves it.
      is_resumed: files that an earlier writer with the same arguments left are gone on with.

    Attributes:
      shards: names per shard, all of them.

    Raises ValueError for a leaf that the format can't hold, CheckpointError for a config that can't
    be carried, both before anything is written. OSErrors name the file.
    """

    params_path = None
    checksums_beside: Mapping[str, Mapping[str, str]] = types.MappingProxyType({})

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
        is_resumed: bool = False,
    ):
        self._folder = epath.Path(folder)
        self._specs = specs
        self._is_main = is_main
        self.shards = plan_shards(specs, shard_bytes)
        names = shard_names(len(self.shards))
        mine = range(len(self.shards)) if shards_mine is None else sorted(set(shards_mine))
        assert all(0 <= i < len(names) for i in mine), f"shards {mine} of {len(names)}"
        self._files = [
            _Shard(
                self._folder / names[i],
                [specs[name] for name in self.shards[i]],
                metadata,
                is_resumed=is_resumed,
            )
            for i in mine
        ]
        self._places = {
            name: (shard, offset) for shard in self._files for name, offset in shard.offsets.items()
        }
        self._carried = carried_files(carry_from, config_dtype) if is_main else {}
        # One worker: the disk is one. Its errors surface at the next write or commit.
        self._disk = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="disk")
        self._closing: list[concurrent.futures.Future[None]] = []
        self._lock = threading.Lock()

    @property
    def names_mine(self) -> list[str]:
        """The leaves that this process writes, in the order of the files."""
        return list(self._places)

    def write(self, name: str, index: Index, array: np.ndarray, *, is_stored: bool = False) -> None:
        """Stores a box, [*box] in the leaf's dtype. Any thread, any order (near that of the files is best).

        A leaf without elements may be written or left out. `is_stored` as in `format.Writer`.
        """
        shard, offset = self._places[name]
        spec = self._specs[name]
        boxes.check_written(spec, index, array)
        if not array.size:
            return
        buffer = boxes.bytes_of(np.ascontiguousarray(array))
        run, starts = boxes.runs(spec.shape, index)
        run_bytes = run * spec.dtype.itemsize
        sink = self._opened(shard)
        put = sink.keep if is_stored else sink.write
        for position, start in enumerate(starts):
            put(
                offset + start * spec.dtype.itemsize,
                buffer[position * run_bytes : (position + 1) * run_bytes],
            )
        if sink.nbytes == shard.nbytes:
            self._close(shard)

    def holds(self, name: str, index: Index) -> bool:
        """Whether the file that an earlier writer left reaches to the end of a box."""
        shard, offset = self._places[name]
        spec = self._specs[name]
        strides = (math.prod(spec.shape[axis + 1 :]) for axis in range(len(spec.shape)))
        last = sum((part.stop - 1) * stride for part, stride in zip(index, strides, strict=True))
        return shard.left_bytes >= offset + (last + 1) * spec.dtype.itemsize

    def stored(self, name: str, index: Index) -> np.ndarray:
        """A box as an earlier writer left it; see `format.Writer`."""
        shard, offset = self._places[name]
        spec = self._specs[name]
        sink = self._opened(shard)
        array = boxes.receiver(spec, index, None)
        read_part(
            lambda start, buffer: sink.read_into(offset + start, buffer), spec.shape, index, array
        )
        return array

    def commit(self) -> None:
        """Files and folder are on disk when it returns, index and carried files among them."""
        for shard in self._files:
            sink = self._opened(shard)  # one whose leaves are all empty has only its header
            assert sink.nbytes == shard.nbytes, (
                f"commit with {sink.nbytes} of {shard.nbytes} bytes in {shard.path}"
            )
            self._close(shard)
        self._disk.shutdown(wait=True)
        self._raise_disk_errors()
        if self._is_main:
            if len(self.shards) > 1:
                put_file(self._folder / INDEX_FILE, index_json(self.shards, self._specs))
            put_carried(self._folder, self._carried)
        sync(self._folder)

    def close(self) -> None:
        """Lets go of the files, which stay. Raises nothing for a disk that already failed."""
        self._disk.shutdown(wait=True, cancel_futures=True)
        for shard in self._files:
            if shard.sink:
                shard.sink.abandon()

    def _opened(self, shard: _Shard) -> ByteSink:
        if shard.sink is None or self._closing:
            with self._lock:
                self._raise_disk_errors()
                if shard.sink is None:
                    # Known before its header fails to be written.
                    shard.sink = ByteSink(shard.path, is_kept=shard.left_bytes > 0)
                    put = shard.sink.keep if shard.has_header() else shard.sink.write
                    put(0, memoryview(shard.header))
        return shard.sink

    def _close(self, shard: _Shard) -> None:
        """In the background, once."""
        with self._lock:
            if not shard.is_closing:
                shard.is_closing = True
                self._closing.append(self._disk.submit(shard.sink.close))

    def _raise_disk_errors(self) -> None:
        for task in self._closing:
            if task.done():
                task.result()


class _Shard:
    """One file to be.

    Attributes:
      header: its first bytes.
      offsets: of each leaf's first byte, from the beginning of the file.
      nbytes: of the whole file.
      left_bytes: of what an earlier writer left; 0 where that is nothing, or can't be gone on with.
    """

    def __init__(
        self,
        path: epath.Path,
        leaves: Sequence[LeafSpec],
        metadata: Mapping[str, str],
        *,
        is_resumed: bool,
    ):
        self.path = path
        self.header = build_header(leaves, metadata)
        self.offsets: dict[str, int] = {}
        self.nbytes = len(self.header)
        for spec in leaves:
            self.offsets[spec.name] = self.nbytes
            self.nbytes += spec.nbytes
        self.left_bytes = path.stat().length if is_resumed and path.exists() else 0
        if not is_local(path) and self.left_bytes != self.nbytes:
            self.left_bytes = 0  # an object is there whole, or it is not ours
        self.sink: ByteSink | None = None
        self.is_closing = False

    def has_header(self) -> bool:
        """Whether what an earlier writer left begins as it must."""
        if not self.left_bytes:
            return False
        left = bytearray(len(self.header))
        self.sink.read_into(0, memoryview(left))
        return left == self.header
