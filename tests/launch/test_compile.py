"""Programs compile for a TPU that is not there, and ask no more of it than they promise.

In processes of their own: libtpu wants its environment before jax is imported, and warns about what is missing here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from launch import compile as compiling
from launch import topology

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="no libtpu, which has the TPU's compiler: install the extra `tpu`",
)


def run(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TPU_", "XLA_FLAGS"))}
    command = ["-c", code] if code else ["-m", "launch.compile"]
    return subprocess.run(
        [sys.executable, *command, *arguments], env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.tpu_compiler
@needs_libtpu
def test_merges_and_surveys_ask_for_little_more_than_they_must(tmp_path: pathlib.Path):
    file = tmp_path / "figures.json"
    done = run(
        "--topology=v5e:2x4",
        "--shape=8,1024,2048",
        "--experts=8",
        "--methods=averaging,ties,dare_ties",
        f"--json={file}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(file.read_text())
    assert report["devices"] == 8
    assert report["leaf"]["shape_per_device"] == [8, 512, 512]
    kinds = [
        f"{name}, {kind}"
        for name in (
            "merge averaging",
            "merge ties",
            "survey ties",
            "votes ties",
            "merge dare_ties",
            "votes dare_ties",
        )
        for kind in ("stacked", "one tensor")
    ]
    assert sorted(report["programs"]) == sorted(kinds)
    for name, found in report["programs"].items():
        assert name in done.stdout
        if name.startswith("merge"):
            assert found["traffic"] <= 1.02
            assert found["collectives"] == {}
            assert found["output_bytes"] == 8 * 512 * 512 * 2
        else:
            assert found["traffic"] <= 1.05
            assert found["collectives"]
            for each in found["collectives"].values():
                assert each["dtypes"] == ["u32"]
        assert found["operations_per_element"] > 8
        assert found["loops"] == 0


@pytest.mark.slow
@pytest.mark.tpu_compiler
@needs_libtpu
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v5e:1000x3"], "topology v5e:1000x3 can't be compiled for"),
        (["--topology=v5e"], "give a generation and its chips, as in v5e:16x16"),
        (["--topology=v5e:2x4", "--shape=8,8,6"], "can't be cut evenly along axes (1, 2)"),
        (["--topology=v5e:2x4", "--shape=64"], "can't be cut along axes (0,) by a mesh of (2, 4)"),
        (
            ["--topology=v5e:2x4", "--shape=4096,65536,1024", "--methods=averaging"],
            "merge averaging, stacked does not compile",
        ),
        (["--methods=no_such"], "--methods names no_such, which is none of averaging, dare"),
        (["--shape=2,x"], "--shape=2,x: give whole numbers"),
    ],
)
def test_errors_are_one_message(arguments: list[str], message: str):
    done = run(*arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_without_libtpu_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    def absent(name: str) -> str:
        raise topology.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(topology.importlib.metadata, "version", absent)
    monkeypatch.setattr(topology, "ENVIRONMENT", {})
    with pytest.raises(ValueError, match=r"libtpu is not installed.*pip install"):
        compiling.described_mesh("v5e:2x4")


@pytest.mark.parametrize(
    ("axes", "spec", "part"),
    [
        (None, (None, "x", "y"), (3, 2, 8)),
        ((1, 2), (None, "x", "y"), (3, 2, 8)),
        ((2, 2), (None, None, ("x", "y")), (3, 8, 2)),
        ((2, 1), (None, "y", "x"), (3, 4, 4)),
    ],
)
def test_a_leaf_is_cut_by_every_axis_of_the_mesh(axes, spec, part):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    sharding = compiling.cut((3, 8, 16), mesh, axes)
    assert sharding.shard_shape((3, 8, 16)) == part
    assert sharding.is_equivalent_to(jax.NamedSharding(mesh, PartitionSpec(*spec)), 3)
