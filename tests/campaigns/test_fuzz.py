"""The fuzz campaign on a thousandth of its inputs, and that it finds what it looks for."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parents[2]


def run(*flags: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "tests.campaigns.fuzz", "--workers=1", *flags]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_thousand_inputs():
    code, printed = run("--inputs=1000", "--seed=1")
    assert code == 0, printed
    assert "1,000 inputs" in printed
    read, refused = (
        sum(int(n.replace(",", "")) for n in re.findall(rf"([\d,]+) {word}", printed))
        for word in ("read", "refused")
    )
    assert read > 100 and refused > 500


@pytest.mark.slow
def test_faults_are_found():
    code, printed = run("--inputs=16", "--only=planted")
    assert code == 1
    for what in (
        "error, KeyError", "outside, open", "for writing", "outside, os.listdir", "outside, read: ", "memory, MemoryError",
        "pickle, pickle.find_class", "crash, exit code -11", "hang, Hang",
    ):  # fmt: skip
        assert what in printed, (what, printed)
