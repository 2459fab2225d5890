"""`launch.convert` as a command."""

from __future__ import annotations

import pathlib
import subprocess
import sys

from tests import models

REPOSITORY = pathlib.Path(__file__).parents[2]


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.convert", *flags]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def test_shorthand_converts_and_a_dry_run_writes_nothing(tmp_path: pathlib.Path):
    model = models.base_and_experts(0)[0]
    folder = models.save(tmp_path / "in", model)
    flags = [f"--input={folder}", "--layout=stacked(axis=1)", f"--output={tmp_path / 'out'}"]
    dry = run(*flags, "--dry_run")
    assert dry.returncode == 0, dry.stderr
    assert "layout     stacked(axis=1): 9 leaves, 2 stacked" in dry.stdout
    assert not (tmp_path / "out").exists()
    done = run(*flags)
    assert done.returncode == 0, done.stderr
    assert "written    " in done.stdout and "convert: " in done.stderr
    back = run(
        "--gin_file=gin_configs/runs/convert.gin",
        f"--gin.INPUT='{tmp_path / 'out'}'",
        '--gin.LAYOUT="unstacked(axis=1)"',
        f"--gin.OUTPUT_DIR='{tmp_path / 'back'}'",
    )
    assert back.returncode == 0, back.stderr
    assert models.same_bits(models.load(tmp_path / "back"), model)
    again = run(*flags)
    assert "done before" in again.stdout


def test_what_the_user_got_wrong_is_one_message(tmp_path: pathlib.Path):
    done = run("--input=/no/such", "--format=safetensors")
    assert done.returncode == 1 and "--gin.OUTPUT_DIR=" in done.stderr
    done = run("--input=/no/such", f"--output={tmp_path / 'out'}")
    assert done.returncode == 1 and "/no/such does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_has_a_whole_example_of_each_form():
    text = run("--help").stdout
    for form in ("--format=safetensors", "--layout=stacked", "--gin_file=gin_configs/runs/convert"):
        assert form in text
