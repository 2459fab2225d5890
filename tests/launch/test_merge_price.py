"""What a merge takes on a TPU, against numbers by hand."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import pytest

from launch import merge, merge_price
from merging.partitioning import MeshShape

N = 64_000_000_000


def planned(**changes: Any) -> Any:
    """As much of a plan as is priced: a base and 8 experts in bfloat16, read twice (TIES)."""
    given = {
        "passes": 2,
        "input_bytes": 9 * 2 * N,
        "output_bytes": 2 * N,
        "base_specs": {"all": types.SimpleNamespace(size=N)},
        "experts": range(8),
        "merges": {"": "ties"},
        "settings": types.SimpleNamespace(memory_budget_bytes=2**30),
    }
    return types.SimpleNamespace(**given | changes)


def mesh(topology: str, chips: int, hosts: int, **changes: Any) -> MeshShape:
    return MeshShape(topology=topology, hosts=hosts, fsdp=chips // 2, model=2, **changes)


def test_a_merge_of_64b_on_v5e_64():
    on = merge_price.On(mesh=mesh("v5e:8x8", 64, 16), storage_bytes_per_s=25e9)
    found = merge_price.price(planned(), on)
    # 2 x 1,152 GB are read by 16 hosts, 128 GB written.
    assert (found.hosts, found.chips) == (16, 64)
    assert (found.read_bytes, found.written_bytes) == (144e9, 8e9)
    assert found.storage_s == pytest.approx(2432 / 25)
    # A pod of 256 chips has 6.4 Tbit/s, so 64 of them 200 GB/s.
    assert found.network_s == pytest.approx(2304 / 200)
    assert found.memory_s == pytest.approx(2 * 2432 / (64 * 819))
    assert found.compute_s == pytest.approx(4 * 64e9 * 8 * 2 / (64 * 197e12))
    assert (found.host_bytes, found.chip_bytes) == (2**30, 2**28)
    told = merge_price.described(found, on)
    assert "144 GB read, 8 GB written by each" in told and "network    11.5 s" in told
    two = merge_price.On(mesh=dataclasses.replace(on.mesh, slices=2))
    assert merge_price.price(planned(), two).network_s == pytest.approx(found.network_s / 2)


def test_what_is_not_published_is_not_made_up():
    on = merge_price.On(mesh=mesh("v4:4x4x4", 64, 16))
    found = merge_price.price(planned(), on)
    assert (found.storage_s, found.network_s) == (None, None)
    told = merge_price.described(found, on)
    assert "network    the rate of its hosts is not published" in told
    assert "storage    not known: give STORAGE_BYTES_PER_S" in told


def test_a_mesh_of_no_tpu_is_refused():
    with pytest.raises(ValueError, match="MESH is of no TPU"):
        merge_price.On(mesh=MeshShape(data=8))


def test_a_mesh_file_asks_for_it():
    files = [merge.RUN_FILE, "gin_configs/methods/ties.gin"]
    given = ["BASE = '/a'", "EXPERTS = ['/b']", "OUTPUT_DIR = '/c'"]
    merge.configured(files, given)
    assert merge.priced_on().mesh is None
    merge.configured([*files, "gin_configs/meshes/v5e-256.gin"], given)
    assert merge.priced_on().mesh.topology == "v5e:16x16"
