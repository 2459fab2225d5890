"""The keep masks element by element in Python integers: what the fused hash must equal.

A draw is triple32 (https://github.com/skeeto/hash-prospector) of the low word of the element's index, with one key word
put in before and another, moved by the index's high word, after its first round. An element is kept if its draw is
among the first density * 2^32.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np

from tests.oracle.float32 import Masks

WORD = 2**32


def key(seed: int, expert: int, path: str) -> tuple[int, int]:
    """Two words of BLAKE2b of the three, NUL between them."""
    text = b"\0".join([str(seed).encode(), str(expert).encode(), path.encode()])
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    return number % WORD, number // WORD


def draw(words: tuple[int, int], index: int) -> int:
    """32 bits of an element."""
    high, x = divmod(index, WORD)
    x ^= words[0]
    x ^= x >> 17
    x = x * 0xED5AD4BB % WORD
    x ^= (words[1] + high * 0x9E3779B9) % WORD
    x ^= x >> 11
    x = x * 0xAC4C1B51 % WORD
    x ^= x >> 15
    x = x * 0x31848BAB % WORD
    return x ^ x >> 14


def kept(drawn: int, density: float) -> bool:
    """Whether a draw is among the first density * 2^32 (at least one); density is rounded to float32 first."""
    return drawn < max(int(float(np.float32(density)) * WORD), 1)


def masks(
    shapes: Mapping[str, tuple[int, ...]], *, seed: int, density: float | Sequence[float]
) -> Masks:
    """The masks of a model of small leaves, by canonical path; a density for all experts or one for each."""

    def mask(expert: int, name: str) -> np.ndarray:
        drawn = _draws(key(seed, expert, name), math.prod(shapes[name]))
        keep = density[expert] if isinstance(density, Sequence) else density
        return np.array([kept(x, keep) for x in drawn], bool).reshape(shapes[name])

    return mask


@functools.cache  # settings of one method share them
def _draws(words: tuple[int, int], count: int) -> list[int]:
    return [draw(words, index) for index in range(count)]
