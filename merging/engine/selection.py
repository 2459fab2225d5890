"""What is done to which tensor: whether it is merged, with which settings, and whose facts that takes.

A pattern is a shell pattern of leaf names or canonical paths (`paths.Patterns`); of a stacked leaf it may name single layers
(`layers/7/*`), as in the unstacked one.

INCLUDE and EXCLUDE choose what is merged; the rest is the base's, and enters no count of the whole model. PATTERNS gives tensors
settings of their own: the first pattern that a tensor is like replaces the fields it names in every method that has them. Tensors
of one merge that share all settings but the scale are one model to the trim and to the majority sign: a density of their own
gives them a threshold of their own.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from merging.engine.groups import without_scale
from merging.engine.pieces import Tensor
from merging.methods.method import Method, TaskVectorMethod
from merging.paths import Patterns, canonical

SETTABLE = ("scale", "density", "weights")


@dataclasses.dataclass(frozen=True)
class Selection:
    """Patterns as they were given: INCLUDE, EXCLUDE and PATTERNS."""

    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    patterns: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def check(self, merges: Mapping[str, Method], experts: int) -> None:
        """Raises ValueError for patterns and settings that are wrong whatever the model."""
        for macro, given in (("INCLUDE", self.include), ("EXCLUDE", self.exclude)):
            if isinstance(given, str) or not all(isinstance(each, str) for each in given):
                raise ValueError(
                    f"{macro} is {given!r}: give a list of patterns, such as ['*mlp*']"
                )
        if not isinstance(self.patterns, Mapping):
            raise ValueError(
                f"PATTERNS is {self.patterns!r}: give {{pattern: {{setting: value}}}}, such as {{'*mlp*': {{'scale': 0.5}}}}"
            )
        for pattern, settings in self.patterns.items():
            if not isinstance(settings, Mapping) or not settings:
                raise ValueError(
                    f"PATTERNS[{pattern!r}] is {settings!r}: give {{setting: value}} with one of {', '.join(SETTABLE)}"
                )
            for name in settings:
                if name not in SETTABLE:
                    near = difflib.get_close_matches(name, SETTABLE, 1)
                    raise ValueError(
                        f"PATTERNS[{pattern!r}] sets {name!r}, which is none of {', '.join(SETTABLE)}"
                        + (f": did you mean {near[0]!r}?" if near else "")
                    )
                if not any(hasattr(method, name) for method in merges.values()):
                    methods = ", ".join(sorted({type(m).__name__ for m in merges.values()}))
                    raise ValueError(
                        f"PATTERNS[{pattern!r}] sets {name!r}, which {methods} does not have"
                    )
            for method in merges.values():
                try:
                    _with(method, settings).check(experts)
                except ValueError as error:
                    raise ValueError(f"PATTERNS[{pattern!r}]: {error}") from error

    def check_used(self, names: Sequence[Sequence[str]]) -> None:
        """Raises ValueError for a pattern that no tensor is like; `names` are those of every tensor."""
        for macro, patterns in (
            ("INCLUDE", self.include),
            ("EXCLUDE", self.exclude),
            ("PATTERNS", self.patterns),
        ):
            for pattern in Patterns(patterns).unused(names):
                if pattern != "*":
                    raise _no_leaf(macro, pattern, [each[0] for each in names])
        if names and not any(self.is_merged(each) for each in names):
            raise ValueError("INCLUDE and EXCLUDE leave nothing to merge")

    def is_merged(self, names: Sequence[str]) -> bool:
        """Whether a tensor of these names is merged."""
        return self._included.first(names) is not None and self._excluded.first(names) is None

    def method(self, names: Sequence[str], method: Method) -> Method:
        """The method as it merges a tensor of these names."""
        pattern = self._set.first(names)
        return method if pattern is None else _with(method, self.patterns[pattern])

    @functools.cached_property
    def _included(self) -> Patterns:
        return Patterns(self.include)

    @functools.cached_property
    def _excluded(self) -> Patterns:
        return Patterns(self.exclude)

    @functools.cached_property
    def _set(self) -> Patterns:
        return Patterns(self.patterns)


def check_tied(pairs: Mapping[str, str], leaves: Sequence[str]) -> None:
    """Raises ValueError for a name in TIED that is none of the leaves of base and experts, however they are spelled."""
    known = set(map(canonical, leaves))
    for name in (each for pair in pairs.items() for each in pair):
        if canonical(name) not in known:
            raise _no_leaf("TIED", name, leaves)


def names_of(tensor: Tensor) -> tuple[str, str]:
    """What patterns are held against: the leaf's name, and the tensor's path."""
    return tensor.leaf.name, tensor.path


def _no_leaf(macro: str, pattern: str, leaves: Sequence[str]) -> ValueError:
    """That no leaf is like a pattern, with what it may have meant."""
    near = difflib.get_close_matches(pattern, leaves, 2, cutoff=0.7)
    if near:
        advice = f"did you mean {' or '.join(near)}?"
    else:
        advice = f"leaves are named like {leaves[0] if leaves else '(none)'}"
    return ValueError(f"{macro} has {pattern!r}, which no leaf is like; {advice}")


def _with(method: Method, settings: Mapping[str, Any]) -> Method:
    changes = {name: value for name, value in settings.items() if hasattr(method, name)}
    return dataclasses.replace(method, **changes)


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a survey has to find out: facts that a method wants of some tensors, taken as one model."""

    method: TaskVectorMethod
    tensors: tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How tensors are merged.

    Attributes:
      methods: of the merges, in their order.
      asked: for each, the number of its question, or None.
    """

    methods: tuple[Method, ...]
    asked: tuple[int | None, ...]


class Recipes:
    """The recipe of every tensor, and the questions they ask; merges that differ in scale share them.

    Attributes:
      questions: each distinct one.
      of: recipes by the tensor's path.
    """

    def __init__(
        self, merges: Mapping[str, Method], tensors: Sequence[Tensor], selection: Selection
    ):
        methods = {
            tensor.path: tuple(
                selection.method(names_of(tensor), method) for method in merges.values()
            )
            for tensor in tensors
        }
        asking: dict[tuple[int, Method], list[Tensor]] = {}
        for tensor in tensors:
            for merge, method in enumerate(methods[tensor.path]):
                if method.asks_survey:
                    asking.setdefault((merge, without_scale(method)), []).append(tensor)
        numbers: dict[tuple[Method, tuple[str, ...]], int] = {}
        number_of: dict[tuple[int, Method], int] = {}
        self.questions: list[Asked] = []
        for (merge, method), of_tensors in asking.items():
            key = method, tuple(tensor.path for tensor in of_tensors)
            if key not in numbers:
                numbers[key] = len(self.questions)
                self.questions.append(Asked(method, tuple(of_tensors)))
            number_of[merge, method] = numbers[key]
        self.of = {
            path: Recipe(
                each,
                tuple(number_of.get((i, without_scale(m))) for i, m in enumerate(each)),
            )
            for path, each in methods.items()
        }
