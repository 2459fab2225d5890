"""Shardings from rules: which axis goes where, what is refused, and the golden table of every parameter.

The table, tests/merging/shardings.txt, is written anew by `python -m tests.merging.test_partitioning`; look at what changes.
"""

from __future__ import annotations

import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from merging import partitioning
from merging.models import decoder
from merging.models.config import named
from merging.models.palm import Palm
from merging.partitioning import MeshShape
from merging.paths import of_tree_path
from merging.training.step import init_state

GOLDEN = pathlib.Path(__file__).parent / "shardings.txt"
SIZES = ("1b", "8b", "24b", "64b")
MESHES = {
    "v4-8": MeshShape(fsdp=2, model=2),
    "v5p-128": MeshShape(fsdp=32, model=2),
    "v5e-256x4": MeshShape(slices=4, fsdp=128, model=2),
}


def boxed(name: str):
    model = Palm(named(name))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))[
        "params"
    ]


def table() -> str:
    """One line a parameter: where, shape, cut, shape on one device."""
    lines = []
    for size in SIZES:
        params = boxed(size)
        shapes = jax.tree.leaves_with_path(nn.unbox(params))
        for mesh_name, mesh in MESHES.items():
            found = jax.tree.leaves(partitioning.shardings(params, mesh.abstract()))
            lines.append(f"{size} on {mesh_name}: {partitioning.describe(mesh.abstract())}")
            for (path, leaf), sharding in zip(shapes, found, strict=True):
                part = sharding.shard_shape(leaf.shape)
                lines.append(
                    f"  {of_tree_path(path)} {list(leaf.shape)} {tuple(sharding.spec)} {list(part)}"
                )
    return "\n".join(lines) + "\n"


def test_every_parameter_is_cut_as_the_table_says():
    assert table() == GOLDEN.read_text()


def test_no_large_parameter_is_whole_on_any_device():
    for line in GOLDEN.read_text().splitlines():
        if "kernel" in line or "embedding" in line:
            whole, part = (
                np.prod([int(n) for n in found.split(", ")])
                for found in re.findall(r"\[([\d, ]+)\]", line)
            )
            assert part * 2 <= whole, line


def test_optimizer_state_is_cut_as_its_parameters():
    state = jax.eval_shape(lambda params: init_state(params, optax.adamw(1e-3)), boxed("1b"))
    found = partitioning.shardings(state, MESHES["v5p-128"].abstract())
    assert found.step.spec == P()
    moments = found.opt_state[0]
    assert moments.count.spec == P()
    for tree in (moments.mu, moments.nu):
        assert jax.tree.map(lambda a, b: a.spec == b.spec, tree, found.params)
        assert jax.tree.all(jax.tree.map(lambda a, b: a == b, tree, found.params))


def test_what_a_rule_does_not_cut_evenly_is_refused_by_name_all_at_once():
    mesh = MeshShape(fsdp=5, model=4).abstract()
    with pytest.raises(ValueError) as error:
        partitioning.shardings(boxed("1b"), mesh)
    told = str(error.value)
    assert told.startswith("a mesh of data=1, fsdp=5, model=4 does not cut evenly:")
    assert (
        "layers/attention/query/kernel [18, 1536, 6, 256]: axis 2 (heads, 6) by model = 4" in told
    )
    assert "token_embedder/embedding [256000, 1536]: axis 1 (embed, 1536) by fsdp = 5" in told


def test_rows_are_cut_over_data_and_fsdp():
    mesh = MeshShape(data=2, fsdp=2, model=2).abstract()
    batch = {"tokens": np.zeros((8, 3), np.int32)}
    assert partitioning.batch_shardings(batch, mesh)["tokens"].spec == P(("data", "fsdp"))
    with pytest.raises(
        ValueError, match=r"tokens \[6, 3\]: axis 0 \(batch, 6\) by data x fsdp = 4"
    ):
        partitioning.batch_shardings({"tokens": np.zeros((6, 3), np.int32)}, mesh)


def test_a_cache_is_cut_by_rows():
    cache = {"keys": jnp.zeros((2, 8, 5, 1, 4)), "lengths": jnp.zeros(8, jnp.int32)}
    found = partitioning.cache_shardings(cache, MeshShape(data=2, fsdp=2, model=2).abstract())
    assert found["keys"].spec == P(None, ("data", "fsdp"), None, None, None)
    assert found["lengths"].spec == P(("data", "fsdp"))
    assert partitioning.CACHE_AXES == decoder.CACHE_AXES


def test_a_mesh_may_lack_axes_that_rules_name():
    mesh = jax.sharding.AbstractMesh((4,), ("fsdp",))
    spec = partitioning.shardings(boxed("1b"), mesh)["layers"]["mlp"]["wi_0"]["kernel"].spec
    assert spec == P(None, "fsdp", None)


def test_an_axis_without_a_rule_is_refused():
    leaf = nn.LogicallyPartitioned(jnp.zeros(4), names=("depth",))
    with pytest.raises(
        ValueError, match="there is no rule for depth: known are experts, batch, vocab"
    ):
        partitioning.shardings({"w": leaf}, MESHES["v4-8"].abstract())


def test_slices_lie_along_the_data_axis():
    mesh = MeshShape(slices=2, data=2, fsdp=1, model=2).mesh()
    assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "model": 2}
    # The first slice's devices come first.
    assert [d.id for d in mesh.devices[:2].ravel()] == [d.id for d in jax.devices()[:4]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fsdp": 0}, "MeshShape.fsdp is 0: it must be at least 1"),
        ({"topology": "v5p:4x4x4", "fsdp": 32}, "does not use the 64 chips of v5p:4x4x4"),
    ],
)
def test_shapes_that_make_no_sense_are_refused(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        MeshShape(**fields)


def test_a_mesh_for_another_number_of_devices_is_refused():
    with pytest.raises(ValueError, match="is for 4 devices, and there are 8"):
        MeshShape(fsdp=2, model=2).mesh()


if __name__ == "__main__":
    GOLDEN.write_text(table())
