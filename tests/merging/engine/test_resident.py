"""Merges of arrays in memory: any sharding, methods that need whole tensors, and counts beyond 32 bits."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import merging
from merging.engine.step import Geometry, _count_all
from merging.methods.dare_ties import DareTies
from merging.methods.method import Draw, Method, Survey
from merging.methods.task_arithmetic import TaskArithmetic
from merging.methods.ties import Ties
from tests import models


@pytest.mark.parametrize("spec", [("a", "b"), (None, "a"), (("a", "b"), None)], ids=str)
@pytest.mark.parametrize("method", [TaskArithmetic(), Ties(), DareTies(trim_density=0.3)], ids=repr)
def test_shardings_change_nothing_and_are_kept(spec: tuple, method: Method):
    shapes = {"square": (96, 96), "tall": (40, 24)}
    base, experts = models.base_and_experts(3, copied=False, shapes=shapes)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    alone = merging.merge_params(base, experts, method)
    merged = merging.merge_params(*jax.device_put((base, experts), sharding), method)
    assert models.same_bits(merged, alone)
    assert all(leaf.sharding.is_equivalent_to(sharding, leaf.ndim) for leaf in merged.values())


def test_trees_keep_their_structure():
    base, experts = models.base_and_experts(2, copied=False, shapes={"x": (4, 3)})

    def nested(model: models.Model) -> dict:
        return {"params": {"dense": [model["x"], {"step": np.int32(3)}]}}

    merged = merging.merge_params(nested(base), [nested(e) for e in experts], TaskArithmetic())
    assert jax.tree.structure(merged) == jax.tree.structure(nested(base))
    assert merged["params"]["dense"][1]["step"] == 3


class Whitened(Method):
    """A toy that needs whole matrices: the mean of the experts over its own largest row sum."""

    kind = "whole"

    def __call__(
        self, base: jax.Array, experts: Sequence[jax.Array], *, survey: Survey, draw: Draw
    ) -> jax.Array:
        del base, survey, draw
        mean = sum(e.astype(jnp.float32) for e in experts[1:]) + experts[0].astype(jnp.float32)
        return mean / jnp.max(jnp.sum(jnp.abs(mean), axis=-1))


def test_whole_methods_see_one_layer_at_a_time():
    base, experts = models.base_and_experts(2, copied=False, shapes={"layers/w": (5, 3, 4)})
    merged = merging.merge_params(base, experts, Whitened(), stacked={"layers": 1})["layers/w"]
    for layer in range(3):

        def one(model: models.Model, layer: int = layer) -> models.Model:
            return {"w": np.ascontiguousarray(model["layers/w"][:, layer])}

        alone = merging.merge_params(one(base), [one(e) for e in experts], Whitened())["w"]
        np.testing.assert_array_equal(np.asarray(merged)[:, layer], np.asarray(alone))


def test_whole_methods_are_not_streamed(tmp_path: pathlib.Path):
    base, experts = models.base_and_experts(1, shapes={"x": (4, 3)})
    folders = models.save_all(tmp_path, base, experts)
    with pytest.raises(ValueError, match="Whitened needs whole tensors"):
        merging.merge_checkpoints(**folders, output_dir=tmp_path / "out", method=Whitened())


def test_counts_beyond_32_bits_without_holding_them():
    """Rows of 2^33 elements are counted in 64 bits (shapes alone), and rows that fill 32 bits are summed in 64."""
    geometry = Geometry((3, 1 << 33), (1 << 33, 1), wide=True)
    flag = jax.ShapeDtypeStruct(geometry.shape, jnp.bool_)
    with jax.enable_x64(True):
        program = jax.make_jaxpr(lambda f: _count_all([f], geometry))(flag)
        assert "u64[3,8589934592]" in str(program) and "u32" not in str(program)
        narrow = Geometry((70_000, (1 << 32) - 1), ((1 << 32) - 1, 1), wide=True)
        flag = jax.ShapeDtypeStruct(narrow.shape, jnp.bool_)
        program = str(jax.make_jaxpr(lambda f: _count_all([f], narrow))(flag))
        assert "u32[70000]" in program and "u64[70000]" in program and "u64[]" in program
        total = jnp.sum(jnp.full((70_000,), 2**32 - 1, jnp.uint32).astype(jnp.uint64))
    assert int(total) == 70_000 * (2**32 - 1)


def test_differences_between_trees_are_told():
    base, experts = models.base_and_experts(2, copied=False, shapes={"x": (4, 3), "y": (2,)})
    del experts[1]["y"]
    with pytest.raises(ValueError, match=r"expert 1: leaf y bfloat16\[2\] is missing"):
        merging.merge_params(base, experts, Ties())
    with pytest.raises(ValueError, match="there are none"):
        merging.merge_params(base, [], Ties())
