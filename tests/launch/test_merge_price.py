"""What a merge takes on a TPU, against numbers by hand: of the paper's top case, from headers alone, as its command prints it."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil

import pytest

from launch import devices, merge, merge_price
from merging.engine.plan import Settings, plan
from merging.partitioning import MeshShape
from tests import top_case

# 64b by hand: 256,000 entries, width 8,192, hidden 32,768, 32 heads of 256 with one key/value head, 66 layers.
HIDDEN = 66 * 8_192 * 32_768  # one of the three leaves that hold most of it when layers are stacked
LAYER = 3 * 8_192 * 32_768 + 2 * 8_192 * 32 * 256 + 2 * 8_192 * 256 + 8_192
PARAMETERS = 256_000 * 8_192 + 8_192 + 66 * LAYER
INPUTS, PASSES, BFLOAT16 = 9, 2, 2  # a base and 8 experts; TIES reads twice


def configured(
    folder: pathlib.Path, mesh: str, *bindings: str, is_scanned: bool = True
) -> merge.gin_config.Resolved:
    """A merge by TIES of the top case, for a mesh."""
    given = top_case.write_all(folder, is_scanned=is_scanned)
    files = [merge.RUN_FILE, "gin_configs/methods/ties.gin", f"gin_configs/meshes/{mesh}.gin"]
    values = {"BASE": given["base"], "EXPERTS": given["experts"], "OUTPUT_DIR": str(folder / "out")}
    return merge.configured(files, [f"{k} = {v!r}" for k, v in values.items()] + list(bindings))


def priced(
    folder: pathlib.Path, mesh: str, *bindings: str, is_scanned: bool = True
) -> tuple[merge_price.Price, str]:
    resolved = configured(folder, mesh, *bindings, is_scanned=is_scanned)
    planned = plan(Settings(**resolved.arguments), is_elsewhere=True)
    try:
        on = merge.priced_on()
        found = merge_price.price(planned, on)
        return found, merge_price.described(found, on)
    finally:
        planned.close()


def test_the_top_case_on_v5e_64(tmp_path: pathlib.Path):
    found, told = priced(tmp_path, "v5e-64", "STORAGE_BYTES_PER_S = 25e9")
    assert PARAMETERS == 64_383_115_264 and HIDDEN == 17_716_740_096
    assert (found.hosts, found.chips) == (16, 64)
    # Leaves are not cut: the busiest host has one of the three large ones, with four chips.
    assert found.written_bytes == HIDDEN * BFLOAT16 == 35_433_480_192
    assert found.read_bytes == PASSES * INPUTS * HIDDEN * BFLOAT16 == 637_802_643_456
    assert found.share == pytest.approx(HIDDEN / PARAMETERS)
    assert found.storage_s == pytest.approx(19 * 2 * 64.383115264 / 25)
    assert found.network_s == pytest.approx(637.802643456 / (4 * 3.125))  # 6.4 Tbit/s of 256 chips
    assert found.memory_s == pytest.approx(2 * (637.802643456 + 35.433480192) / (4 * 819))
    assert found.compute_s == pytest.approx(4 * 17.716740096e9 * 8 * 2 / (4 * 197e12))
    assert (found.host_bytes, found.chip_bytes) == (2**30, 2**28)
    assert "638 GB read, 35.4 GB written by the busiest, 4.40 times an even share" in told
    assert "network    51 s" in told and "bound      97.9 s, by storage" in told
    assert "1.07 GB of buffers a host, 268 MB of a chip's 17.2 GB at most" in told


def test_layers_with_leaves_of_their_own_are_shared_more_evenly(tmp_path: pathlib.Path):
    found, _ = priced(tmp_path, "v5e-64", is_scanned=False)
    # 16 hosts share files of at most 5 GB, of which there are more than 16 and fewer than 32: at most two each.
    assert 1 / 16 < found.share < 10e9 / (2 * PARAMETERS)
    assert found.read_bytes == PASSES * INPUTS * found.written_bytes
    assert found.network_s == pytest.approx(found.read_bytes / 12.5e9)
    assert max(found.bounds.values()) == found.network_s


def test_what_is_not_published_is_not_made_up(tmp_path: pathlib.Path):
    found, told = priced(tmp_path, "v4-128")
    assert (found.hosts, found.chips) == (16, 64)
    assert (found.storage_s, found.network_s) == (None, None)
    assert found.memory_s == pytest.approx(2 * (637.802643456 + 35.433480192) / (4 * 1_200))
    assert found.compute_s == pytest.approx(4 * 17.716740096e9 * 8 * 2 / (4 * 275e12))
    assert "network    the rate of its hosts is not published" in told
    assert "storage    not known: give STORAGE_BYTES_PER_S" in told
    assert "bound      0.281 s, by HBM" in told


def test_slices_add_hosts(tmp_path: pathlib.Path):
    resolved = configured(tmp_path, "v5e-64", is_scanned=False)
    one = merge.priced_on()
    two = merge_price.On(mesh=dataclasses.replace(one.mesh, slices=2))
    planned = plan(Settings(**resolved.arguments), is_elsewhere=True)
    found, doubled = (merge_price.price(planned, on) for on in (one, two))
    planned.close()
    assert (doubled.hosts, doubled.chips) == (32, 128)
    assert 1 / 32 < doubled.share < found.share and doubled.chip_bytes == found.chip_bytes
    assert doubled.network_s == pytest.approx(doubled.read_bytes / 12.5e9)


def test_the_command_prices_what_this_disk_has_no_room_for(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: full)
    resolved = configured(tmp_path, "v5e-64")
    merge.merge(resolved, devices.Processes(), is_dry_run=True)
    told = capsys.readouterr().out
    assert "leaves     10 merged (64,383,115,264 parameters), 0 copied" in told
    assert "reads      2 of 1.16 TB" in told and "638 GB read" in told
    assert not (tmp_path / "out").exists()
    disk = sum(f.stat().st_blocks * 512 for f in tmp_path.rglob("*") if f.is_file())
    assert disk < 2**20 < os.path.getsize(tmp_path / "base/model.safetensors")
    with pytest.raises(ValueError, match="the output takes 128,766,230,528 bytes"):
        merge.merge(resolved, devices.Processes())  # to be made here, it does not fit


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
