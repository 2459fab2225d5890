"""Leaf names as paths: one spelling for what frameworks write differently.

`layers_7`, `layers/7`, `layers.7` and entry 7 of a leaf stacked under `layers` are one path. Keep masks and patterns go
by these paths, so a scanned checkpoint and its unscanned copy draw the same masks. Other spellings are joined by a layout.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax

_NUMBERED = re.compile(r"(.*[^0-9_])_(\d+)")


def canonical(name: str) -> str:
    """`decoder.layers_7.mlp/kernel` -> `decoder/layers/7/mlp/kernel`."""
    parts = []
    for part in re.split(r"[./]", name):
        numbered = _NUMBERED.fullmatch(part)
        parts.extend(numbered.groups() if numbered else (part,))
    return "/".join(parts)


def of_tree_path(path: tuple[Any, ...]) -> str:
    """A JAX key path -> `decoder/layers_7/mlp/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def of_leaves(tree: Any) -> list[str]:
    """The paths of a tree's leaves, in its order."""
    return [of_tree_path(path) for path, _ in jax.tree.leaves_with_path(tree)]


def is_like(name: str, patterns: Iterable[str]) -> bool:
    """Whether a leaf's name, as it stands or as a canonical path, is like one of some shell patterns: `*mlp*`."""
    return Patterns(patterns).first([name]) is not None


class Patterns:
    """Shell patterns in an order, for many leaves: each is compiled once, and those without a wildcard are looked up."""

    def __init__(self, patterns: Iterable[str]):
        self._patterns = list(patterns)
        self._plain: dict[str, int] = {}
        self._wild: list[tuple[int, re.Pattern[str]]] = []
        for number, pattern in enumerate(self._patterns):
            if re.search(r"[*?[]", pattern):
                self._wild.append((number, re.compile(fnmatch.translate(pattern))))
            else:
                self._plain.setdefault(pattern, number)

    def first(self, names: Iterable[str]) -> str | None:
        """The first pattern that one of these names is like, as it stands or as a canonical path."""
        names = _spellings(names)
        first = min((self._plain[each] for each in names if each in self._plain), default=None)
        for number, regex in self._wild:
            if first is not None and number > first:
                break
            if any(regex.match(each) for each in names):
                first = number
                break
        return None if first is None else self._patterns[first]

    def unused(self, leaves: Iterable[Iterable[str]]) -> list[str]:
        """The patterns that no leaf is like, each given by its names."""
        every = [name for names in leaves for name in _spellings(names)]
        found = {self._plain[name] for name in every if name in self._plain}
        found |= {n for n, regex in self._wild if any(regex.match(name) for name in every)}
        return [pattern for n, pattern in enumerate(self._patterns) if n not in found]


def _spellings(names: Iterable[str]) -> tuple[str, ...]:
    names = tuple(names)
    return tuple(dict.fromkeys((*names, *map(canonical, names))))


class Stacked:
    """Which leaves hold all layers in one array, and along which axis.

    Built from `{pattern: axis}`. A pattern is a canonical path in which `*` stands for any characters; a pattern
    without one also covers everything below it. The layer's index goes behind the last plain part that stands before a
    `*` part (behind the whole pattern where there is none): `{"decoder/layers/*": 1}` makes entry 7 of
    `decoder/layers/mlp/wi/kernel` the path `decoder/layers/7/mlp/wi/kernel`.
    """

    def __init__(self, patterns: Mapping[str, int] | None):
        self.patterns = dict(patterns or {})
        self._compiled = [
            (pattern, self._compile(pattern), axis) for pattern, axis in self.patterns.items()
        ]
        for pattern, axis in self.patterns.items():
            if not isinstance(axis, int) or isinstance(axis, bool) or axis < 0:
                raise ValueError(
                    f"stacked[{pattern!r}] is {axis!r}: give the axis over layers, 0 or more"
                )

    @staticmethod
    def _compile(pattern: str) -> re.Pattern[str]:
        parts = canonical(pattern).split("/")
        wild = [i for i, part in enumerate(parts) if "*" in part]
        plain = [i for i in range(max(wild, default=len(parts))) if "*" not in parts[i]]
        if not plain:
            raise ValueError(
                f"the stacked pattern {pattern!r} has no plain part: name the part that holds the layers, as in"
                " 'decoder/layers/*'"
            )
        cut = plain[-1] + 1
        head, tail = ("/".join(map(_glob, p)) for p in (parts[:cut], parts[cut:]))
        return re.compile(f"({head})(/{tail})" if tail else f"({head})(|/.*)")

    def axis(self, name: str) -> int | None:
        """The axis over layers of this leaf, or None."""
        return next(
            (axis for _, regex, axis in self._compiled if regex.fullmatch(canonical(name))), None
        )

    def layer_path(self, name: str, layer: int) -> str:
        """The canonical path of one layer's tensor in a stacked leaf."""
        path = canonical(name)
        for _, regex, _ in self._compiled:
            match = regex.fullmatch(path)
            if match:
                return f"{match[1]}/{layer}{match[2]}"
        raise AssertionError(f"{name} is not stacked")

    def unused(self, names: list[str]) -> list[str]:
        """The patterns that match no leaf."""
        return [
            pattern
            for pattern, regex, _ in self._compiled
            if not any(regex.fullmatch(canonical(name)) for name in names)
        ]


def _glob(part: str) -> str:
    return ".*".join(map(re.escape, part.split("*")))
