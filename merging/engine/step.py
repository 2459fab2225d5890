"""The jitted steps that everything runs: disk to disk or resident, sliced or whole, on one device or a pod.

`merge_step` merges one piece by all methods; `survey_step` says of every element on which side of each bracket its
magnitude lies and how the vote goes, packed in words that the host counts; `count_step` counts the same on the
devices, for arrays too many to bring to a host; `codes_step` gives exact magnitudes of gathered elements.

A piece is a box of one tensor. All steps are elementwise but for `whole` methods, so any sharding of the inputs is kept
and nothing is communicated, except the counts of `count_step`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

from merging.engine.packed import pack
from merging.kernels.election import elect, ordered_sum
from merging.kernels.element_index import ElementIndex, element_index
from merging.kernels.magnitude import magnitude_to_code
from merging.kernels.masks import keep_mask
from merging.methods.method import (
    Draw,
    Method,
    Survey,
    TaskVectorMethod,
    apply_direction,
    task_vectors,
)
from merging.methods.ties import trim

AnyArray = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Where the elements of a box lie in their tensor; static in every step.

    Attributes:
      shape: of the box.
      strides: elements of the tensor per step along each axis; 0 along the stacked axis.
      wide: whether the tensor has more than 2^32 elements.
      stacked: the axis of the box over layers, whose keys and facts are one per layer; None for one tensor.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    wide: bool
    stacked: int | None = None

    def per_layer(self, values: Array) -> Array:
        """[..., L] spread over the box's stacked axis; [...] scalars are left as they are."""
        if self.stacked is None:
            return values
        tail = [1] * len(self.shape)
        tail[self.stacked] = self.shape[self.stacked]
        return values.reshape(values.shape[:-1] + tuple(tail))


@dataclasses.dataclass(frozen=True)
class Facts:
    """`Survey` as arrays, one number per expert (and per layer of a stacked box): what a step is handed.

    Attributes:
      thresholds, l1: float32 [N] or [N, L]; None where the method did not ask.
      majority: float32 [], or None.
    """

    thresholds: AnyArray | None = None
    majority: AnyArray | None = None
    l1: AnyArray | None = None

    def survey(self, geometry: Geometry) -> Survey:
        """The same as the methods read it."""
        spread = lambda x: () if x is None else tuple(geometry.per_layer(row) for row in x)  # noqa: E731
        return Survey(
            thresholds=spread(self.thresholds), majority=self.majority, l1=spread(self.l1)
        )


jax.tree_util.register_dataclass(
    Facts, data_fields=["thresholds", "majority", "l1"], meta_fields=[]
)


@dataclasses.dataclass(frozen=True)
class Group:
    """Merges that differ in their scale alone, or one method without a scale.

    Attributes:
      method: its own scale is not read where `scales` is given.
      scales: float32 [S], one output each; None for a plain method with one output.
    """

    method: Method
    scales: AnyArray | None


jax.tree_util.register_dataclass(Group, data_fields=["method", "scales"], meta_fields=[])


def draw_for(keys: UInt32[Array, "n 2 *layers"], index: ElementIndex, geometry: Geometry) -> Draw:
    def draw(expert: int, keep: Float[Array, ""]) -> Bool[Array, "*shape"]:
        key0, key1 = geometry.per_layer(keys[expert, 0]), geometry.per_layer(keys[expert, 1])
        return keep_mask(key0, key1, index.low, index.high, keep)

    return draw


def _index(geometry: Geometry, offset: UInt32[Array, "2"]) -> ElementIndex:
    return element_index(
        geometry.shape, geometry.strides, (offset[0], offset[1]), wide=geometry.wide
    )


# A worker of the stream has a core to itself: a step that XLA:CPU splits over a pool of threads would wait for the slowest
# of them, which on a busy machine costs more than it gains. Steps on whole leaves in memory keep all cores.
ONE_THREAD = {"xla_cpu_multi_thread_eigen": False}


def in_worker(step: Any, *static: str) -> Any:
    """A jitted step as the stream's workers run it: the same program, on one thread."""
    return jax.jit(step.__wrapped__, static_argnames=static, compiler_options=ONE_THREAD)


# ---- merge ----------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("geometry", "out_dtype"))
def merge_step(
    groups: tuple[Group, ...],
    facts: tuple[Facts, ...],
    base: Float[Array, "*shape"],
    experts: tuple[Float[Array, "*shape"], ...],
    keys: UInt32[Array, "n 2 *layers"],
    offset: UInt32[Array, "2"],
    *,
    geometry: Geometry,
    out_dtype: np.dtype,
) -> list[Float[Array, "*shape"]]:
    """One piece merged by every group.

    Args:
      groups, facts: what to do and what was surveyed for it, aligned.
      base, experts: the same box of each checkpoint, any float dtypes.
      keys: `tensor_key` of each expert (and layer).
      offset: low and high word of the flat index of the box's first element in its tensor.
      geometry: the box.
      out_dtype: stored type; the only rounding besides float32's.

    Returns:
      The outputs, group by group and scale by scale. An element for which any input is not finite is not finite in
      any output, even where the method would have trimmed or dropped it, so that checking the outputs is enough.
    """
    draw = draw_for(keys, _index(geometry, offset), geometry)
    clean = _all_inputs_finite(base, experts)
    return [
        jnp.where(clean, merged, jnp.float32(jnp.nan)).astype(out_dtype)
        for group, fact in zip(groups, facts, strict=True)
        for merged in _merge_group(group, fact, base, experts, draw, geometry)
    ]


