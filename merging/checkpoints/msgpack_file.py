"""A msgpack file read as if it were a header: its maps, names and numbers; of byte strings, only where they lie.

Format: https://github.com/msgpack/msgpack/blob/master/spec.md, and the extension types by which flax stores arrays
(flax.serialization): 1 an array, 2 a complex number, 3 a numpy scalar; the payload of 1 and 3 is again msgpack, (shape, name of
the dtype, bytes in C order). Arrays of more than 2^30 bytes are maps of flat parts, `__msgpack_chunked_array__`.

A library would take memory for all arrays to tell their names. This one takes what is bounded here, whatever the file claims.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from typing import Any

import numpy as np

from merging.checkpoints.folder import Blob, Folder
from merging.checkpoints.format import CheckpointError, Index
from merging.checkpoints.safetensors_header import show
from merging.checkpoints.zarr import DTYPES, read_part

_WINDOW_BYTES = 1 << 16
_MAX_DEPTH = 64
_MAX_NODES = 1 << 20
_MAX_TEXT_BYTES = 1 << 12  # a string
_MAX_ALL_TEXT_BYTES = 64 << 20
_MAX_RANK = 32
_MAX_BYTES = 2**63 - 1

_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_CHUNKED = "__msgpack_chunked_array__"

# Scalars of fixed size by their first byte.
_NUMBERS = {
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
    0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
# What has a length before it, by first byte: (kind, bytes of the length).
_SIZED = {
    0xC4: ("bytes", 1), 0xC5: ("bytes", 2), 0xC6: ("bytes", 4),
    0xC7: ("ext", 1), 0xC8: ("ext", 2), 0xC9: ("ext", 4),
    0xD9: ("text", 1), 0xDA: ("text", 2), 0xDB: ("text", 4),
    0xDC: ("list", 2), 0xDD: ("list", 4), 0xDE: ("map", 2), 0xDF: ("map", 4),
}  # fmt: skip
_FIXED_EXT = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}


@dataclasses.dataclass(frozen=True)
class Payload:
    """Bytes that were not read: of an extension type, or of a byte string (`code` None)."""

    code: int | None
    offset: int
    nbytes: int


class InlineArray:
    """An array whose bytes lie in the file, in one run or several. Thread-safe."""

    def __init__(
        self,
        folder: Folder,
        file: str,
        shape: tuple[int, ...],
        dtype: np.dtype,
        parts: list[tuple[int, int]],
    ):
        self.shape, self.dtype = shape, dtype
        self._folder = folder
        self._parts = []  # (first byte of the array, blob)
        start = 0
        for offset, nbytes in parts:
            self._parts.append((start, Blob(nbytes, file, offset)))
            start += nbytes

    def read(self, index: Index, out: np.ndarray) -> None:
        """The box into `out`, C-contiguous [*box]."""
        read_part(self._read_bytes, self.shape, index, out)

    def _read_bytes(self, offset: int, buffer: memoryview) -> None:
        end = offset + len(buffer)
        for start, blob in self._parts:
            low, high = max(offset, start), min(end, start + blob.nbytes)
            if low < high:
                self._folder.read_into(blob, low - start, buffer[low - offset : high - offset])


def load(folder: Folder, file: str) -> Any:
    """What the file holds: dicts, lists, numbers, strings, None, `Payload` for bytes not read, `InlineArray` for arrays.

    Raises CheckpointError where it is no msgpack, is truncated, or is larger than what this module bounds.
    """
    scanner = _Scanner(folder, file, 0, folder.files[file].size)
    tree = scanner.item(0)
    if scanner.at != scanner.end:
        raise scanner.error(f"{scanner.end - scanner.at} bytes behind the end")
    return _with_arrays(tree, folder, file)


class _Scanner:
    """Reads items one after another from `at` on, through a small window."""

    def __init__(self, folder: Folder, file: str, at: int, end: int):
        self.at, self.end = at, end
        self._folder, self._file = folder, file
        self._blob = Blob(folder.files[file].size, file)
        self._window, self._window_at = b"", 0
        self._nodes = self._text_bytes = 0

    def error(self, what: str) -> CheckpointError:
        where = f"{self._folder.path / self._file}: byte {self.at}"
        return CheckpointError(
            f"{where}: {what}; the file is damaged or no msgpack of a checkpoint"
        )

    def item(self, depth: int) -> Any:
        self._nodes += 1
        if depth > _MAX_DEPTH or self._nodes > _MAX_NODES:
            raise self.error(f"deeper than {_MAX_DEPTH} or more than {_MAX_NODES} items")
        first = self._take(1)[0]
        if first <= 0x7F:
            return first
        if first >= 0xE0:
            return first - 256
        if first <= 0x8F:
            return self._map(first & 0x0F, depth)
        if first <= 0x9F:
            return self._list(first & 0x0F, depth)
        if first <= 0xBF:
            return self._text(first & 0x1F)
        if first in _CONSTANTS:
            return _CONSTANTS[first]
        if first in _NUMBERS:
            kind = _NUMBERS[first]
            return struct.unpack(kind, self._take(struct.calcsize(kind)))[0]
        if first in _FIXED_EXT:
            return self._payload(_FIXED_EXT[first], is_ext=True)
        if first not in _SIZED:
            raise self.error(f"0x{first:02x} begins no item")
        kind, width = _SIZED[first]
        count = int.from_bytes(self._take(width), "big")
        if kind == "map":
            return self._map(count, depth)
        if kind == "list":
            return self._list(count, depth)
        if kind == "text":
            return self._text(count)
        return self._payload(count, is_ext=kind == "ext")

    def _map(self, count: int, depth: int) -> dict[str, Any]:
        result = {}
        for _ in range(count):
            key = self.item(depth + 1)
            if not isinstance(key, str):
                raise self.error(f"key {show(key)}, wanted a string")
            if key in result:
                raise self.error(f"key {show(key)} is given twice")
            result[key] = self.item(depth + 1)
        return result

    def _list(self, count: int, depth: int) -> list[Any]:
        return [self.item(depth + 1) for _ in range(count)]

    def _text(self, count: int) -> str:
        self._text_bytes += count
        if count > _MAX_TEXT_BYTES or self._text_bytes > _MAX_ALL_TEXT_BYTES:
            raise self.error(f"a string of {count} bytes")
        try:
            return self._take(count).decode()
        except UnicodeDecodeError:
            raise self.error("a string that is not UTF-8") from None

    def _payload(self, count: int, *, is_ext: bool) -> Payload:
        code = int.from_bytes(self._take(1), "big", signed=True) if is_ext else None
        if count > self.end - self.at:
            raise self.error(f"{count} bytes claimed, {self.end - self.at} left")
        self.at += count
        return Payload(code, self.at - count, count)

    def _take(self, count: int) -> bytes:
        if count > self.end - self.at:
            raise self.error(f"{count} bytes wanted, {self.end - self.at} left")
        start = self.at - self._window_at
        if start < 0 or start + count > len(self._window):
            size = min(max(count, _WINDOW_BYTES), self.end - self.at)
            window = bytearray(size)
            self._folder.read_into(self._blob, self.at, memoryview(window))
            self._window, self._window_at, start = bytes(window), self.at, 0
        self.at += count
        return self._window[start : start + count]


def _with_arrays(tree: Any, folder: Folder, file: str) -> Any:
    if isinstance(tree, list):
        return [_with_arrays(value, folder, file) for value in tree]
    if isinstance(tree, Payload):
        return _array(tree, folder, file) if tree.code is not None else tree
    if not isinstance(tree, dict):
        return tree
    if _CHUNKED in tree:
        return _chunked(tree, folder, file)
    return {key: _with_arrays(value, folder, file) for key, value in tree.items()}


def _array(payload: Payload, folder: Folder, file: str) -> InlineArray:
    shape, dtype, data = _array_header(payload, folder, file)
    return InlineArray(folder, file, shape, dtype, [(data.offset, data.nbytes)])


def _array_header(
    payload: Any, folder: Folder, file: str
) -> tuple[tuple[int, ...], np.dtype, Payload]:
    where = f"{folder.path / file}"
    if not isinstance(payload, Payload) or payload.code not in (_ARRAY, _COMPLEX, _SCALAR):
        raise CheckpointError(f"{where}: {show(payload)}, wanted an array")
    if payload.code == _COMPLEX:
        raise CheckpointError(
            f"{where}: byte {payload.offset}: a complex number, which is not read"
        )
    scanner = _Scanner(folder, file, payload.offset, payload.offset + payload.nbytes)
    header = scanner.item(0)
    if scanner.at != scanner.end or not isinstance(header, list) or len(header) != 3:
        raise scanner.error("an array without shape, dtype and bytes")
    shape, named, data = header
    if not _are_counts(shape) or not isinstance(data, Payload) or data.code is not None:
        raise scanner.error(f"an array of shape {show(shape)}")
    if not isinstance(named, str) or named not in DTYPES:
        raise scanner.error(f"dtype {show(named)} is not read; wanted one of {', '.join(DTYPES)}")
    dtype = DTYPES[named]
    if math.prod(shape) * dtype.itemsize != data.nbytes:
        raise scanner.error(f"{data.nbytes} bytes for {dtype}{shape}")
    return tuple(shape), dtype, data


def _chunked(tree: dict[str, Any], folder: Folder, file: str) -> InlineArray:
    """A map of flat parts, under "0", "1", ..."""
    where = f"{folder.path / file}: an array in parts"
    shapes, chunks = tree.get("shape"), tree.get("chunks")
    if not isinstance(shapes, dict) or not isinstance(chunks, dict) or not chunks:
        raise CheckpointError(f"{where} without shape and chunks")
    try:
        shape = [shapes[str(i)] for i in range(len(shapes))]
        parts = [_array_header(chunks[str(i)], folder, file) for i in range(len(chunks))]
    except KeyError as error:
        raise CheckpointError(f"{where} lacks part {error}") from None
    if not _are_counts(shape):
        raise CheckpointError(f"{where} has shape {show(shape)}")
    dtype = parts[0][1]
    if any(part[1] != dtype for part in parts) or math.prod(shape) * dtype.itemsize != sum(
        part[2].nbytes for part in parts
    ):
        raise CheckpointError(f"{where} are not those of {dtype}{shape}")
    runs = [(data.offset, data.nbytes) for _, _, data in parts]
    return InlineArray(folder, file, tuple(shape), dtype, runs)


def _are_counts(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= _MAX_RANK
        and all(type(v) is int and 0 <= v <= _MAX_BYTES for v in values)
    )
