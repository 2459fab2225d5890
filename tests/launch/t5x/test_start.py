"""The start of T5X's programs: what it says where T5X is not there, and what it hands over."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import sys

import pytest

from launch.pod import local
from launch.t5x import start

REPOSITORY = pathlib.Path(__file__).parents[3]

# A program of a T5X that is not T5X: it says who it is and defines a flag that t5x.train has.
PROGRAM = """
import __main__, sys, jax
from absl import app, flags
INDEX = flags.DEFINE_integer("process_index", 5, "As t5x.train has it.")
def main(argv):
    assert __main__.INDEX is INDEX
    print(__name__, argv[1:], INDEX.value, jax.process_index(), jax.process_count(), jax.device_count())
app.run(main)
"""


def test_without_t5x_the_paragraph_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "t5x" else find(name)
    )
    with pytest.raises(SystemExit, match=r"\[t5x\].*requirements.txt.*PYTHONPATH.*WORKSPACE.md"):
        start.main(["t5x.eval"])
    assert "**T5X.**" in (REPOSITORY / "WORKSPACE.md").read_text()


@pytest.mark.parametrize("argv", [[], ["--gin_file=a.gin"], ["launch.merge"]])
def test_no_program_of_t5x_is_refused(argv):
    with pytest.raises(SystemExit, match=r"wanted a program of T5X first: t5x\.train"):
        start.main(argv)


def test_its_programs_join_the_other_processes(tmp_path):
    (tmp_path / "t5x").mkdir()
    (tmp_path / "t5x" / "__init__.py").touch()
    (tmp_path / "t5x" / "eval.py").write_text(PROGRAM)
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    outputs = local.run_local(
        [sys.executable, "-m", "launch.t5x.start", "t5x.eval", "more"],
        processes=2,
        devices=2,
        timeout_s=120.0,
        env={**os.environ, "PYTHONPATH": path},
        echo=[].append,
    )
    for index, output in enumerate(outputs):
        assert f"__main__ ['more'] 5 {index} 2 4" in output
