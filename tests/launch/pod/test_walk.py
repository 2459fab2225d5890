"""WORKSPACE.md's walk from `gcloud auth` to a report: each of its commands, with the outside programs only written down."""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parents[3]
HEADING = "## From gcloud auth to a report"


def commands() -> list[str]:
    """All commands of the walk, in order; a here-document is part of its command."""
    section = (REPOSITORY / "WORKSPACE.md").read_text().split(HEADING)[1].split("\n## ")[0]
    found = []
    for block in re.findall(r"```bash\n(.*?)```", section, flags=re.S):
        if "<<" in block:
            found.append(block)
        else:
            found += block.splitlines()
    return found


COMMANDS = commands()
OURS = [command for command in COMMANDS if command.startswith("python -m launch.")]
FILES = [command for command in COMMANDS if command.startswith("cat > ")]
ON_THE_POD = sorted({command.partition(" -- ")[2] for command in OURS if " -- " in command})
OUTSIDE = [command for command in COMMANDS if command not in OURS + FILES]


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with the files that the walk writes."""
    for command in FILES:
        subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    return tmp_path


def test_there_is_a_walk():
    assert OUTSIDE[0] == "gcloud auth login"
    assert [command.split()[2] for command in FILES] == [
        "my_tasks.py",
        "my_paper.gin",
        "my_pod.gin",
    ]
    assert len(OURS) >= 10


@pytest.mark.parametrize("command", OUTSIDE)
def test_outside_commands_are_whole(tmp_path: pathlib.Path, command: str):
    """They are of a program that the walk has the user install, and the shell reads them as one means them."""
    for name in ("gcloud", "docker", "kubectl"):
        program = tmp_path / name
        program.write_text('#!/bin/bash\nprintf "%s\\n" "$(basename "$0") $*" >>"$CALLS"\n')
        program.chmod(0o700)
    calls = tmp_path / "calls"
    environment = {"PATH": str(tmp_path) + ":/usr/bin:/bin", "CALLS": str(calls)}
    subprocess.run(["bash", "-euc", command], check=True, env=environment, cwd=REPOSITORY)
    told = calls.read_text().splitlines()
    assert len(told) == (8 if command.startswith("for") else 1)
    if "--file=" in command:
        assert (REPOSITORY / re.search(r"--file=(\S+)", command)[1]).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("command", OURS)
def test_our_commands_run_dry(folder: pathlib.Path, command: str):
    words = shlex.split(command)
    at = words.index("--") if "--" in words else len(words)
    dry = [sys.executable, *words[1:at], "--dry_run", *words[at:]]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PATH": "/nowhere"}
    done = subprocess.run(dry, cwd=folder, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert re.match("gcloud|kubectl", done.stdout)
    assert all(word in done.stdout for word in words[at + 1 :])


@pytest.mark.slow
@pytest.mark.parametrize("command", ON_THE_POD)
def test_what_runs_on_the_pod_runs_dry(folder: pathlib.Path, command: str):
    for file in ("my_tasks.py", "my_paper.gin"):  # no bucket is read here
        text = (folder / file).read_text()
        assert "gs://my-bucket/vocabulary.model" in text
        (folder / file).write_text(text.replace("gs://my-bucket/vocabulary.model", "bytes"))
    words = [word.replace("gs://my-bucket", str(folder)) for word in shlex.split(command)]
    assert words[:2] == ["python", "-m"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, *words[1:], "--dry_run"],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    assert "sizes      1b, 8b, 24b, 64b\n" in done.stdout and "of 416 done" in done.stdout
    assert not (folder / "paper").exists()
