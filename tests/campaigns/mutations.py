"""Damage for files that readers must not believe: to bytes, and to what JSON, msgpack, safetensors and OCDBT files hold.

Every function takes a random generator and gives the same damage for the same state of it. Trees are plain data but for
maps, which are lists of pairs, so that a key can be given twice, and `Literal`, which is written as it is.
"""

from __future__ import annotations

import dataclasses
import json
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import crc32c
import msgpack

Mutate = Callable[[random.Random, bytes], bytes]

_MOST_BYTES = 1 << 17  # of what is written many times: more would only take time

# Values of outside arrays are made of this byte, so no damage may bring it in.
MARK = 0xCA


@dataclasses.dataclass(frozen=True)
class Literal:
    """What is written as it is, in either format."""

    json: str
    msgpack: bytes


class Map(list):
    """A map as a list of [key, value]."""


@dataclasses.dataclass
class Extension:
    """A value of a msgpack extension type; its content a tree where that is msgpack again."""

    code: int
    content: Any


# ---- hostile values --------------------------------------------------------------------------------------------------

# `{outside}` stands for a folder beside the checkpoint's, which holds what a reader would take.
NAMES = (
    "../outside/array", "../outside/model.safetensors", "{outside}/array", "{outside}/model.safetensors", "../outside",
    "d/../../outside/array", "..", ".", "/", "//", "/etc/passwd", "a/b", "a\0b", "\0", "", " ", "é", "e\u0301", "\u202e",
    "\U0001f600", "\\", "C:\\x", "file:///etc/passwd", "gs://bucket/x", "a" * 300, "a" * 5000, "__metadata__", "target", "state",
    "checkpoint", ".zarray", "zarr.json", "0", "00", "-1", "%2e%2e%2foutside", "PLACEHOLDER://../outside/array",
)  # fmt: skip

_NUMBERS = (
    0, 1, 2, 3, 5, 127, 128, 255, 256, 2**15, 2**16, 2**20, 2**28, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53, 2**62,
    2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -1, -2, -(2**31), -(2**63), 1.0, 0.5, -0.0, 1e300, 3.7,
)  # fmt: skip

_LITERALS = tuple(
    Literal(text, packed)
    for text, packed in (
        ("NaN", b"\xcb\x7f\xf8\0\0\0\0\0\0"),
        ("Infinity", b"\xcb\x7f\xf0\0\0\0\0\0\0"),
        ("-Infinity", b"\xcb\xff\xf0\0\0\0\0\0\0"),
        ("1e400", b"\xc7\x00\x01"),
        ("1" + "0" * 5000, b"\xd4\x01\x00"),
        ('"\\ud800"', b"\xa3\xed\xa0\x80"),
        ('"\\u0000"', b"\xa1\0"),
        ("[" * 200 + "]" * 200, b"\x91" * 200 + b"\xc0"),
        ("[" * 100_000 + "]" * 100_000, b"\x91" * 100_000 + b"\xc0"),
        ('{"a":' * 5000 + "1" + "}" * 5000, b"\x81\xa1a" * 5000 + b"\x01"),
        ("[" * 30_000, b"\xdd\xff\xff\xff\xff"),
        ("", b"\xdf\xff\xff\xff\xff"),
        ("{}{}", b"\xc6\xff\xff\xff\xff"),
        ("[1,]", b"\xdb\xff\xff\xff\xff"),
        ("'a'", b"\xc9\xff\xff\xff\xff\x01"),
        ("\ufeff1", b"\xc1"),
    )
)

_DTYPES = ("F64", "F32", "BF16", "I8", "BOOL", "F8_E4M3", "F4", "C64", "float32", "bfloat16", "<f4", ">f4", "<f8", "|b1", "object", "|O")  # fmt: skip


def _value(rng: random.Random) -> Any:
    """Something that is in no good file, or in another place of one."""
    kind = rng.randrange(9)
    if kind < 3:
        return rng.choice(_NUMBERS)
    if kind == 3:
        return rng.choice(NAMES)
    if kind == 4:
        return rng.choice(_LITERALS)
    if kind == 5:
        return rng.choice(_DTYPES)
    if kind == 6:
        return rng.choice((None, True, False, [], Map(), [[]], [None], Map([["a", 1]]), "NaN"))
    if kind == 7:
        return [rng.choice(_NUMBERS) for _ in range(rng.choice((1, 2, 3, 33, 1000)))]
    return rng.getrandbits(rng.choice((8, 16, 32, 62)))


# ---- trees -----------------------------------------------------------------------------------------------------------


def damaged(rng: random.Random, tree: Any) -> Any:
    """A tree of lists and Maps, changed in one to four places; the given one is changed as well."""
    root = [tree]
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4))):
        _damage(rng, root)
    return root[0]


