"""Programs compile for a TPU that is not there, and ask no more of it than they promise.

In processes of their own: libtpu wants its environment before jax is imported, and warns about what is missing here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from launch import compile as compiling
from launch import compile_model, topology
from launch.gin_config import CONFIGS

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


# ---- a model's programs ---------------------------------------------------------------------------------------------

# Chips, hosts and axes (data over all slices, fsdp, model) of each mesh file, as the cloud's tables have them.
MESHES = {
    "cpu8": (8, 1, (2, 2, 2)),
    "v4-8": (4, 1, (1, 2, 2)),
    "v4-128": (64, 16, (1, 32, 2)),
    "v5e-16": (16, 4, (1, 8, 2)),
    "v5e-256": (256, 64, (1, 128, 2)),
    "v5e-256x4": (1024, 256, (4, 128, 2)),
    "v5p-128": (64, 16, (1, 32, 2)),
    "v5p-512": (256, 64, (1, 128, 2)),
    "v6e-256": (256, 64, (1, 128, 2)),
}


def mesh_of(name: str):
    arguments = compile_model.configured([], [], model="1b", mesh=name).arguments
    return arguments["mesh"]


def test_there_is_a_row_for_every_mesh_file():
    assert sorted(MESHES) == sorted(path.stem for path in (CONFIGS / "meshes").glob("*.gin"))


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_file_has_the_clouds_chips(name: str):
    chips, hosts, axes = MESHES[name]
    mesh = mesh_of(name)
    assert (mesh.size, mesh.slices * mesh.hosts, mesh.axis_sizes) == (chips, hosts, axes)
    if mesh.topology:
        compile_model.chips.chip_of(mesh.topology)


@pytest.mark.parametrize("name", ["1b", "8b", "24b", "64b"])
@pytest.mark.parametrize("mesh", MESHES)
def test_every_named_size_is_cut_evenly_by_every_mesh(name: str, mesh: str):
    import jax.numpy as jnp

    from merging import partitioning
    from merging.models.config import named
    from merging.models.palm import Palm

    model = Palm(named(name))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    partitioning.shardings(params, mesh_of(mesh).abstract())


@pytest.mark.tpu_compiler
@needs_libtpu
def test_topologies_are_as_large_as_the_mesh_files_say():
    names = [name for name in MESHES if name != "cpu8"]
    code = (
        "import sys, json; from launch.topology import described_devices;"
        "told = [described_devices(t, slices=int(n)) for t, n in zip(sys.argv[1::2], sys.argv[2::2])];"
        "print(json.dumps([[len(d), len({(x.process_index) for x in d})] for d in told]))"
    )
    meshes = [mesh_of(name) for name in names]
    done = run(*[word for m in meshes for word in (m.topology, str(m.slices))], code=code)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == [list(MESHES[name][:2]) for name in names]


LAYERS, WIDTH, HEADS, HEAD, HIDDEN, VOCABULARY = 4, 512, 4, 128, 2048, 8192
SMALL = [
    "--gin.MODEL=@PalmConfig()",
    f"--gin.PalmConfig.num_layers={LAYERS}",
    f"--gin.PalmConfig.embed_dim={WIDTH}",
    f"--gin.PalmConfig.num_heads={HEADS}",
    f"--gin.PalmConfig.head_dim={HEAD}",
    f"--gin.PalmConfig.mlp_dim={HIDDEN}",
    f"--gin.PalmConfig.vocab_size={VOCABULARY}",
    "--gin.ROWS=8",
    "--gin.LENGTH=256",
    "--gin.PROMPTS=8",
    "--gin.PROMPT_LENGTH=128",
    "--gin.NEW_TOKENS=128",
    "--mesh=v5e-16",
]


def products_of_a_token(*, layers: int, head: int, skipped: bool) -> int:
    """Floating point operations of kernels, attention over 256 keys and the readout, each so many times.

    The one head of keys and values can't be cut by the mesh's model axis of 2: both halves make it.
    """
    up, out = 2 * WIDTH * HIDDEN, WIDTH * HIDDEN + WIDTH * HEADS * HEAD
    kernels = up + out + WIDTH * HEADS * HEAD + 2 * (2 * WIDTH * HEAD)
    attention = 2 * 256 * HEADS * HEAD
    spared = out if skipped else 0
    return 2 * (LAYERS * (layers * (kernels + attention) - spared) + head * VOCABULARY * WIDTH)


@pytest.mark.slow
@pytest.mark.tpu_compiler
@needs_libtpu
def test_a_models_programs_ask_for_what_arithmetic_says(tmp_path: pathlib.Path):
    file = tmp_path / "figures.json"
    done = run(*SMALL, "--gin.METHODS=[@Averaging(), @Ties()]", f"--json={file}")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(file.read_text())
    programs = report["programs"]
    assert list(programs) == [
        *("train", "score", "prefill", "decode"),
        *("merge averaging", "merge ties", "survey ties", "votes ties"),
    ]
    parameters = report["parameters"]
    tokens = 8 * 256
    for found in programs.values():
        assert found["fits"] and found["unknown_loops"] == 0
        assert found["memory_bytes"] < report["chip"]["memory_bytes"]
    # Forward, again in the backward pass, and two products there; the last products of a block need not be done again.
    wanted = products_of_a_token(layers=4, head=4, skipped=True) * tokens / 16
    assert programs["train"]["flops"] == pytest.approx(wanted, rel=0.01)
    wanted = products_of_a_token(layers=1, head=1, skipped=False) * tokens / 16
    assert programs["score"]["flops"] == pytest.approx(wanted, rel=0.01)
    # Float32 parameters and two moments; nothing is held twice.
    assert programs["train"]["argument_bytes"] == pytest.approx(parameters * 12 / 16, rel=0.05)
    assert programs["merge ties"]["argument_bytes"] == pytest.approx(
        9 * parameters * 2 / 16, rel=0.05
    )
    assert programs["merge ties"]["collectives"] == {}
    # Parameters are gathered a layer at a time, the readout's table a chunk at a time, in bfloat16.
    largest = max(WIDTH * HIDDEN, VOCABULARY // 8 * WIDTH) * 2
    for name in ("train", "score"):
        assert programs[name]["collectives"]["all-gather"]["largest_bytes"] <= largest


@pytest.mark.slow
@pytest.mark.tpu_compiler
@needs_libtpu
def test_what_does_not_fit_is_told_with_its_largest_arrays(tmp_path: pathlib.Path):
    file = tmp_path / "figures.json"
    large = [f"--gin.PalmConfig.{name}" for name in ("embed_dim=32768", "mlp_dim=524288")]
    done = run(*SMALL, *large, "--gin.PROGRAMS=['decode']", f"--json={file}")
    assert done.returncode == 1
    assert "decode does not fit" in done.stderr
    assert "layers/mlp/wi_0/kernel" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(file.read_text())["programs"]["decode"]["fits"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=65b", "--mesh=v5p-128"], "no gin file 'gin_configs/models/65b.gin'.*64b"),
        (["--model=64b", "--mesh=cpu8"], "MESH has no topology"),
        (["--mesh=v5p-128"], "--gin.MODEL="),
        (["--model=64b", "--mesh=v5p-128", "--gin.PROGRAMS=['trian']"], "PROGRAMS has trian"),
    ],
)
@pytest.mark.slow
def test_errors_about_models_are_one_message(arguments: list[str], message: str):
    done = run(*arguments)
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
