"""Programs compile for a TPU that is not there, and ask no more of it than they promise.

In processes of their own: libtpu wants its environment before jax is imported, and warns about what is missing here.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

from launch import compile as compiling
from launch import compile_model, compile_table, topology
from launch.gin_config import CONFIGS
from merging.engine import plan
from merging.engine.programs import Program
from merging.methods.averaging import Averaging
from merging.methods.task_arithmetic import TaskArithmetic
from merging.models import decoder
from tests.merging.models import families

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
    "v5e-64": (64, 16, (1, 32, 2)),
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
ROWS, LENGTH, TARGETS, CHIPS = 8, 256, 128, 16
SMALL = [
    "--gin.MODEL=@PalmConfig()",
    f"--gin.PalmConfig.num_layers={LAYERS}",
    f"--gin.PalmConfig.embed_dim={WIDTH}",
    f"--gin.PalmConfig.num_heads={HEADS}",
    f"--gin.PalmConfig.head_dim={HEAD}",
    f"--gin.PalmConfig.mlp_dim={HIDDEN}",
    f"--gin.PalmConfig.vocab_size={VOCABULARY}",
    f"--gin.ROWS={ROWS}",
    f"--gin.LENGTH={LENGTH}",
    "--gin.PROMPTS=8",
    "--gin.PROMPT_LENGTH=128",
    f"--gin.NEW_TOKENS={TARGETS}",
    "--mesh=v5e-16",
]


KERNELS = 3 * WIDTH * HIDDEN + 2 * WIDTH * HEADS * HEAD  # of a layer, cut over the model axis
KEY_VALUE = (
    2 * WIDTH * HEAD
)  # one head can't be cut: both halves of the model axis have it, and compute it


def products(*, layers: int, readouts: float, spared: int) -> float:
    """Floating point operations on one chip of so many passes through all layers, and so many readouts of all tokens.

    Args:
      spared: products of a layer, for each token, that one of the passes leaves out.
    """
    attention = 2 * LENGTH * HEADS * HEAD
    of_layers = LAYERS * (layers * (KERNELS + 2 * KEY_VALUE + attention) - spared)
    of_a_token = 2 * (of_layers + readouts * VOCABULARY * WIDTH)
    return of_a_token * ROWS * LENGTH / CHIPS


@pytest.mark.slow
@pytest.mark.tpu_compiler
@needs_libtpu
def test_a_models_programs_ask_for_what_arithmetic_says(tmp_path: pathlib.Path):
    file = tmp_path / "figures.json"
    done = run(*SMALL, "--gin.METHODS=[@DareTies()]", f"--json={file}")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(file.read_text())
    told = re.search(
        r"\ncompiled in \d+ s, with at most (.*) of this machine's memory\n$", done.stdout
    )
    assert told and report["compiler"]["seconds"] > 0
    assert told[1] == plan.size_text(report["compiler"]["peak_bytes"])
    programs = report["programs"]
    assert list(programs) == [
        *("train", "score", "prefill", "decode"),
        *("merge dare_ties", "votes dare_ties"),
    ]
    parameters = report["parameters"]
    for found in programs.values():
        assert found["fits"] and found["unknown_loops"] == 0
        assert found["memory_bytes"] < report["chip"]["memory_bytes"]
    # Forward, again in the backward pass, and two products there; the last products of a block need not be done again.
    out = WIDTH * HIDDEN + WIDTH * HEADS * HEAD
    assert programs["train"]["flops"] == products(layers=4, readouts=4, spared=out)
    assert programs["train"]["arithmetic"]["least_ratio"] == pytest.approx(1, rel=0.05)
    # Of a scored row, what is asked for is read out.
    read = TARGETS / LENGTH
    assert programs["score"]["flops"] == products(layers=1, readouts=read, spared=0)
    # Float32 parameters and two moments; nothing is held twice.
    assert programs["train"]["argument_bytes"] == pytest.approx(parameters * 12 / CHIPS, rel=0.05)
    assert programs["merge dare_ties"]["argument_bytes"] == pytest.approx(
        9 * parameters * 2 / CHIPS, rel=0.05
    )
    assert programs["merge dare_ties"]["collectives"] == {}
    # Every parameter of the chip's half of the model is gathered once, twice where it is trained, in bfloat16; a layer at
    # a time, the readout's table a chunk at a time; and its gradient is added up and cut once, the table's in float32.
    layers, table = LAYERS * (KERNELS // 2 + KEY_VALUE) * 2, VOCABULARY * WIDTH // 2 * 2
    largest = max(WIDTH * HIDDEN // 2, VOCABULARY // 2 // 8 * WIDTH) * 2
    tokens = 2 * ROWS * LENGTH * 4  # rows of the embedding are fetched by the ids of all tokens
    for name, times in (("train", 2), ("score", 1), ("prefill", 1), ("decode", 1)):
        gathered = programs[name]["collectives"]["all-gather"]
        assert 0 <= gathered["nbytes"] - times * (layers + table) <= tokens, name
        if name in ("train", "score"):
            assert gathered["largest_bytes"] == largest
    scattered = programs["train"]["collectives"]["reduce-scatter"]
    assert scattered["nbytes"] == layers + 2 * table
    assert scattered["largest_bytes"] == largest


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


# ---- a model's programs, compiled for this machine's devices in place of a TPU's ------------------------------------


def compiled_here(
    monkeypatch: pytest.MonkeyPatch, model, *, programs, memory_bytes: int = 10**9, **changes
):
    """The report of a small model's programs for a chip with this much memory."""
    from merging.partitioning import MeshShape

    chip = dataclasses.replace(compile_model.chips.CHIPS["v5e"], memory_bytes=memory_bytes)
    monkeypatch.setitem(compile_model.chips.CHIPS, "v5e", chip)
    monkeypatch.setattr(
        compile_model, "described_devices", lambda topology, slices: jax.devices()[:1]
    )
    arguments = {
        "mesh": MeshShape(topology="v5e:1x1"),
        **{"rows": 4, "length": 16, "prompts": 3, "prompt_length": 5, "new_tokens": 2},
        **{"experts": 2, "methods": [], "microbatches": 1, "vocabulary_chunks": 2},
        **{"remat": "full", "dtype": "float32", "optimizer": optax.sgd(0.1)},
    }
    return compile_model.compile_model(model=model, programs=programs, **{**arguments, **changes})


