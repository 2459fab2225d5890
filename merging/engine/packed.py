"""Yes-or-no facts about many elements at once: packed into bytes on the device, counted and found on the host."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, UInt8


def pack(fields: Sequence[Sequence[Bool[Array, "*shape"]]]) -> list[UInt8[Array, "*shape"]]:
    """Bits of each field in bytes of their own, lowest bit first; inside a jitted computation.

    Built as 32-bit words first: XLA:CPU packs into 8-bit lanes three times slower.
    """
    placed = []  # one entry a bit: (number of the byte, place in it, bit)
    byte = 0
    for field in fields:
        placed.extend((byte + i // 8, i % 8, bit) for i, bit in enumerate(field))
        byte += -(-len(field) // 8)
    words = []
    for first in range(0, byte, 4):
        word = jnp.uint32(0)
        for number, place, bit in placed:
            if first <= number < first + 4:
                flag = jnp.uint32(1 << (8 * (number - first) + place))
                word = word | jnp.where(bit, flag, jnp.uint32(0))
        words.append(jax.lax.optimization_barrier(word))
    return [(words[i // 4] >> jnp.uint32(8 * (i % 4))).astype(jnp.uint8) for i in range(byte)]


_ROWS = 128  # words added up in their bytes at once: at most 255, or a byte would overflow


def count_bits(field: np.ndarray, number: int) -> list[int]:
    """How often each of the lowest bits is set in a uint8 array."""
    whole = len(field) // (8 * _ROWS) * (8 * _ROWS)
    words, tail = field[:whole].view(np.uint64).reshape(_ROWS, -1), field[whole:]
    counts = []
    for bit in range(number):
        # One bit of eight bytes at a time; each byte of a sum counts one of them.
        sums = ((words >> np.uint64(bit)) & np.uint64(0x0101010101010101)).sum(axis=0)
        in_tail = np.count_nonzero(tail & np.uint8(1 << bit))
        counts.append(int(sums.view(np.uint8).sum(dtype=np.int64)) + int(in_tail))
    return counts


def count_fields(fields: Sequence[np.ndarray], number: int) -> np.ndarray:
    """The same of `number` bits that fill the bytes one after another: int64 [number]."""
    return np.array(
        [c for i, field in enumerate(fields) for c in count_bits(field, min(8, number - 8 * i))],
        np.int64,
    )


def nonzero_in_any(fields: Sequence[np.ndarray]) -> np.ndarray:
    """Where any of the byte arrays is not zero: int64 [any], ascending."""
    combined = fields[0]
    for field in fields[1:]:
        combined = combined | field
    # As booleans: numpy finds them three times faster than numbers, or than words of eight bytes.
    return np.flatnonzero(combined != 0)
