"""What `python -m launch.show` prints, on small folders."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from collections.abc import Mapping

import numpy as np
import pytest
import safetensors.numpy

import merging
from launch import show
from merging.methods.ties import Ties


@pytest.fixture
def folder(tmp_path: pathlib.Path):
    """Makes a checkpoint's folder."""

    def make(name: str, leaves: Mapping[str, np.ndarray]) -> str:
        path = tmp_path / name
        path.mkdir()
        safetensors.numpy.save_file(dict(leaves), path / "model.safetensors")
        return str(path)

    return make


def model(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "layers.w": rng.standard_normal((3, 4, 5)).astype(np.float32),
        "norm": np.ones(4, np.float16),
        "steps": np.arange(5),
    }


def lines(*paths: str, **options) -> list[str]:
    """Without alignment."""
    return [" ".join(line.split()) for line in show.shown(paths, **options)]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.show", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_leaves_and_totals(folder):
    path = folder("base", model())
    found = lines(path)
    assert found[0] == path
    assert sorted(found[1:4]) == sorted(
        ["240 float32 [3, 4, 5] layers.w", "8 float16 [4] norm", "40 int64 [5] steps"]
    )
    assert found[4].startswith("288 bytes in 3 leaves (")
    assert found[4].endswith("): 64 parameters, 5 other elements")
    assert len(found) == 5


def test_stacked_axes_and_patterns(folder):
    path = folder("base", model())
    found = lines(path, stacked=["layers=0"], leaves="lay*")
    assert found[1:] == [
        "240 float32 [3 layers, 4, 5] layers.w",
        "240 bytes in 1 leaves (1 float32): 60 parameters",
    ]
    with pytest.raises(ValueError, match="--stacked=layers: give PATTERN=AXIS"):
        lines(path, stacked=["layers"])
    with pytest.raises(ValueError, match="'heads' match no leaf"):
        lines(path, stacked=["heads=0"])


def test_norms(folder):
    leaves = model()
    leaves["norm"][1] = np.nan
    found = lines(folder("base", leaves), has_norms=True)
    assert found[1] == "norm largest not finite"
    norm = np.linalg.norm(leaves["layers.w"].astype(np.float64).ravel())
    largest = np.abs(leaves["layers.w"]).max()
    assert f"{norm:.6g} {largest:.6g} 0 240 float32 [3, 4, 5] layers.w" in found
    assert f"{3**0.5:.6g} 1 1 8 float16 [4] norm" in found
    assert f"{np.sqrt(norm**2 + 3 + 30):.6g} 4 1 all leaves" in found


def test_the_difference_of_two(folder):
    first, second = model(), model()
    second["layers.w"] = second["layers.w"].copy()
    second["layers.w"][0, 0, :2] += np.float32(0.5)
    first["extra"] = np.zeros(2, np.float32)
    second["norm"] = np.ones(3, np.float16)
    second["steps"] = second["steps"].astype(np.int32)
    second["other"] = np.zeros((1, 2), np.float32)
    change = second["layers.w"].astype(np.float64) - first["layers.w"]
    found = lines(folder("a", first), folder("b", second))
    assert "only in the first 8 float32 [2] extra" in found
    assert "only in the second 8 float32 [1, 2] other" in found
    assert "first float16 [4], second float16 [3]: norm" in found
    assert "first int64 [5], second int32 [5]: steps" in found
    numbers = f"{np.abs(change).max():.6g} {np.linalg.norm(change.ravel()):.6g} 0"
    assert f"2 3.33% {numbers} layers.w" in found
    assert f"2 3.08% {numbers} all leaves" in found
    assert found[-1] == "1 of 2 leaves compared are equal"
    assert not [line for line in found if line.endswith(" steps") and "%" in line]


def test_how_a_merge_was_made(folder, tmp_path: pathlib.Path):
    base, expert = folder("base", model()), folder("expert", model())
    for name, method in (("ties", Ties()), ("many", None)):
        merging.merge_checkpoints(
            base=base,
            experts=[expert],
            output_dir=tmp_path / name,
            method=method,
            methods=None if method else {"a": Ties(), "b": Ties(scale=0.5)},
            seed=7,
        )
    found = lines(str(tmp_path / "ties"))
    assert [line for line in found if line.startswith("made by merge in ")]
    assert [line for line in found if line.startswith("method Ties(") and line.endswith("seed 7")]
    assert [line for line in found if line.startswith(f"base {base} (")]
    assert [line for line in found if line.startswith(f"expert {expert} (")]
    many = str(tmp_path / "many")
    with pytest.raises(ValueError, match=f"{many} holds 2 merges: name one of {many}/a, {many}/b"):
        lines(many)
    assert [line for line in lines(f"{many}/b") if "scale=0.5" in line]


def test_the_command(folder):
    path = folder("base", model())
    done = run(path, path, "--leaves=layers*")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("1 of 1 leaves compared are equal\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/folder"], "Error: /no/such/folder does not exist"),
        (["BASE", "--leaves=nothing"], "no leaf is like 'nothing'"),
        (["BASE", "BASE", "--norms"], "Error: --norms is of one checkpoint"),
        (["BASE", "BASE", "BASE"], "name one checkpoint or two; found 3"),
    ],
)
def test_errors_are_one_message(folder, arguments: list[str], message: str):
    path = folder("base", model())
    done = run(*(path if each == "BASE" else each for each in arguments))
    assert done.returncode == 1
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_help_needs_no_jax():
    code = "import launch.show, launch.compile, sys; print({'jax', 'merging'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