def _damage(rng: random.Random, root: list[Any]) -> None:
    places = list(_places(root))
    holder, at = rng.choice(places)
    kind = rng.randrange(12)
    if kind < 4:
        holder[at] = _value(rng)
    elif kind == 4:
        holder[at] = _nudged(rng, holder[at])
    elif kind == 5:
        other, there = rng.choice(places)
        holder[at], other[there] = other[there], holder[at]
    elif kind == 6:
        other, there = rng.choice(places)
        holder[at] = _copied(other[there])
    else:
        inside = [h[a] for h, a in places if isinstance(h[a], (list, Map)) and h[a]]
        if not inside:
            holder[at] = _value(rng)
            return
        node = rng.choice(inside)
        entry = rng.randrange(len(node))
        if kind == 7:
            del node[entry]
        elif kind == 8:
            node.insert(rng.randrange(len(node) + 1), _copied(node[entry]))  # a key given twice
        elif kind == 9 and isinstance(node, Map):
            node[entry][0] = rng.choice((rng.choice(NAMES), rng.choice(node)[0], 3))
        elif kind == 10:
            node.insert(
                entry, [rng.choice(NAMES), _value(rng)] if isinstance(node, Map) else _value(rng)
            )
        else:
            most = max(1, _MOST_BYTES // _weight(node[entry]))
            node.extend(_copied(node[entry]) for _ in range(min(most, rng.choice((1, 10, 1000)))))


def _weight(node: Any) -> int:
    """About how many bytes a value takes when it is written."""
    if isinstance(node, Extension):
        return _weight(node.content)
    if isinstance(node, list):
        return 8 + sum(map(_weight, node))
    text = node.json if isinstance(node, Literal) else node
    return 8 + (len(text) if isinstance(text, (str, bytes)) else 0)


def _nudged(rng: random.Random, value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return rng.choice((0, 1, "true", not value))
    if isinstance(value, (int, float)):
        change = rng.choice((1, -1, 7, -value, value, 1000 * value, -2 * value))
        return value + change
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return (
            value[:at]
            + rng.choice(("", "x", "/", ".", "..", "\0", "é", value))
            + value[at + rng.randrange(2) :]
        )
    if isinstance(value, bytes):
        return mutate_bytes(rng, value)
    return [value]


def _places(node: Any) -> Iterator[tuple[Any, int]]:
    """(holder, position) of every value."""
    if isinstance(node, Extension):
        if not isinstance(node.content, bytes):
            yield from _places(node.content)
        return
    if isinstance(node, Map):
        for pair in node:
            yield pair, 1
            yield from _places(pair[1])
    elif isinstance(node, list):
        for at, value in enumerate(node):
            yield node, at
            yield from _places(value)


def _copied(node: Any) -> Any:
    if isinstance(node, Extension):
        return Extension(node.code, _copied(node.content))
    return type(node)(map(_copied, node)) if isinstance(node, list) else node


# ---- JSON, and safetensors' header -----------------------------------------------------------------------------------


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """A JSON text with other values, keys or nesting; or with damaged bytes."""
    if rng.random() < 0.15:
        return mutate_bytes(rng, data)
    return _json(damaged(rng, json.loads(data, object_pairs_hook=_map))).encode(
        "utf-8", "surrogatepass"
    )


def _map(pairs: Sequence[tuple[str, Any]]) -> Map:
    return Map([key, value] for key, value in pairs)


def _json(node: Any) -> str:
    if isinstance(node, Literal):
        return node.json
    if isinstance(node, Map):
        return "{" + ",".join(f"{json.dumps(str(k))}:{_json(v)}" for k, v in node) + "}"
    if isinstance(node, list):
        return "[" + ",".join(map(_json, node)) + "]"
    return json.dumps(node.decode("latin1") if isinstance(node, bytes) else node)


def mutate_safetensors(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with another header, length or data."""
    if rng.random() < 0.15:
        return mutate_bytes(rng, data)
    length = int.from_bytes(data[:8], "little")
    header, rest = mutate_json(rng, data[8 : 8 + length]), data[8 + length :]
    told = len(header)
    if rng.random() < 0.1:
        told = rng.choice(
            (0, 1, told - 1, told + 1, told + len(rest), 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1)
        )
    if rng.random() < 0.1:
        rest = rng.choice((b"", rest[:-1], rest + b"\0", rest * 2))
    return told.to_bytes(8, "little") + header + rest


# ---- msgpack ---------------------------------------------------------------------------------------------------------


def mutate_msgpack(rng: random.Random, data: bytes) -> bytes:
    """A msgpack file with other values, keys, lengths or nesting; or with damaged bytes."""
    if rng.random() < 0.25:
        return mutate_bytes(rng, data)
    return pack(damaged(rng, unpack(data)))


def unpack(data: bytes) -> Any:
    """msgpack as a tree, what extension types hold included."""

    def extension(code: int, content: bytes) -> Extension:
        try:
            return Extension(code, unpack(content))
        except (ValueError, msgpack.UnpackException):
            return Extension(code, content)

    return msgpack.unpackb(data, object_pairs_hook=_map, ext_hook=extension, strict_map_key=False)


def pack(node: Any) -> bytes:
    """A tree as msgpack, also where it is one that no library would write."""
    if isinstance(node, Literal):
        return node.msgpack
    if isinstance(node, Extension):
        content = node.content if isinstance(node.content, bytes) else pack(node.content)
        return b"\xc9" + struct.pack(">IB", len(content), node.code % 256) + content
    if isinstance(node, Map):
        return b"\xdf" + struct.pack(">I", len(node)) + b"".join(pack(k) + pack(v) for k, v in node)
    if isinstance(node, list):
        return b"\xdd" + struct.pack(">I", len(node)) + b"".join(map(pack, node))
    if isinstance(node, str):
        text = node.encode("utf-8", "surrogatepass")
        return b"\xdb" + struct.pack(">I", len(text)) + text
    if isinstance(node, int) and not isinstance(node, bool) and not -(2**63) <= node < 2**64:
        return b"\xcf" + struct.pack(">Q", node % 2**64)
    return msgpack.packb(node)


# ---- OCDBT -----------------------------------------------------------------------------------------------------------

_OCDBT_HEADER = struct.Struct("<4sQ")  # magic, length


def mutate_ocdbt(rng: random.Random, data: bytes) -> bytes:
    """A manifest, or a file of nodes, with damage whose length and checksum are made right again more often than not."""
    if len(data) < 20 or rng.random() < 0.2:
        return mutate_bytes(rng, data)
    inside = bytearray(data[12:-4])
    if rng.random() < 0.3:
        _redirect(rng, inside)
    else:
        inside = bytearray(mutate_bytes(rng, bytes(inside)))
    return sealed(data[:12] + inside + data[-4:])


def _redirect(rng: random.Random, data: bytearray) -> None:
    """Puts a path that leads elsewhere over that of a data file, in its length."""
    at = data.find(b"d/")
    if at < 0:
        return
    path = rng.choice((b"../outside/data", b"/etc/passwd", b"d/../../outside/data", b"d/\0"))
    length = rng.choice((34, 20, len(path)))
    path = (b"./" * (max(0, length - len(path)) // 2) + path)[:length]
    data[at : at + len(path)] = path[: max(0, len(data) - at)]


def sealed(data: bytes) -> bytes:
    """An OCDBT file or node with its length and its crc32c made to fit."""
    data = _OCDBT_HEADER.pack(data[:4], len(data)) + data[12:-4]
    return data + crc32c.crc32c(data).to_bytes(4, "little")


# ---- bytes -----------------------------------------------------------------------------------------------------------

_INTEGERS = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0xFFFFFFFF,
    2**32,
    2**40,
    2**63 - 1,
    2**64 - 1,
)


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bits turned over, numbers put in, runs cut out, doubled, moved or overwritten; the end cut off."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        at = rng.randrange(len(result) + 1)
        run = rng.choice((1, 1, 2, 4, 8, 16, 64))
        kind = rng.randrange(9)
        if kind <= 1 and at < len(result):
            result[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            number = rng.choice(_INTEGERS)
            width = rng.choice((1, 2, 4, 8))
            result[at : at + width] = (number % 256**width).to_bytes(
                width, rng.choice(("little", "big"))
            )
        elif kind == 3:
            del result[at : at + run]
        elif kind == 4:
            result[at:at] = result[max(0, at - run) : at]
        elif kind == 5:
            result[at : at + run] = bytes([rng.choice((0, 1, 0x20, 0x7F, 0x80, 0xFF))]) * run
        elif kind == 6:
            result[at:at] = rng.randbytes(run)
        elif kind == 7:
            there = rng.randrange(len(result) + 1)
            result[at : at + run] = result[there : there + run]
        elif rng.random() < 0.4:
            del result[at:]
    return bytes(result)


# ---- chunks ----------------------------------------------------------------------------------------------------------


def zstd_bomb(nbytes: int) -> bytes:
    """A zstd frame (RFC 8878) that becomes so many zeros: blocks that repeat one byte, four bytes for each 128 KiB."""
    block = 128 << 10
    full, rest = divmod(nbytes, block)
    sizes = [block] * full + ([rest] if rest or not full else [])
    blocks = [
        ((size << 3) | (1 << 1) | (number == len(sizes) - 1)).to_bytes(3, "little") + b"\0"
        for number, size in enumerate(sizes)
    ]
    return b"\x28\xb5\x2f\xfd" + b"\x00\x38" + b"".join(blocks)  # no size told, a window of 128 KiB
