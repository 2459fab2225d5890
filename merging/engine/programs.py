"""The engine's programs for arrays that nobody has: what `merge_params` runs for one leaf, traced from shapes alone.

For looking at what a compiler makes of them (`compiled.figures`) before there is a device, and for keeping their
promises: a merge touches little more than the bytes it can't avoid and communicates nothing, a survey pass
communicates counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from merging.engine.compiled import Figures, figures
from merging.engine.groups import group_by_scale, without_scale
from merging.engine.resident import EDGES
from merging.engine.step import Facts, Geometry, Question, count_step, merge_step
from merging.methods import snake_case
from merging.methods.method import Method, TaskVectorMethod
from merging.paths import of_tree_path

# Bytes touched over the unavoidable ones. A merge is one fusion, with a few bytes for thresholds and keys beside it; a
# survey holds its partial counts on the chip, which the compiler counts as bytes too.
MOST_TRAFFIC_OF_MERGE = 1.02
MOST_TRAFFIC_OF_SURVEY = 1.05
COUNTS = frozenset({"u32", "s32", "u64", "s64"})  # what a survey may send; parameters are floats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One program to be compiled, and what it may ask of a device.

    Attributes:
      lower: traces it.
      elements: of the result or the leaf on one device, for counts per element; None where such counts say nothing.
      tokens: that one call reads or writes, over all devices; None where it has none.
      arguments: a tree of ShapeDtypeStructs with shardings, so that they can be named; None where one leaf is all.
      has_64_bits: whether it is traced and compiled with 64-bit types enabled.
      most_traffic: bytes accessed over the unavoidable ones.
      may_send: HLO's dtypes that collectives may move.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    elements: int | None = None
    tokens: int | None = None
    arguments: Any = None
    has_64_bits: bool = False
    most_traffic: float = math.inf
    may_send: frozenset[str] = frozenset()

    def compile(self) -> Figures:
        """Raises ValueError where the compiler refuses it, for lack of memory for example."""
        with jax.enable_x64(True) if self.has_64_bits else contextlib.nullcontext():
            lowered = self.lower()
            started = time.perf_counter()
            try:
                compiled = lowered.compile()
            except jax.errors.JaxRuntimeError as error:
                raise ValueError(f"{self.name} does not compile: {error}") from error
        return figures(compiled, compile_seconds=time.perf_counter() - started)

    def largest_arguments(self, count: int) -> list[tuple[str, int]]:
        """(path, bytes on one device) of the largest arguments."""
        sizes = [
            (
                of_tree_path(path[1:]) or f"argument {of_tree_path(path)}",
                math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
            )
            for path, leaf in jax.tree.leaves_with_path(self.arguments)
        ]
        return sorted(sizes, key=lambda each: -each[1])[:count]

    def shortfalls(self, found: Figures) -> list[str]:
        """What it asks for beyond what it may, in words."""
        told = []
        if found.traffic > self.most_traffic:
            told.append(
                f"{self.name} touches {found.traffic:.4f} of the unavoidable bytes, wanted at most"
                f" {self.most_traffic}"
            )
        for kind, each in found.collectives.items():
            if not self.may_send.issuperset(each.dtypes):
                wanted = ", ".join(sorted(self.may_send)) or "no collective"
                told.append(f"{self.name}: {kind} moves {', '.join(each.dtypes)}, wanted {wanted}")
        return told


def merge_programs(
    methods: Sequence[Method],
    *,
    shape: tuple[int, ...],
    dtype: np.dtype,
    experts: int,
    sharding: NamedSharding,
    stacked: int | None,
) -> Iterator[Program]:
    """The merge of each method and the survey passes before it, for one leaf of a base and so many experts.

    A survey pass is named `survey` where it narrows thresholds (EDGES a pass) and `votes` where it counts the votes
    under the thresholds found. The L1 norms of `rescale="l1"`, which read their inputs once for each of 32 ranges of
    exponents, are left out.
    """
    for method in methods:
        yield from _Leaf(shape, dtype, experts, sharding, stacked).programs(method)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    shape: tuple[int, ...]
    dtype: np.dtype
    experts: int
    sharding: NamedSharding
    stacked: int | None

    def programs(self, method: Method) -> Iterator[Program]:
        kind = "one tensor" if self.stacked is None else "stacked"
        name = f"{snake_case(type(method).__name__)}, {kind}"
        elements = math.prod(self.sharding.shard_shape(self.shape))
        facts = Facts(
            thresholds=None if method.trim_fraction is None else self._per_layer(np.float32),
            majority=np.float32(1) if method.asks_majority else None,
            l1=self._per_layer(np.float32) if method.asks_l1 else None,
        )
        yield Program(
            name=f"merge {name}",
            lower=lambda: self._lower_merge(method, facts),
            elements=elements,
            most_traffic=MOST_TRAFFIC_OF_MERGE,
        )
        passes = []
        if method.trim_fraction is not None:
            passes.append(("survey", EDGES, Facts(l1=facts.l1)))
        if method.asks_majority:
            passes.append(("votes", 0, dataclasses.replace(facts, majority=None)))
        for what, edges, known in passes:
            yield Program(
                name=f"{what} {name}",
                lower=lambda edges=edges, known=known: self._lower_count(method, edges, known),
                elements=elements,
                has_64_bits=True,
                most_traffic=MOST_TRAFFIC_OF_SURVEY,
                may_send=COUNTS,
            )

    def _lower_merge(self, method: Method, facts: Facts) -> jax.stages.Lowered:
        groups, _, _ = group_by_scale([method])
        return merge_step.lower(
            groups,
            (facts,),
            *self._inputs(),
            np.zeros(2, np.uint32),
            geometry=whole_leaf(self.shape, self.stacked),
            out_dtype=self.dtype,
        )

    def _lower_count(
        self, method: TaskVectorMethod, edges: int, known: Facts
    ) -> jax.stages.Lowered:
        return count_step.lower(
            Question(without_scale(method), known, None),
            *self._inputs(),
            self._per_layer(np.float32, edges),
            geometry=whole_leaf(self.shape, self.stacked),
        )

    def _inputs(self) -> tuple[Any, ...]:
        """Base and experts without data, and keys of their masks."""
        leaf = jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=self.sharding)
        return leaf, (leaf,) * self.experts, self._per_layer(np.uint32, 2)

    def _per_layer(self, dtype: type[np.generic], *each: int) -> np.ndarray:
        """[N, *each] or [N, *each, L]: what `merge_params` hands over from the host, whole to every device."""
        layers = () if self.stacked is None else (self.shape[self.stacked],)
        return np.zeros((self.experts, *each, *layers), dtype)


def whole_leaf(shape: tuple[int, ...], stacked: int | None) -> Geometry:
    """The geometry of a whole leaf, as `merge_params` has it."""
    tensor = [size for axis, size in enumerate(shape) if axis != stacked]
    strides = [math.prod(tensor[i + 1 :]) for i in range(len(tensor))]
    if stacked is not None:
        strides.insert(stacked, 0)
    return Geometry(shape, tuple(strides), wide=math.prod(tensor) > 2**32, stacked=stacked)