def _merge_group(
    group: Group,
    fact: Facts,
    base: Float[Array, "*shape"],
    experts: Sequence[Float[Array, "*shape"]],
    draw: Draw,
    geometry: Geometry,
) -> list[Float[Array, "*shape"]]:
    method, survey = group.method, fact.survey(geometry)
    if method.kind == "whole" and geometry.stacked is not None:
        axis = geometry.stacked
        layers = [
            method(
                jnp.take(base, layer, axis),
                [jnp.take(expert, layer, axis) for expert in experts],
                survey=survey,
                draw=draw,
            )
            for layer in range(geometry.shape[axis])
        ]
        return [jnp.stack(layers, axis)]
    if group.scales is None:
        return [method(base, experts, survey=survey, draw=draw)]
    direction = method.direction(base, experts, survey=survey, draw=draw)
    if len(group.scales) > 1:
        # Keeps XLA from computing the direction anew for each scale.
        direction = jax.lax.optimization_barrier(direction)
    return [apply_direction(base, direction, scale) for scale in group.scales]


def _all_inputs_finite(
    base: Float[Array, "*shape"], experts: Sequence[Float[Array, "*shape"]]
) -> Bool[Array, "*shape"]:
    """False where any input is NaN or infinite (or where finite ones are so large that their sum overflows)."""
    return jnp.isfinite(ordered_sum(task_vectors(base, experts)))


# ---- survey on a host -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Question:
    """What one method needs counted, for one tensor.

    Attributes:
      method: a TaskVectorMethod; its scale does not matter.
      facts: what is known already (L1 ratios).
      edges: float32 [N, 3] or None: magnitudes low, high and guess of each expert's bracket.
    """

    method: TaskVectorMethod
    facts: Facts
    edges: AnyArray | None


jax.tree_util.register_dataclass(Question, data_fields=["method", "facts", "edges"], meta_fields=[])


@functools.partial(jax.jit, static_argnames=("geometry",))
def survey_step(
    questions: tuple[Question, ...],
    base: Float[Array, "*shape"],
    experts: tuple[Float[Array, "*shape"], ...],
    keys: UInt32[Array, "n 2 *layers"],
    offset: UInt32[Array, "2"],
    *,
    geometry: Geometry,
) -> list[list[UInt32[Array, "*shape"]]]:
    """For each question the words (`engine.packed`) of every element.

    Returns:
      Counted bits: N of "at least high" (absent without a trim), then the vote under the guessed thresholds is positive,
      then it is negative. Found bits: N of "in [low, high)", where that vote is not certain. The alarm: some input is
      not finite.
    """
    draw = draw_for(keys, _index(geometry, offset), geometry)
    clean = _all_inputs_finite(base, experts)
    results = []
    for question in questions:
        method = question.method
        vectors = method.vectors(base, experts, survey=question.facts.survey(geometry), draw=draw)
        above, inside = [], []
        if question.edges is not None:
            trimmed = []
            for vector, (low, high, guess) in zip(vectors, question.edges, strict=True):
                magnitude = jnp.abs(vector)
                above.append(magnitude >= high)
                inside.append((magnitude >= low) & (magnitude < high))
                trimmed.append(jnp.where(magnitude >= guess, vector, jnp.float32(0)))
            vectors = trimmed
        vote = elect(vectors, weights=method.weights)
        results.append(pack([*above, vote > 0, vote < 0], inside, alarm=~clean))
    return results


@jax.jit
def codes_step(
    question: Question,
    base: Float[Array, "m"],  # noqa: F821
    experts: tuple[Float[Array, "m"], ...],  # noqa: F821
    keys: UInt32[Array, "n 2"],
    low: UInt32[Array, "m"],  # noqa: F821
    high: UInt32[Array, "m"] | None,  # noqa: F821
) -> UInt32[Array, "n m"]:
    """Magnitude codes of single elements, given with their flat indices, per expert."""
    geometry = Geometry((base.shape[0],), (1,), wide=high is not None)
    draw = draw_for(keys, ElementIndex(low, high), geometry)
    vectors = question.method.vectors(
        base, experts, survey=question.facts.survey(geometry), draw=draw
    )
    return jnp.stack([magnitude_to_code(vector) for vector in vectors])


