"""Random choices that depend on nothing but a path such as (seed, dataset, split, index), and the split of a content.

Only `random.Random.random()` is used, whose sequence Python promises to keep: the same path gives the same text under
any version. Splits share nothing by construction: the content of an example is hashed, and the hash says which split it
belongs to; a generator for another split draws again.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Literal, TypeVar

Item = TypeVar("Item")
Split = Literal["train", "validation", "test"]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
TENTHS: dict[Split, range] = {
    "train": range(0, 7),
    "validation": range(7, 8),
    "test": range(8, 10),
}


class Draw:
    """A sequence of choices, the same for the same path."""

    def __init__(self, *path: str | int) -> None:
        self._random = random.Random(_digest(path))

    def below(self, n: int) -> int:
        """A whole number from 0 to n - 1."""
        return int(self._random.random() * n)

    def heads(self) -> bool:
        return self.below(2) == 0

    def pick(self, items: Sequence[Item]) -> Item:
        return items[self.below(len(items))]

    def some(self, items: Sequence[Item], n: int) -> list[Item]:
        """n different items in random order."""
        pool = list(items)
        for i in range(n):
            j = i + self.below(len(pool) - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:n]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        return self.some(items, len(items))

    def placed(self, right: Item, wrong: Sequence[Item], position: int) -> list[Item]:
        """The wrong items in random order, with the right one at `position`."""
        items = self.shuffled(wrong)
        items.insert(position, right)
        return items


def split_of(content: Sequence[str]) -> Split:
    """The split that a content belongs to: seven tenths train, one validation, two test."""
    tenth = _digest(content) % 10
    return next(split for split in SPLITS if tenth in TENTHS[split])


def _digest(path: Sequence[str | int]) -> int:
    text = "\0".join(map(str, path))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