@needs_libtpu  # whose version the report has
def test_one_program_that_does_not_fit_is_told_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Too large after compiling, a merge too large, and one of whose leaves the compiler refuses."""
    compiled = Program.compile

    def compile(program: Program):
        if program.name == "merge averaging, one tensor":
            raise ValueError(f"{program.name} does not compile: {REFUSAL}")
        return compiled(program)

    monkeypatch.setattr(Program, "compile", compile)
    report = compiled_here(
        monkeypatch,
        families.CONFIGS["palm"],
        programs=["decode", "merge"],
        methods=[Averaging(), TaskArithmetic()],
        memory_bytes=10_000,
    )
    programs = json.loads(json.dumps(report))["programs"]
    assert list(programs) == ["decode", "merge averaging", "merge task_arithmetic"]
    assert not any(found["fits"] for found in programs.values())
    # The stacked [3, 32, 48] kernels, and the merge's three of each.
    kernel = ["layers/mlp/wi_0/kernel", 3 * 32 * 48 * 4]
    assert kernel in programs["decode"]["largest_arguments"]
    for name in ("merge averaging", "merge task_arithmetic"):
        assert programs[name]["largest_arguments"][0][1] == 3 * kernel[1]
        assert [kernel[0], 3 * kernel[1]] in programs[name]["largest_arguments"]
    assert "reason" not in programs["merge task_arithmetic"]
    assert programs["merge averaging"]["reason"] == (
        "final_norm/scale: Ran out of memory in memory space hbm. Used 2G of 1G hbm."
    )
    assert programs["merge averaging"]["largest_allocations"] == [
        "jit(f)/mul f32[32,4096] 1.50G",
        "f32[8] 512B",
    ]
    decode, averaging, arithmetic = report["shortfalls"]
    needed, most = (plan.size_text(size) for size in (programs["decode"]["memory_bytes"], 10_000))
    assert decode.startswith(f"decode does not fit: it needs {needed} of a chip's {most}, ")
    assert f"Its largest arguments: {kernel[0]} {plan.size_text(kernel[1])}" in decode
    assert "; largest inside: jit(decode)/" in decode
    assert "largest inside: jit(f)/mul f32[32,4096] 1.50G, f32[8] 512B" in averaging
    assert f"{kernel[0]} {plan.size_text(3 * kernel[1])}" in arithmetic
    assert "| merge averaging      | does not fit:" in capsys.readouterr().out


REFUSAL = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 2G of 1G hbm.

Largest program allocations in hbm:

  1. Size: 1.50G
     Operator: op_name="jit(f)/mul" source_file="f.py" source_line=1
     Shape: f32[32,4096]{1,0:T(8,128)}
     Unpadded size: 1.50G

  2. Size: 512B
     Shape: f32[8]{0}
"""