# ---- survey on devices ----------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("geometry",))
def count_step(
    question: Question,
    base: Float[Array, "*shape"],
    experts: tuple[Float[Array, "*shape"], ...],
    keys: UInt32[Array, "n 2 *layers"],
    thresholds: Float[Array, "n t *layers"],
    *,
    geometry: Geometry,
) -> list[Array]:
    """How many elements of a leaf are at least each threshold, and the votes: exact 64-bit counts, on the devices.

    Must be called with 64-bit types enabled (`jax.enable_x64`): parts are counted in 32 bits and summed in 64.

    Args:
      question: its `facts.thresholds`, where there are any, are the exact ones, under which the votes are counted.
      thresholds: float32, T edges for each expert (one set a layer in a stacked leaf); T may be 0.

    Returns:
      N * T + 2 counts uint64, [] or [L]: at least threshold t of expert i (at i * T + t), then votes above and below
      zero. An element with an input that is not finite counts nowhere.
    """
    draw = draw_for(keys, _index(geometry, jnp.zeros(2, jnp.uint32)), geometry)
    survey = question.facts.survey(geometry)
    vectors = question.method.vectors(base, experts, survey=survey, draw=draw)
    flags = [
        jnp.abs(vector) >= geometry.per_layer(edge)
        for vector, edges in zip(vectors, thresholds, strict=True)
        for edge in edges
    ]
    if survey.thresholds:
        vectors = trim(vectors, survey)
    vote = elect(vectors, weights=question.method.weights)
    return _count_all([*flags, vote > 0, vote < 0], geometry)


_COUNTABLE = 2**32  # counts below this fit in 32 bits


def _count_all(flags: Sequence[Bool[Array, "*shape"]], geometry: Geometry) -> list[Array]:
    """Counts many flags in one pass over the inputs: a variadic reduction in 32 bits, then 64-bit sums.

    The reduction takes as many of the last axes as 32 bits can count at once, so that a mesh axis that cuts any of them
    leaves few partial counts to be added up: reducing the last axis alone would send one count a row over the mesh.
    """
    free = [axis for axis in range(len(geometry.shape)) if axis != geometry.stacked]
    if not free:
        return [flag.astype(jnp.uint64) for flag in flags]
    together, size = [free[-1]], geometry.shape[free[-1]]
    for axis in reversed(free[:-1]):
        if size * geometry.shape[axis] >= _COUNTABLE:
            break
        together.append(axis)
        size *= geometry.shape[axis]
    dtype = jnp.uint64 if size >= _COUNTABLE else jnp.uint32  # a single axis may be so long
    parts = jax.lax.reduce(
        tuple(flag.astype(dtype) for flag in flags),
        tuple(jnp.zeros((), dtype) for _ in flags),
        lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)),
        tuple(together),
    )
    left = [axis for axis in range(len(geometry.shape)) if axis not in together]
    over = tuple(i for i, axis in enumerate(left) if axis != geometry.stacked)
    return [jnp.sum(part.astype(jnp.uint64), axis=over) for part in parts]


@functools.partial(jax.jit, static_argnames=("geometry",))
def l1_step(
    method: TaskVectorMethod,
    base: Float[Array, "*shape"],
    experts: tuple[Float[Array, "*shape"], ...],
    keys: UInt32[Array, "n 2 *layers"],
    *,
    geometry: Geometry,
) -> Array:
    """Exact L1 norms of a leaf's task vectors before and after the drop: uint64 [32, N, 2] or [32, N, 2, L].

    Must be called with 64-bit types enabled. Entry g sums the magnitudes with exponents 8 g + 1 to 8 g + 8, in units of
    2^(8 g - 149): integers below 2^31 each, so that 2^32 of them fit and the order of the sum does not matter.
    """
    draw = draw_for(keys, _index(geometry, jnp.zeros(2, jnp.uint32)), geometry)
    before = task_vectors(base, experts)
    after = method.vectors(base, experts, survey=Survey(), draw=draw)
    free = tuple(axis for axis in range(len(geometry.shape)) if axis != geometry.stacked)

    def of_group(group: UInt32[Array, ""]) -> Array:
        def total(vector: Float[Array, "*shape"]) -> Array:
            bits = jax.lax.bitcast_convert_type(jnp.abs(vector), jnp.uint32)
            exponent = (bits >> jnp.uint32(23)) - jnp.uint32(1)  # wraps for zero and subnormals
            mantissa = (bits & jnp.uint32(0x7FFFFF)) | jnp.uint32(0x800000)
            fixed = mantissa << (exponent & jnp.uint32(7))
            chosen = jnp.where(exponent >> jnp.uint32(3) == group, fixed, jnp.uint32(0))
            return jnp.sum(chosen.astype(jnp.uint64), axis=free)

        return jnp.stack(
            [jnp.stack([total(b), total(a)]) for b, a in zip(before, after, strict=True)]
        )

    return jax.lax.map(of_group, jnp.arange(32, dtype=jnp.uint32))


@jax.jit
def all_finite(x: Float[Array, "*shape"]) -> Bool[Array, ""]:
    """Whether every element is finite."""
    return jnp.all(jnp.isfinite(x))
