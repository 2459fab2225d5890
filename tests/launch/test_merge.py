"""`launch.merge` as a command: its flags, its errors, two processes; on a llama of 2 million parameters."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from launch.pod import local
from tests.launch import small_llama

COMMAND = [sys.executable, "-m", "launch.merge"]
REPOSITORY = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that name a base and two experts."""
    folder = tmp_path_factory.mktemp("inputs")
    base = small_llama.make_base(folder / "base")
    experts = [small_llama.make_expert(folder / f"expert_{i}", base, number=i) for i in range(2)]
    return [f"--base={base}", f"--experts={','.join(map(str, experts))}"]


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *flags], cwd=REPOSITORY, capture_output=True, text=True)


def test_shorthand_merges_and_a_second_run_returns_at_once(
    inputs: list[str], tmp_path: pathlib.Path
):
    flags = [*inputs, "--method=ties", f"--output={tmp_path / 'out'}", "--gin.Ties.density=0.3"]
    first = run(*flags)
    assert first.returncode == 0, first.stderr
    for shown in (
        "Ties.density = 0.3",
        "reads      2 of",
        "written    ",
        "merge: 10.9 MB of 10.9 MB",
    ):
        assert shown in first.stdout + first.stderr
    assert (tmp_path / "out" / "manifest.json").exists()
    second = run(*flags)
    assert second.returncode == 0, second.stderr
    assert "done before" in second.stdout


def test_a_dry_run_prints_the_plan_and_writes_nothing(inputs: list[str], tmp_path: pathlib.Path):
    done = run(*inputs, "--method=dare", f"--output={tmp_path / 'out'}", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "Dare(density=0.5" in done.stdout and "writes     3.64 MB" in done.stdout
    assert not list(tmp_path.iterdir())


def test_many_merges_equal_single_ones(inputs: list[str], tmp_path: pathlib.Path):
    many = run(
        *inputs,
        f"--output={tmp_path / 'many'}",
        "--gin.METHODS={'sum': @TaskArithmetic(), 'sparse': @sparse/Ties()}",
        "--gin.sparse/Ties.density=0.05",
    )
    assert many.returncode == 0, many.stderr
    one = run(*inputs, "--method=ties", "--gin.Ties.density=0.05", f"--output={tmp_path / 'one'}")
    assert one.returncode == 0, one.stderr
    assert_equal(tmp_path / "one", tmp_path / "many" / "sparse")


def test_two_processes_give_the_bits_of_one(inputs: list[str], tmp_path: pathlib.Path):
    flags = [*inputs, "--method=dare_ties", "--gin.DareTies.trim_density=0.5"]
    one = run(*flags, f"--output={tmp_path / 'one'}")
    assert one.returncode == 0, one.stderr
    outputs = local.run_local(
        [*COMMAND, *flags, f"--output={tmp_path / 'two'}"],
        processes=2,
        devices=2,
        timeout_s=240.0,
        echo=[].append,
    )
    assert "written" in outputs[0] and "written" not in outputs[1]
    assert_equal(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method=ties"], "--gin.OUTPUT_DIR="),
        (["--method=tis", "--output=out"], "Did you mean gin_configs/methods/ties.gin"),
        (["--method=ties", "--output=out", "--experts=/no/such"], "/no/such"),
        (["--method=ties", "--output=out", "--gin.SED=1"], "Did you mean SEED"),
    ],
)
def test_what_the_user_got_wrong_is_one_message(inputs: list[str], flags: list[str], message: str):
    done = run(*inputs, *flags)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_traceback_is_there_for_the_asking(inputs: list[str]):
    done = run(*inputs, "--method=ties", "--verbosity=1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_help_has_a_whole_example_of_each_form():
    text = run("--help").stdout
    for form in ("--base=/data/base --experts", "--gin_file=gin_configs/runs/merge.gin", "METHODS"):
        assert form in text


def assert_equal(one: pathlib.Path, other: pathlib.Path) -> None:
    """All leaves are the same, however they are spread over files."""
    leaves, others = small_llama.read(one), small_llama.read(other)
    assert leaves.keys() == others.keys()
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, others[name], err_msg=name)