@needs_libtpu
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_family_is_compiled_as_itself(monkeypatch: pytest.MonkeyPatch, family: str):
    model = families.CONFIGS[family]
    found = compiled_here(monkeypatch, model, programs=["decode"])["programs"]["decode"]
    cache = 2 * model.num_layers * 3 * (5 + 2) * model.num_kv_heads * model.head_dim
    assert found["argument_bytes"] == 4 * (model.num_params() + cache + 3 + 3)  # ids and lengths


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("family", "remat"),
    [("palm", "none"), ("palm", "full"), ("llama", "full"), ("gemma3", "full")],
)
def test_a_train_step_has_the_operations_of_arithmetic(
    monkeypatch: pytest.MonkeyPatch, family: str, remat: str, capsys: pytest.CaptureFixture[str]
):
    """To the last one, but for the parameters of norms, which no product reads."""
    model = families.CONFIGS[family]
    if family == "llama":  # a table that is only looked up in has no products
        model = dataclasses.replace(model, tied_embeddings=True)
    chunks = 1 if remat == "none" else 2  # a chunk of the readout is computed again
    report = compiled_here(
        monkeypatch, model, programs=["train"], remat=remat, vocabulary_chunks=chunks
    )
    params = decoder.abstract_params(families.MODELS[type(model)](model))
    scales = sum(x.size for path, x in jax.tree.leaves_with_path(params) if path[-1].key == "scale")
    flops, told = (report["programs"]["train"][name] for name in ("flops", "arithmetic"))
    passes = 6 if remat == "none" else 8
    norms = passes * scales * 4 * 16
    assert flops + norms == pytest.approx(flops / told["least_ratio"], rel=1e-9)
    assert (told["ratio"] < told["least_ratio"]) == (remat == "full" and family != "gemma3")
    assert told["ratio"] == flops / told["flops"]
    printed = f"\ntrain: its operations are {told['ratio']:.3f} of ({passes} x parameters + "
    assert printed in capsys.readouterr().out


# ---- the table ------------------------------------------------------------------------------------------------------


def saved(folder: pathlib.Path, name: str, *, slices: int = 1) -> str:
    """A report as --json saves it, with round numbers, of three programs and a refused one."""
    figures = {"fits": True, "argument_bytes": 2e9, "temporary_bytes": 5e8, "memory_bytes": 25e8}
    roofline = {
        "products_s": 0.5,
        "memory_s": 0.2,
        "links_s": 0.1,
        "seconds": 0.5,
        "bound": "products",
    }
    step = {**figures, "roofline": roofline, "tokens_per_s": 123456.7, "compile_seconds": 30}
    merge = {**step, "tokens_per_s": None, "memory_bytes": 9e9, "argument_bytes": 8e9}
    report = {
        "parameters": 64_383_115_264,
        "topology": "v5p:4x4x4",
        "slices": slices,
        "mesh": {"data": slices, "fsdp": 32, "model": 2},
        "chip": {"memory_bytes": 100e9},
        "work": {"rows": 256, "length": 1280},
        "libraries": {"libtpu": "0.1"},
        "compiler": {"seconds": 200.4, "peak_bytes": 2e9},
        "programs": {
            "train": step,
            "score": {**step, "fits": False, "memory_bytes": 120e9},
            "decode": {
                "fits": False,
                "reason": "Used 200G of 95G.",
                "largest_arguments": [["a/b", 10]],
            },
            "merge ties": merge,
            "survey ties": {**merge, "roofline": {**roofline, "seconds": 0.25}},
        },
    }
    path = folder / name
    path.write_text(json.dumps(report))
    return str(path)


def test_reports_become_one_table(tmp_path: pathlib.Path):
    table = compile_table.markdown([saved(tmp_path, "a.json"), saved(tmp_path, "b.json", slices=4)])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    rows = [row for row in rows if row]
    assert rows[0] == [
        "parameters",
        "slice",
        "chip",
        "train",
        "score",
        "prefill",
        "decode",
        "merge",
    ]
    assert rows[2][:3] == ["64.4 B", "v5p:4x4x4, 1 x 32 x 2", "100 GB"]
    assert rows[2][3] == "2 + 0.5 GB; 0.5 s, 123,457/s"
    assert rows[2][4] == "**no**: 120 GB"
    assert rows[2][5] == "-"
    assert rows[2][6] == "**no**: Used 200G of 95G."
    # The most that any program of the merge needs, and the time of all that one method runs.
    assert rows[2][7] == "8 + 0.5 GB; ties 0.75 s"
    assert rows[3][1] == "4 x v5p:4x4x4, 4 x 32 x 2"
