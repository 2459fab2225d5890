"""What a safetensors file says about itself: the header, checked when read and built when written.

Format: https://github.com/huggingface/safetensors#format. A file is 8 bytes of little-endian header
length N, N bytes of JSON ({name: {dtype, shape, data_offsets}}, padded with spaces), then the data,
little-endian and C order, every byte of which belongs to exactly one leaf.

What it promises: a header that breaks any of that, by accident or on purpose, is a CheckpointError
that tells everything wrong with the file, before memory is taken for what it claims. What it leaves
out: the data, and types that can't be merged as they are stored (quantised, complex).
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from merging.checkpoints.format import CheckpointError, LeafSpec
from merging.checkpoints.storage import ByteSource

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_TAGS = {dtype: tag for tag, dtype in DTYPES.items()}
# Types of the format that are not read, in bits: known, so that offsets can still be checked.
_QUANTISED_BITS = {
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
_COMPLEX_BITS = {"C64": 64}
_BITS = {tag: 8 * dtype.itemsize for tag, dtype in DTYPES.items()} | _QUANTISED_BITS | _COMPLEX_BITS

# Bytes, by the format: a longer header is refused before memory is taken for it.
MAX_HEADER_BYTES = 100_000_000
# numpy before 2.0 goes no further. More only occurs in hostile files, where the product of a
# million dimensions would take minutes.
_MAX_RANK = 32
# Sizes and offsets have to fit a file offset.
_MAX_BYTES = 2**63 - 1
# Problems told in one message; a damaged header can have millions.
_MAX_PROBLEMS = 20
_MAX_DEPTH = 32  # of JSON: 400 kB of 200 levels took more than 5 s to write again
# Data begin at a multiple of this many bytes, for those who map the file (cache lines, AVX-512).
_ALIGNMENT_BYTES = 64


@dataclasses.dataclass(frozen=True)
class Header:
    """`raw`: the JSON bytes; `offsets`: from the beginning of the file, in bytes, ascending."""

    raw: bytes
    specs: Mapping[str, LeafSpec]
    offsets: Mapping[str, int]


def read_header(source: ByteSource) -> Header:
    """The checked header of a file. Raises CheckpointError with all that is wrong with it."""
    raw = _read_raw(source)
    tree = load_json(raw, f"{source.path}: header")
    metadata = tree.pop("__metadata__", {})
    problems = []
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        problems.append(f"__metadata__ is {show(metadata)}, wanted strings by name")
    entries = []
    for name, value in tree.items():
        entry = _check_entry(name, value)
        if isinstance(entry, str):
            problems.append(f"leaf {show(name)}: {entry}")
        else:
            entries.append(entry)
    if not problems:  # else offsets are missing, and every neighbour would be a hole
        entries.sort(key=lambda entry: (entry.begin, entry.end))
        problems = _check_layout(entries, source.size - 8 - len(raw))
    refuse(source.path, problems, "the file is damaged or unfinished: fetch or write it again")
    _refuse_unread_types(entries, source)
    return Header(
        raw,
        {e.name: LeafSpec(name=e.name, shape=e.shape, dtype=DTYPES[e.tag]) for e in entries},
        {e.name: 8 + len(raw) + e.begin for e in entries},
    )


def build_header(specs: Sequence[LeafSpec], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file of these leaves, one after another, up to where the data begin.

    Raises ValueError for a leaf that the format can't hold.
    """
    tree: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for spec in specs:
        if spec.dtype not in _TAGS:
            raise ValueError(
                f"leaf {spec.name} is {spec.dtype}, which is not written to safetensors; wanted "
                f"one of {', '.join(map(str, _TAGS))}"
            )
        if spec.name == "__metadata__" or not _is_text(spec.name):
            raise ValueError(f"a leaf can't be named {spec.name!r} in safetensors; rename it")
        begin, end = end, end + spec.nbytes
        tree[spec.name] = {
            "dtype": _TAGS[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
    raw = json.dumps(tree, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-(8 + len(raw)) % _ALIGNMENT_BYTES)
    if len(raw) > MAX_HEADER_BYTES:
        raise ValueError(
            f"{len(specs)} leaves make a header of {len(raw)} bytes, the format allows "
            f"{MAX_HEADER_BYTES}; choose smaller shards"
        )
    return len(raw).to_bytes(8, "little") + raw


# --- JSON and messages, for the index as well ---------------------------------------------------


def load_json(raw: bytes, where: str) -> dict[str, Any]:
    """A JSON object; CheckpointError where it is anything else, or gives a key twice."""
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            counts = collections.Counter(key for key, _ in pairs)
            twice.extend(f"{show(key)} is given {n} times" for key, n in counts.items() if n > 1)
        return result

    def no_constant(text: str) -> None:
        raise ValueError(f"{text} is no JSON number")

    if not raw.startswith(b"{"):
        raise CheckpointError(f"{where} begins with {raw[:1]!r}, wanted a JSON object: '{{'")
    try:
        tree = json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=no_constant)
        _check_depth(tree)
    except RecursionError:
        raise CheckpointError(f"{where} is nested too deeply to be one of a checkpoint") from None
    except ValueError as error:  # UnicodeDecodeError, JSONDecodeError, ints of 5000 digits
        raise CheckpointError(f"{where} is not JSON in UTF-8: {error}") from None
    refuse(where, twice, "a name may be given once; do not trust this checkpoint")
    return tree


def _check_depth(tree: dict[str, Any]) -> None:
    """RecursionError where whoever walks or writes the tree would come too deep."""
    level: list[Any] = [tree]
    for _ in range(_MAX_DEPTH):
        within = (node.values() if isinstance(node, dict) else node for node in level)
        level = [v for values in within for v in values if isinstance(v, dict | list)]
    if level:
        raise RecursionError


def refuse(where: object, problems: Sequence[str], remedy: str) -> None:
    """CheckpointError with all problems, if there are any."""
    if problems:
        shown = "".join(f"\n  - {problem}" for problem in problems[:_MAX_PROBLEMS])
        if len(problems) > _MAX_PROBLEMS:
            shown += f"\n  - and {len(problems) - _MAX_PROBLEMS} more"
        raise CheckpointError(f"{where}:{shown}\n{remedy}")


_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = 200
_shorten.maxlist = _shorten.maxdict = 8


def show(value: object) -> str:
    """A value found in a file, for a message: quoted, and short however long it is."""
    return _shorten.repr(value)


# --- Checks -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A leaf as the header describes it; `begin` and `end` in bytes from the end of the header."""

    name: str
    tag: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _read_raw(source: ByteSource) -> bytes:
    """The JSON bytes; the length they claim is checked before memory is taken."""
    if source.size < 8:
        raise CheckpointError(
            f"{source.path}: {source.size} bytes, wanted at least 8 of header length; the file is "
            "truncated or not a safetensors file: fetch or write it again"
        )
    length = int.from_bytes(source.read(0, 8), "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{source.path}: claims a header of {length} bytes, the format allows "
            f"{MAX_HEADER_BYTES}; this is not a safetensors file"
        )
    if 8 + length > source.size:
        raise CheckpointError(
            f"{source.path}: claims a header of {length} bytes, but only {source.size - 8} follow; "
            "the file is truncated: fetch or write it again"
        )
    return source.read(8, length)


def _check_entry(name: str, value: Any) -> _Entry | str:
    """What the header says about one leaf, or what is wrong with that."""
    if not _is_text(name):
        return "the name is not Unicode text"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        return f"described by {show(value)}, wanted exactly dtype, shape and data_offsets"
    tag, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(tag, str) or tag not in _BITS:
        return f"dtype is {show(tag)}, wanted one of {', '.join(_BITS)}"
    if not _are_counts(shape):
        return f"shape is {show(shape)}, wanted a list of whole numbers from 0 to 2^63 - 1"
    if len(shape) > _MAX_RANK:
        return f"{len(shape)} dimensions, wanted at most {_MAX_RANK}"
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets is {show(offsets)}, wanted [begin, end] with 0 <= begin <= end"
    # A dimension of 0 does not excuse the others: numpy could not make such an array.
    if math.prod(size or 1 for size in shape) * _BITS[tag] > 8 * _MAX_BYTES:
        return f"shape {shape} of {tag} overflows: more than 2^63 - 1 bytes"
    bits, stored = math.prod(shape) * _BITS[tag], offsets[1] - offsets[0]
    if bits != 8 * stored:
        return (
            f"data_offsets {offsets} hold {stored} bytes, shape {shape} of {tag} takes {bits / 8}"
        )
    return _Entry(name, tag, tuple(shape), *offsets)


def _check_layout(entries: Sequence[_Entry], data_bytes: int) -> list[str]:
    """Problems of leaves sorted by offset: each has to begin where the one before ends."""
    problems = []
    covered, before = 0, "the header"
    for entry in entries:
        if entry.begin < covered:
            problems.append(
                f"leaf {show(entry.name)} begins at byte {entry.begin} of the data and overlaps "
                f"{before}, which ends at {covered}"
            )
        elif entry.begin > covered:
            problems.append(
                f"bytes {covered} to {entry.begin} of the data, between {before} and leaf "
                f"{show(entry.name)}, belong to no leaf"
            )
        if entry.end >= covered:
            covered, before = entry.end, f"leaf {show(entry.name)}"
    if covered > data_bytes:
        problems.append(f"truncated: {data_bytes} bytes of data, the header describes {covered}")
    elif covered < data_bytes:
        problems.append(f"the last {data_bytes - covered} bytes of the data belong to no leaf")
    return problems


def _refuse_unread_types(entries: Sequence[_Entry], source: ByteSource) -> None:
    def named(bits: Mapping[str, int]) -> list[str]:
        return [f"leaf {show(e.name)} is {e.tag}" for e in entries if e.tag in bits]

    refuse(
        source.path,
        named(_QUANTISED_BITS),
        "quantised weights can't be merged as they are stored: dequantise the checkpoint first, "
        "for example to BF16",
    )
    refuse(
        source.path,
        named(_COMPLEX_BITS),
        "complex leaves are not read: store real and imaginary parts as two leaves",
    )


def _are_counts(values: Any) -> bool:
    # `type(v) is int`: to Python, true is an int as well.
    return isinstance(values, list) and all(type(v) is int and 0 <= v <= _MAX_BYTES for v in values)


def _is_text(name: str) -> bool:
    r"""False where JSON spelled half a character (\ud800), which no file or message can hold."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
