"""One array in chunks, as zarr stores it: its metadata checked, boxes read.

Formats: https://zarr-specs.readthedocs.io (v2 and v3), with tensorstore's name `bfloat16`. Uncompressed chunks are read by range,
as a safetensors file is: only the bytes of the box, into the caller's buffer, without a cache. All others are unpacked whole,
here (gzip) or by tensorstore (zstd, shards), and kept in a cache, since boxes that follow each other lie in the same
chunks. How much a chunk unpacks to is known before (`codecs.py`).

A chunk that is absent is an error; only where the metadata names a fill value, and the format that holds the array leaves out
chunks of that value, is it taken for them.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import ml_dtypes
import numpy as np

from merging.checkpoints import boxes, codecs
from merging.checkpoints.folder import Blob, Folder
from merging.checkpoints.format import CheckpointError, Index, LeafSpec
from merging.checkpoints.ocdbt import kvstore
from merging.checkpoints.safetensors_header import load_json, show

V2_FILE, V3_FILE = ".zarray", "zarr.json"

_MAX_METADATA_BYTES = 1 << 20
_MAX_RANK = 32
_MAX_BYTES = 2**63 - 1
# A chunk larger than this must have a stored size from which it can come: nothing that zstd or gzip packs shrinks more.
_UNCHECKED_BYTES = 256 << 20
_MAX_RATIO = 1 << 15
# What does not shrink grows a little when it is packed, and a shard has an index.
_UNPACKED_BYTES = 1 << 20
# A box is read with what lies between its runs where that is at most so much more; else run by run.
_MAX_WASTE = 2

DTYPES = {
    name: np.dtype(name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64"),
    )
} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
_V2_DTYPES = {dtype.str: dtype for name, dtype in DTYPES.items() if name != "bfloat16"} | {
    "bfloat16": DTYPES["bfloat16"]
}


@dataclasses.dataclass(frozen=True)
class Shard:
    """How a chunk of zarr 3 holds smaller ones: their shape and packing, and whether their index is at its end."""

    chunk: tuple[int, ...]
    packing: str | None
    is_index_last: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metadata:
    """What `.zarray` or `zarr.json` says.

    Attributes:
      packing: of each chunk, a name of `codecs.KNOWN`, or None; that of the smaller ones where `shard` is given.
      is_plain: unpacked chunks hold the bytes of their elements, little-endian, in C order, and absent ones are zeros.
      separator: between the numbers in a chunk's name.
      has_fill: it names the value of chunks that are absent.
      trailing: bytes behind a packed chunk (a checksum).
    """

    version: int
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: np.dtype
    packing: str | None
    is_plain: bool
    separator: str
    has_fill: bool
    shard: Shard | None = None
    trailing: int = 0

    @property
    def direct(self) -> bool:
        """Whether chunks can be read by range."""
        return self.is_plain and self.packing is None

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunk) * self.dtype.itemsize

    def key(self, position: Sequence[int]) -> str:
        """The name of a chunk below the array's."""
        parts = self.separator.join(map(str, position))
        if self.version == 2:
            return parts or "0"
        return f"c{self.separator}{parts}" if parts else "c"


