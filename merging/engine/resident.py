"""Merges trees of arrays that live in memory: on one device or sharded over a pod, by the very steps of the stream.

Nothing moves: every device merges what it holds, and only counts are added up over the mesh. The facts that TIES and
DARE ask for are found by counting on the devices, a few edges a pass; there is no sample, so the number of passes is
fixed by the edges: log_5(2^31) = 14, each one read of the device's memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from merging.checkpoints.format import CheckpointError, LeafSpec
from merging.engine.compatible import compare, with_stacked
from merging.engine.groups import group_by_scale, without_scale
from merging.engine.pieces import Tensor, tensors_of
from merging.engine.step import (
    Facts,
    Geometry,
    Question,
    all_finite,
    count_step,
    l1_step,
    merge_step,
)
from merging.engine.survey import MethodSurvey, l1_ratios
from merging.kernels.magnitude import code_to_magnitude
from merging.methods.method import Method, TaskVectorMethod
from merging.paths import Stacked, of_tree_path

# Edges a pass for each threshold. On TPU 4 edges of 8 experts still touch 1.014 of the bytes of one read; more edges
# save passes and cost vector operations.
EDGES = 4


def merge_params(
    base: Any,
    experts: Sequence[Any],
    method: Method,
    *,
    seed: int = 0,
    stacked: Mapping[str, int] | None = None,
) -> Any:
    """Merges parameter trees.

    Args:
      base: a pytree of arrays (numpy or JAX, sharded or not).
      experts: pytrees of the same structure and shapes; float types may differ.
      method: e.g. `Ties()`.
      seed: of the keep masks.
      stacked: {pattern of paths: axis over layers}, where `scan` stacked layers; see `paths.Stacked`.

    Returns:
      A tree like the base: float leaves merged, in the base's dtypes and shardings; all others as in the base.

    Raises ValueError for trees that differ, for integer leaves that differ, and (naming the leaf) for NaN or infinity.
    The result is bit-equal to the streamed merge of the same numbers on the same platform.
    """
    method.check(len(experts))
    model = _Model(base, experts, seed=seed, stacked=Stacked(stacked))
    facts = _survey(model, method) if method.asks_survey else None
    groups, _, _ = group_by_scale([method])
    merged = dict(model.base)
    for name in model.merged:
        leaf = model.leaves[name]
        (merged[name],) = merge_step(
            groups,
            (leaf.facts(facts),),
            model.base[name],
            tuple(expert[name] for expert in model.experts),
            leaf.keys,
            np.zeros(2, np.uint32),
            geometry=leaf.geometry,
            out_dtype=leaf.spec.dtype,
        )
    # All leaves are under way before the first is looked at.
    finite = {name: all_finite(merged[name]) for name in model.merged}
    for name, is_finite in finite.items():
        if not bool(is_finite):
            model.blame_not_finite(name)
    return jax.tree.unflatten(model.structure, [merged[name] for name in model.base])


class _Leaf:
    """One merged leaf as the steps want it."""

    def __init__(self, spec: LeafSpec, stacked: Stacked, *, seed: int, experts: int):
        self.spec = spec
        self.tensors = tensors_of(spec, stacked)
        axis = spec.stacked
        tensor_shape = spec.shape if axis is None else spec.shape[:axis] + spec.shape[axis + 1 :]
        strides = [math.prod(tensor_shape[i + 1 :]) for i in range(len(tensor_shape))]
        if axis is not None:
            strides.insert(axis, 0)
        self.geometry = Geometry(
            spec.shape, tuple(strides), wide=math.prod(tensor_shape) > 2**32, stacked=axis
        )
        keys = np.stack([t.keys(seed=seed, experts=experts) for t in self.tensors], -1)
        self.keys = keys if axis is not None else keys[..., 0]  # uint32 [N, 2] or [N, 2, L]

    def per_layer(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """[..., L] from one array a tensor; [...] where the leaf is one tensor."""
        return np.stack(rows, -1) if self.spec.stacked is not None else rows[0]

    def facts(self, survey: MethodSurvey | None) -> Facts:
        """The facts of all of its layers."""
        if survey is None:
            return Facts()
        each = [survey.facts(tensor) for tensor in self.tensors]
        has_thresholds = each and each[0].thresholds is not None
        return Facts(
            thresholds=self.per_layer([f.thresholds for f in each]) if has_thresholds else None,
            majority=each[0].majority if each else None,
            l1=self.facts_l1(survey),
        )

    def facts_l1(self, survey: MethodSurvey) -> np.ndarray | None:
        """The L1 ratios of all of its layers, where they were asked for."""
        if not survey.l1:
            return None
        return self.per_layer([survey.l1[tensor.path] for tensor in self.tensors])


class _Model:
    """The trees as flat dicts by path, checked against one another."""

    def __init__(self, base: Any, experts: Sequence[Any], *, seed: int, stacked: Stacked):
        flat, self.structure = jax.tree.flatten_with_path(base)
        self.base = {of_tree_path(path): _array(leaf) for path, leaf in flat}
        self.experts = [
            {of_tree_path(path): _array(leaf) for path, leaf in jax.tree.leaves_with_path(expert)}
            for expert in experts
        ]
        specs = _specs(self.base)
        compare(
            "the base's tree", specs, {f"expert {i}": _specs(e) for i, e in enumerate(self.experts)}
        )
        specs = with_stacked(specs, stacked)
        self.merged = [name for name, spec in specs.items() if spec.is_merged]
        for name in specs.keys() - set(self.merged):
            for i, expert in enumerate(self.experts):
                if not bool(jnp.array_equal(self.base[name], expert[name])):
                    raise CheckpointError(
                        f"expert {i}: leaf {name} is {specs[name].dtype}, which is copied from the base and not"
                        " merged, but it differs from the base's: the experts must share it"
                    )
        self.leaves = {
            name: _Leaf(specs[name], stacked, seed=seed, experts=len(experts))
            for name in self.merged
        }

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for leaf in self.leaves.values() for tensor in leaf.tensors]

    def blame_not_finite(self, name: str) -> None:
        for where, tree in [("the base", self.base)] + [
            (f"expert {i}", expert) for i, expert in enumerate(self.experts)
        ]:
            if not bool(all_finite(tree[name])):
                raise CheckpointError(
                    f"{where}: leaf {name} holds NaN or infinity: it can't be merged; leave it out or use an earlier"
                    " step of its training"
                )
        raise CheckpointError(
            f"leaf {name}: all inputs are finite but the merge is not: its values overflow {self.base[name].dtype};"
            " store the base in a wider type or use a smaller scale"
        )


def _array(leaf: Any) -> Any:
    """Arrays as they are; Python numbers and numpy scalars as numpy arrays."""
    if isinstance(leaf, jax.Array | np.ndarray):
        return leaf
    return np.asarray(leaf)


def _specs(tree: Mapping[str, Any]) -> dict[str, LeafSpec]:
    return {
        name: LeafSpec(name=name, shape=tuple(leaf.shape), dtype=np.dtype(leaf.dtype))
        for name, leaf in tree.items()
    }


# ---- the survey, on the devices -------------------------------------------------------------------------------------


def _survey(model: _Model, method: TaskVectorMethod) -> MethodSurvey:
    """Everything the method asks, by counting on the devices."""
    question = without_scale(method)
    survey = MethodSurvey(question, model.tensors, len(model.experts))
    if method.asks_l1:
        _survey_l1(model, survey)
    while True:
        open_groups = {
            group: searches
            for group, searches in survey.searches.items()
            if not all(s.is_done for s in searches)
        }
        is_last = not open_groups
        if is_last and not (method.asks_majority and survey.majority is None):
            return survey
        edges = {
            group: [s.edges(EDGES) if not s.is_done else [] for s in searches]
            for group, searches in open_groups.items()
        }
        counts, votes = _count(model, survey, edges)
        for group, searches in open_groups.items():
            for search, its_edges, its_counts in zip(
                searches, edges[group], counts[group], strict=True
            ):
                search.narrow(its_edges, its_counts[: len(its_edges)])
        if is_last:
            survey.majority = 1 if votes[0] > votes[1] else -1


def _count(
    model: _Model, survey: MethodSurvey, edges: Mapping[str, list[list[int]]]
) -> tuple[dict[str, np.ndarray], list[int]]:
    """Counts of every open group, int [N, EDGES], and the votes; the votes mean something once no group is open."""
    experts = len(model.experts)
    counts = {group: np.zeros((experts, EDGES), np.int64) for group in edges}
    votes = [0, 0]
    number = EDGES if edges else 0
    pending = []
    with jax.enable_x64(True):
        for name, leaf in model.leaves.items():
            rows = [_thresholds(edges.get(survey.group(t)), experts, number) for t in leaf.tensors]
            facts = Facts(l1=leaf.facts_l1(survey)) if edges else leaf.facts(survey)
            pending.append(
                count_step(
                    Question(survey.method, facts, None),
                    model.base[name],
                    tuple(expert[name] for expert in model.experts),
                    leaf.keys,
                    leaf.per_layer(rows),
                    geometry=leaf.geometry,
                )
            )
    for leaf, found in zip(model.leaves.values(), pending, strict=True):
        # [number of counts, tensors of the leaf]
        table = np.stack([np.asarray(count).reshape(-1) for count in found]).astype(np.int64)
        for tensor, column in zip(leaf.tensors, table.T, strict=True):
            group = survey.group(tensor)
            if group in counts:
                counts[group] += column[: experts * number].reshape(experts, number)
        votes = [votes[0] + int(table[-2].sum()), votes[1] + int(table[-1].sum())]
    return counts, votes


def _thresholds(edges: list[list[int]] | None, experts: int, number: int) -> np.ndarray:
    """float32 [N, number]: the edges as magnitudes, with +inf, which nothing reaches, where there are fewer."""
    result = np.full((experts, number), np.inf, np.float32)
    for i, of_expert in enumerate(edges or []):
        result[i, : len(of_expert)] = [code_to_magnitude(code) for code in of_expert]
    return result


def _survey_l1(model: _Model, survey: MethodSurvey) -> None:
    with jax.enable_x64(True):
        pending = [
            l1_step(
                survey.method,
                model.base[name],
                tuple(expert[name] for expert in model.experts),
                leaf.keys,
                geometry=leaf.geometry,
            )
            for name, leaf in model.leaves.items()
        ]
    for leaf, sums in zip(model.leaves.values(), pending, strict=True):
        table = np.asarray(sums).reshape(32, len(model.experts), 2, -1)
        for layer, tensor in enumerate(leaf.tensors):
            totals = [
                [
                    sum(int(table[g, i, side, layer]) << (8 * g) for g in range(32))
                    for side in (0, 1)
                ]
                for i in range(len(model.experts))
            ]
            survey.l1[tensor.path] = l1_ratios(totals)
