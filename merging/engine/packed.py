"""Yes-or-no facts about many elements at once: packed into words on the device, counted and found on the host.

A word is 32 bits of one element. Its *counted* bits are spread over its four bytes, so that one shift of eight bytes
lines up four facts of two elements, and counting twelve takes three passes; its *found* bits lie above them, so that one
mask tells the elements that have any. (XLA:CPU takes three times longer to write the same facts as bytes, and its own
reductions take longer than the passes.)
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, UInt32

IN_A_WORD = 12  # counted bits, and found bits
_FOUND = np.uint32(0x38383838)
ALARM = np.uint32(1 << 6)  # of the first word: a bit beside counted and found ones

_ROWS = 128  # words added up in their bytes at once: at most 255, or a byte would overflow


def counted_bit(number: int) -> np.uint32:
    """Where a word (the `number // IN_A_WORD`-th) has this counted bit."""
    place = number % IN_A_WORD
    return np.uint32(1 << (8 * (place % 4) + place // 4))


def found_bit(number: int) -> np.uint32:
    """Where a word (the `number // IN_A_WORD`-th) has this found bit."""
    return np.uint32(counted_bit(number) << np.uint32(3))


def pack(
    counted: Sequence[Bool[Array, "*shape"]],
    found: Sequence[Bool[Array, "*shape"]] = (),
    alarm: Bool[Array, "*shape"] | None = None,
) -> list[UInt32[Array, "*shape"]]:
    """The words of every element, as few as hold all bits; inside a jitted computation."""
    placed = [(i // IN_A_WORD, counted_bit(i), bit) for i, bit in enumerate(counted)]
    placed += [(i // IN_A_WORD, found_bit(i), bit) for i, bit in enumerate(found)]
    if alarm is not None:
        placed.append((0, ALARM, alarm))
    words = [jnp.uint32(0)] * (1 + max(number for number, _, _ in placed))
    for number, flag, bit in placed:
        words[number] = words[number] | jnp.where(bit, jnp.uint32(flag), jnp.uint32(0))
    return words


def count(words: Sequence[np.ndarray], number: int) -> np.ndarray:
    """How many elements have each of the first `number` counted bits: int64 [number].

    Args:
      words: uint32 [elements] each, as `pack` made them.
    """
    counts = np.zeros((len(words), 3, 4), np.int64)  # word, place in its bytes, byte
    for word, of_word in zip(words, counts, strict=True):
        whole = len(word) // (2 * _ROWS) * (2 * _ROWS)
        pairs = word[:whole].view(np.uint64).reshape(_ROWS, -1)
        shifted = np.empty_like(pairs)
        for place in range(min(3, -(-number // 4))):
            np.right_shift(pairs, np.uint64(place), out=shifted)
            np.bitwise_and(shifted, np.uint64(0x0101010101010101), out=shifted)
            sums = shifted.sum(axis=0).view(np.uint8).reshape(-1, 4)
            of_word[place] = sums.sum(axis=0, dtype=np.int64)
            for byte in range(4):
                flag = np.uint32(1 << (8 * byte + place))
                of_word[place, byte] += np.count_nonzero(word[whole:] & flag)
    return counts.reshape(-1)[:number]


def has_alarm(words: Sequence[np.ndarray]) -> bool:
    """Whether any element has the alarm bit."""
    return bool(np.bitwise_or.reduce(words[0]) & ALARM)


def with_any_found(words: Sequence[np.ndarray]) -> np.ndarray:
    """The elements that have any found bit: int64 [any], ascending."""
    together = words[0]
    for word in words[1:]:
        together = together | word
    # As booleans: numpy finds them three times faster than numbers.
    return np.flatnonzero((together & _FOUND) != 0)