class Array:
    """An array in a folder, or in a database in that folder. Thread-safe.

    Args:
      folder: whose files hold the chunks.
      name: of the array, "" where its files lie in the folder itself.
      blobs: where each of its keys (metadata and chunks, without the name) lies.
      in_database: whether the keys are those of an OCDBT database.
      may_lack_chunks: whether a chunk of the fill value may be absent.
      context: tensorstore's, with the cache of decoded chunks.
      view: a dtype of the same size as which the elements are taken.

    Attributes:
      metadata, shape, dtype.
      raw: the bytes of the metadata.

    Raises CheckpointError for metadata that is not as the format says, or that the chunks contradict.
    """

    def __init__(
        self,
        folder: Folder,
        name: str,
        blobs: Mapping[str, Blob],
        *,
        in_database: bool,
        may_lack_chunks: bool,
        context: Context,
        view: np.dtype | None = None,
    ):
        self._folder, self._name, self._in_database = folder, name, in_database
        self._context = context
        self._lock = threading.Lock()  # guards _opened
        self._opened: Any = None
        self._checked: set[str] = set()  # keys of chunks that may be unpacked
        file = next((f for f in (V2_FILE, V3_FILE) if f in blobs), None)
        self._where = f"{folder.path}: array {show(name)}"
        if file is None:
            raise CheckpointError(f"{self._where} has neither {V2_FILE} nor {V3_FILE}")
        if blobs[file].nbytes > _MAX_METADATA_BYTES:
            raise CheckpointError(f"{self._where}: {file} has {blobs[file].nbytes} bytes")
        self.raw = folder.read(blobs[file])
        self.metadata = _parse(self.raw, file, f"{self._where}: {file}")
        self.shape = self.metadata.shape
        self.dtype = view or self.metadata.dtype
        # tensorstore stores every chunk of an array without a fill value: one that is absent there was lost.
        self._may_lack = may_lack_chunks and self.metadata.has_fill
        self._chunks = {key: blob for key, blob in blobs.items() if key != file}
        self._check_chunks()

    @property
    def cached_bytes(self) -> int:
        """What the cache should hold so that boxes in order decode each chunk once: all chunks that a row touches."""
        meta = self.metadata
        if meta.direct or not meta.shape:
            return 0
        across = (
            -(-size // chunk) for size, chunk in zip(meta.shape[1:], meta.chunk[1:], strict=True)
        )
        return math.prod(across) * meta.chunk_bytes

    def read(self, index: Index, out: np.ndarray) -> None:
        """The box into `out`, C-contiguous [*box]. Raises CheckpointError with the file where bytes are missing."""
        if not self.metadata.is_plain or self.metadata.packing not in (None, *codecs.INFLATED):
            out[...] = self._decode(index).view(self.dtype)
            return
        shape, chunk = self.shape, self.metadata.chunk
        for position in boxes.chunks_of(index, chunk):
            shared = boxes.intersection(index, boxes.chunk_box(position, chunk, shape))
            target = out[(*boxes.relative(shared, index), ...)]
            blob = self._chunks.get(self.metadata.key(position))
            if blob is None:
                target[...] = 0
                continue
            start = tuple(slice(p * c, (p + 1) * c) for p, c in zip(position, chunk, strict=True))
            inside = boxes.relative(shared, start)
            if self.metadata.direct:
                read_part(self._reading(blob), chunk, inside, target)
            else:
                target[...] = self._inflated(position, blob)[(*inside, ...)]

    def _reading(self, blob: Blob) -> Callable[[int, memoryview], None]:
        return lambda offset, buffer: self._folder.read_into(blob, offset, buffer)

    def _inflated(self, position: boxes.Shape, blob: Blob) -> np.ndarray:
        """A chunk, [*chunk]; not to be changed."""
        meta = self.metadata

        def inflate() -> np.ndarray:
            where = f"{self._where}: chunk {show(meta.key(position))}"
            data = codecs.inflate(meta.packing, self._folder.read(blob), meta.chunk_bytes, where)
            return np.frombuffer(data, self.dtype).reshape(meta.chunk)

        return self._context.chunk((self._name, position), meta.chunk_bytes, inflate)

    def _decode(self, index: Index) -> np.ndarray:
        """The box by tensorstore, after a look at what it will unpack."""
        files = set()
        for position in boxes.chunks_of(index, self.metadata.chunk):
            key = self.metadata.key(position)
            blob = self._chunks.get(key)
            if blob is None:
                continue
            if blob.inline is None:
                files.add(blob.file)
            if key not in self._checked:
                self._check_unpacked(blob, f"{self._where}: chunk {show(key)}")
                self._checked.add(key)
        try:
            array = self._open()[index].read().result()
        except (ValueError, NotImplementedError) as error:  # the latter of a bad boolean in blosc
            raise CheckpointError(f"{self._where}: {error}") from None
        self._folder.check(files)  # tensorstore takes a chunk that vanished for zeros
        return np.asarray(array)

    def _check_unpacked(self, blob: Blob, where: str) -> None:
        """Raises CheckpointError where a chunk may unpack to far more than its elements take."""
        meta = self.metadata

        def read(offset: int, count: int) -> bytes:
            return self._folder.read(blob.part(offset, count))

        def check(packing: str | None, start: int, size: int, nbytes: int) -> None:
            size -= meta.trailing
            if packing in codecs.INFLATED:  # unpacked here only to see its size
                codecs.inflate(packing, read(start, size), nbytes, where)
            elif packing is not None:
                codecs.check(packing, lambda at, n: read(start + at, n), size, nbytes, where)

        if meta.shard is None:
            check(meta.packing, 0, blob.nbytes, meta.chunk_bytes)
            return
        inner = math.prod(meta.shard.chunk) * meta.dtype.itemsize
        for start, size in _shard_index(meta, read, blob.nbytes, where):
            check(meta.shard.packing, start, size, inner)

    def _open(self) -> Any:
        import tensorstore as ts

        with self._lock:
            if self._opened is None:
                base = kvstore(self._folder)
                path = f"{self._name}/" if self._name else ""
                if self._in_database:
                    store = {"driver": "ocdbt", "base": base, "path": path}
                else:
                    store = {**base, "path": base["path"] + path}
                spec = {
                    "driver": "zarr" if self.metadata.version == 2 else "zarr3",
                    "kvstore": store,
                    "recheck_cached_data": False,
                    "recheck_cached_metadata": False,
                    "fill_missing_data_reads": self._may_lack,
                }
                opened = ts.open(spec, read=True, open=True, context=self._context.get()).result()
                if (opened.shape, opened.dtype.numpy_dtype) != (self.shape, self.metadata.dtype):
                    raise ValueError(
                        f"tensorstore reads {opened.dtype.name}{list(opened.shape)} where the metadata says "
                        f"{self.metadata.dtype}{list(self.shape)}: it changed since the checkpoint was opened"
                    )
                self._opened = opened
            return self._opened

    def _check_chunks(self) -> None:
        meta = self.metadata
        wanted = math.prod(-(-s // c) for s, c in zip(meta.shape, meta.chunk, strict=True))
        if len(self._chunks) > wanted or (len(self._chunks) < wanted and not self._may_lack):
            raise CheckpointError(
                f"{self._where}: {len(self._chunks)} chunks are stored, shape {list(meta.shape)} in chunks of "
                f"{list(meta.chunk)} has {wanted}; the checkpoint is unfinished or damaged: write it again"
            )
        for key, blob in self._chunks.items():
            if meta.direct and blob.nbytes != meta.chunk_bytes:
                raise CheckpointError(
                    f"{self._where}: chunk {show(key)} has {blob.nbytes} bytes, {list(meta.chunk)} of {meta.dtype} "
                    f"takes {meta.chunk_bytes}; the file is truncated or damaged: write it again"
                )
            if meta.chunk_bytes > max(_UNCHECKED_BYTES, blob.nbytes * _MAX_RATIO):
                raise CheckpointError(
                    f"{self._where}: chunk {show(key)} claims {meta.chunk_bytes} bytes but has {blob.nbytes}, more "
                    "than packing explains; do not trust this checkpoint"
                )
            if blob.nbytes > _UNPACKED_BYTES + 2 * meta.chunk_bytes:
                raise CheckpointError(
                    f"{self._where}: chunk {show(key)} has {blob.nbytes} bytes, {list(meta.chunk)} of {meta.dtype} "
                    f"takes {meta.chunk_bytes} unpacked; do not trust this checkpoint"
                )


class Context:
    """What the arrays of a checkpoint share: unpacked chunks, of which `cache_bytes` are kept. Thread-safe."""

    def __init__(self) -> None:
        self.cache_bytes = 0
        self._lock = threading.Lock()
        self._made: Any = None
        self._kept: dict[Hashable, tuple[futures.Future[np.ndarray], int]] = {}  # newest last
        self._kept_bytes = 0

    def get(self) -> Any:
        """tensorstore's context, made when it is first needed, with a cache of as many bytes as were asked for by then."""
        import tensorstore as ts

        with self._lock:
            if self._made is None:
                self._made = ts.Context({"cache_pool": {"total_bytes_limit": self.cache_bytes}})
            return self._made

    def chunk(self, key: Hashable, nbytes: int, unpack: Callable[[], np.ndarray]) -> np.ndarray:
        """The chunk of a key, unpacked by whoever asks first, and anew once it had to make room for others."""
        with self._lock:
            future, nbytes = self._kept.pop(key, (None, nbytes))
            is_mine = future is None
            if is_mine:
                future = futures.Future()
                self._kept_bytes += nbytes
            self._kept[key] = future, nbytes
            while self._kept_bytes > self.cache_bytes and len(self._kept) > 1:
                self._drop(next(iter(self._kept)))
        if is_mine:
            try:
                future.set_result(unpack())
            except BaseException as error:
                with self._lock:
                    self._drop(key)
                future.set_exception(error)
                raise
        return future.result()

    def _drop(self, key: Hashable) -> None:
        self._kept_bytes -= self._kept.pop(key, (None, 0))[1]


def read_part(read_into: Any, shape: Sequence[int], index: Index, target: np.ndarray) -> None:
    """Reads a box of an array whose plain bytes lie in C order.

    Args:
      read_into: (offset in bytes, buffer) -> None.
      target: [*box], of any strides.
    """
    if not target.size:
        return
    itemsize = target.dtype.itemsize
    run, starts = boxes.runs(shape, index)
    first = next(starts)
    if run == target.size and target.flags.c_contiguous:
        read_into(first * itemsize, boxes.bytes_of(target))
        return
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    span = 1 + sum((n - 1) * s for n, s in zip(target.shape, strides, strict=True))
    if span <= _MAX_WASTE * target.size:
        buffer = np.empty(span, target.dtype)
        read_into(first * itemsize, boxes.bytes_of(buffer))
        steps = [s * itemsize for s in strides]
        target[...] = np.lib.stride_tricks.as_strided(buffer, target.shape, steps, writeable=False)
        return
    buffer = np.empty(target.shape, target.dtype)
    data = boxes.bytes_of(buffer)
    for position, start in enumerate((first, *starts)):
        at = position * run * itemsize
        read_into(start * itemsize, data[at : at + run * itemsize])
    target[...] = buffer


# --- Metadata -----------------------------------------------------------------------------------


def _parse(raw: bytes, file: str, where: str) -> Metadata:
    tree = load_json(raw, where)
    parse = _parse_v2 if file == V2_FILE else _parse_v3
    try:
        metadata = parse(tree)
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where} is not as zarr describes an array: {error!r}") from None
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None
    shape, chunk = metadata.shape, metadata.chunk
    if len(shape) > _MAX_RANK or len(chunk) != len(shape) or 0 in chunk:
        raise CheckpointError(f"{where}: shape {show(shape)} in chunks of {show(chunk)}")
    for sizes in (shape, chunk):
        if math.prod(size or 1 for size in sizes) * metadata.dtype.itemsize > _MAX_BYTES:
            raise CheckpointError(f"{where}: {show(sizes)} overflows: more than 2^63 - 1 bytes")
    return metadata


def _parse_v2(tree: Mapping[str, Any]) -> Metadata:
    if tree["zarr_format"] != 2:
        raise ValueError(f"zarr_format is {show(tree['zarr_format'])}, wanted 2")
    named = tree["dtype"]
    if not isinstance(named, str) or named.replace(">", "<") not in _V2_DTYPES:
        raise ValueError(f"dtype {show(named)} is not read; wanted one of {', '.join(_V2_DTYPES)}")
    filters = tree.get("filters")
    if filters not in (None, []):
        raise ValueError(f"filters {show(filters)} are not read")
    described, fill = tree["compressor"], tree["fill_value"]
    return Metadata(
        version=2,
        shape=_counts(tree["shape"]),
        chunk=_counts(tree["chunks"]),
        dtype=_V2_DTYPES[named.replace(">", "<")],
        packing=None if described is None else _packing(described["id"]),
        is_plain=tree["order"] == "C" and _is_zero(fill) and not named.startswith(">"),
        separator=_separator(tree.get("dimension_separator", ".")),
        has_fill=fill is not None,
    )


def _parse_v3(tree: Mapping[str, Any]) -> Metadata:
    if tree["zarr_format"] != 3 or tree["node_type"] != "array":
        raise ValueError("it does not describe an array of zarr 3")
    named = tree["data_type"]
    if not isinstance(named, str) or named not in DTYPES:
        raise ValueError(f"data_type {show(named)} is not read; wanted {', '.join(DTYPES)}")
    grid, encoding = tree["chunk_grid"], tree["chunk_key_encoding"]
    if grid["name"] != "regular" or encoding["name"] != "default":
        raise ValueError(f"chunks {show(grid['name'])}, {show(encoding['name'])} are not read")
    chunk = _counts(grid["configuration"]["chunk_shape"])
    first, shard = _named(tree["codecs"][0]), None
    if first[0] == "sharding_indexed":
        if len(tree["codecs"]) > 1:
            raise ValueError(f"codecs {show(tree['codecs'])} are not read: shards packed again")
        packing, is_plain, trailing = _chain(first[1]["codecs"])
        location = first[1].get("index_location", "end")
        if location not in ("start", "end") or _chain(first[1]["index_codecs"]) != (None, True, 4):
            raise ValueError(f"the index of shards {show(first[1])} is not read")
        shard = Shard(_counts(first[1]["chunk_shape"]), packing, location == "end")
        if len(shard.chunk) != len(chunk) or any(
            not s or c % s for s, c in zip(shard.chunk, chunk, strict=True)
        ):
            raise ValueError(f"chunks of {show(chunk)} hold none of {show(shard.chunk)}")
    else:
        packing, is_plain, trailing = _chain(tree["codecs"])
    return Metadata(
        version=3,
        shape=_counts(tree["shape"]),
        chunk=chunk,
        dtype=DTYPES[named],
        packing=packing,
        is_plain=is_plain and not trailing and shard is None and _is_zero(tree["fill_value"]),
        separator=_separator(encoding.get("configuration", {}).get("separator", "/")),
        has_fill=True,
        shard=shard,
        trailing=trailing,
    )


def _chain(described: Any) -> tuple[str | None, bool, int]:
    """What a chain of zarr 3's codecs packs with, whether it leaves the bytes of elements as they are, bytes behind it."""
    packing, is_plain, trailing, is_in_bytes = None, True, 0, False
    for name, options in map(_named, described):
        if name == "transpose" and not is_in_bytes:
            is_plain = False
        elif name == "bytes" and not is_in_bytes:
            is_in_bytes = True
            is_plain = is_plain and options.get("endian", "little") == "little"
        elif name in codecs.KNOWN and is_in_bytes and packing is None and not trailing:
            packing = name
        elif name == "crc32c" and is_in_bytes and not trailing:
            trailing = 4
        else:
            raise ValueError(f"codecs {show(described)} are not read")
    if not is_in_bytes:
        raise ValueError(f"codecs {show(described)} give no bytes")
    return packing, is_plain, trailing


def _named(codec: Any) -> tuple[str, Mapping[str, Any]]:
    """A codec's name and options; a name alone is short for it without any."""
    if isinstance(codec, str):
        return codec, {}
    options = codec.get("configuration", {})
    if not isinstance(codec["name"], str) or not isinstance(options, dict):
        raise ValueError(f"codec {show(codec)} is not read")
    return codec["name"], options


def _packing(named: Any) -> str:
    if not isinstance(named, str) or named not in codecs.KNOWN:
        raise ValueError(
            f"compressor {show(named)} is not read; wanted one of {', '.join(codecs.KNOWN)}"
        )
    return named


def _separator(found: Any) -> str:
    if found not in (".", "/"):
        raise ValueError(f"the separator of chunks' names is {show(found)}")
    return found


def _is_zero(fill: Any) -> bool:
    return str(fill) in ("None", "0", "0.0", "False")  # not -0.0


def _shard_index(
    meta: Metadata, read: codecs.Read, size: int, where: str
) -> Iterator[tuple[int, int]]:
    """Where the smaller chunks of one lie: (offset, bytes) of each that is there."""
    count = math.prod(c // s for c, s in zip(meta.chunk, meta.shard.chunk, strict=True))
    nbytes = 16 * count + 4  # with a crc32c
    if nbytes > size:
        raise CheckpointError(
            f"{where} has {size} bytes, its index of {count} chunks takes {nbytes}: write it again"
        )
    index = np.frombuffer(read(size - nbytes if meta.shard.is_index_last else 0, 16 * count), "<u8")
    for offset, length in index.reshape(-1, 2).tolist():
        if (offset, length) == (2**64 - 1, 2**64 - 1):
            continue
        if offset + length > size:
            raise CheckpointError(
                f"{where} has {size} bytes and an index up to {offset + length}: write it again"
            )
        yield offset, length


def _counts(values: Any) -> tuple[int, ...]:
    # `type(v) is int`: to Python, true is an int as well.
    if not isinstance(values, list) or not all(
        type(v) is int and 0 <= v <= _MAX_BYTES for v in values
    ):
        raise ValueError(f"{show(values)} is no list of whole numbers from 0 to 2^63 - 1")
    return tuple(values)


# --- New arrays, whose chunks are plain bytes or gzip ---------------------------------------------


def metadata_file(
    version: int, leaf: LeafSpec, chunk: Sequence[int], gzip_level: int | None = None
) -> tuple[str, bytes]:
    """Name and content of the file that describes a new array."""
    named = leaf.dtype.name
    if version == 2:
        tree: dict[str, Any] = {
            "zarr_format": 2,
            "shape": list(leaf.shape),
            "chunks": list(chunk),
            "dtype": named if leaf.dtype == DTYPES["bfloat16"] else leaf.dtype.str,
            "compressor": compressor(gzip_level),
            "fill_value": None,
            "filters": None,
            "order": "C",
            "dimension_separator": ".",
        }
        return V2_FILE, json.dumps(tree).encode()
    assert version == 3 and gzip_level is None
    tree = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(leaf.shape),
        "data_type": named,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "fill_value": False if named == "bool" else 0.0 if "float" in named else 0,
    }
    return V3_FILE, json.dumps(tree).encode()


def compressor(gzip_level: int | None) -> dict[str, Any] | None:
    """What zarr 2 calls a packing."""
    return None if gzip_level is None else {"id": "gzip", "level": gzip_level}


def chunk_key(version: int, index: Index, chunk: Sequence[int]) -> str:
    """The name of the chunk that begins where a box does."""
    parts = [str(part.start // size) for part, size in zip(index, chunk, strict=True)]
    if version == 2:
        return ".".join(parts) or "0"
    return "/".join(["c", *parts])


def encoded(array: np.ndarray, chunk: Sequence[int], gzip_level: int | None = None) -> memoryview:
    """The bytes of a chunk: at full size, with zeros beyond the array's edge."""
    if array.shape != tuple(chunk):
        padded = np.zeros(chunk, array.dtype)
        padded[boxes.whole(array.shape)] = array
        array = padded
    data = boxes.bytes_of(np.ascontiguousarray(array))
    # Without the time of day, so that the same array gives the same bytes.
    return data if gzip_level is None else memoryview(gzip.compress(data, gzip_level, mtime=0))
