"""Commands on gs://, through an object store on loopback: the same bytes as on disk, whatever the line to it does."""

from __future__ import annotations

import json
import pathlib
import random
import shutil
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator

import pytest

from tests import buckets
from tests.launch import small_llama

REPOSITORY = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[buckets.Store]:
    pytest.importorskip("gcsfs")
    with buckets.store(tmp_path_factory.mktemp("store")) as made:
        yield made


@pytest.fixture(scope="module")
def inputs(store: buckets.Store, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A base and two experts on disk, and in the bucket below in/."""
    folder = tmp_path_factory.mktemp("disk")
    base = small_llama.make_base(folder / "base")
    for i in range(2):
        small_llama.make_expert(folder / f"expert_{i}", base, number=i)
    store.put_folder("in", folder)
    return folder


@pytest.fixture(scope="module")
def wanted(store: buckets.Store, inputs: pathlib.Path) -> dict[str, bytes]:
    """The files of the merge on disk."""
    output = inputs / "out"
    done = merge(str(inputs), str(output), address=store.address)
    assert done.returncode == 0, done.stderr
    return files(output)


def run(*command: str, address: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=REPOSITORY,
        env=buckets.environment(address),
        capture_output=True,
        text=True,
    )


def merge(folder: str, output: str, *, address: str) -> subprocess.CompletedProcess[str]:
    experts = ",".join(f"{folder}/expert_{i}" for i in range(2))
    flags = [f"--base={folder}/base", f"--experts={experts}", "--method=ties", f"--output={output}"]
    return run("launch.merge", *flags, address=address)


def files(folder: pathlib.Path) -> dict[str, bytes]:
    """All files but the manifest (times, machine) and the statistics (sums in the order of arrival, experts' paths)."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name not in ("manifest.json", "statistics.json")
    }


def test_a_merge_in_a_bucket_has_the_bytes_of_one_on_disk(
    store: buckets.Store, wanted: dict[str, bytes]
):
    """In place of what an earlier run left there, and with the manifest last."""
    output = store.folder / "merged"
    store.put("merged/unfinished.json", b"{}")
    store.put("merged/model-00007-of-00009.safetensors", b"left behind")
    before = len(store.uploads())
    done = merge("gs://bucket/in", "gs://bucket/merged", address=store.address)
    assert done.returncode == 0, done.stderr
    assert files(output) == wanted
    assert json.loads((output / "manifest.json").read_text())["stage"] == "merge"
    ours = [urllib.parse.unquote(name) for name in store.uploads()[before:]]
    assert (ours[0], ours[-1]) == ("merged/unfinished.json", "merged/manifest.json")
    again = merge("gs://bucket/in", "gs://bucket/merged", address=store.address)
    assert "done before: gs://bucket/merged" in again.stdout


def test_what_others_put_there_is_refused(store: buckets.Store, inputs: pathlib.Path):
    store.put("other/thesis.txt", b"mine")
    done = merge("gs://bucket/in", "gs://bucket/other", address=store.address)
    assert done.returncode == 1
    assert "gs://bucket/other holds something that this program did not make" in done.stderr
    assert [path.name for path in (store.folder / "other").iterdir()] == ["thesis.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["orbax", "t5x"])
def test_other_formats_go_there_and_back(
    store: buckets.Store, inputs: pathlib.Path, tmp_path: pathlib.Path, name: str
):
    there = run(
        "launch.convert",
        *("--input=gs://bucket/in/base", f"--format={name}", f"--output=gs://bucket/{name}"),
        address=store.address,
    )
    assert there.returncode == 0, there.stderr
    back = run(
        "launch.convert",
        *(f"--input=gs://bucket/{name}", "--format=safetensors", f"--output={tmp_path / 'back'}"),
        address=store.address,
    )
    assert back.returncode == 0, back.stderr
    tensors = {}
    from safetensors.numpy import load_file

    for folder in (inputs / "base", tmp_path / "back"):
        tensors[folder] = {
            leaf.replace("/", "."): array.tobytes()
            for file in folder.glob("*.safetensors")
            for leaf, array in load_file(file).items()
        }
    one, other = tensors.values()
    assert one == other


@pytest.mark.slow
@pytest.mark.parametrize("status", [503, 429, 0])
def test_requests_that_fail_are_made_again(
    store: buckets.Store, wanted: dict[str, bytes], status: int
):
    """One in twenty, far more than in life, since a small merge makes few."""
    draws = random.Random(0)
    line = buckets.BrokenLine(store, lambda number: status if draws.random() < 0.05 else None)
    try:
        done = merge("gs://bucket/in", f"gs://bucket/failing_{status}", address=line.address)
    finally:
        line.close()
    assert done.returncode == 0, done.stderr
    assert line.faults > 2
    assert files(store.folder / f"failing_{status}") == wanted


@pytest.mark.slow
def test_a_store_that_was_killed_comes_back(store: buckets.Store, wanted: dict[str, bytes]):
    """During the merge, after 40 requests: it is away while 5 more are made."""
    is_away = threading.Event()

    def fault(number: int) -> int | None:
        if number == 40:
            store.kill()
            is_away.set()
        if number == 45:
            store.start()
            is_away.clear()
        return None

    line = buckets.BrokenLine(store, fault)
    try:
        done = merge("gs://bucket/in", "gs://bucket/killed", address=line.address)
    finally:
        line.close()
        if is_away.is_set():
            store.start()
    assert done.returncode == 0, done.stderr
    assert files(store.folder / "killed") == wanted


@pytest.mark.slow
def test_a_merge_that_was_killed_is_made_by_the_same_command(
    store: buckets.Store, wanted: dict[str, bytes], tmp_path: pathlib.Path
):
    """A line that is dead for good ends the run with a message; the same command on a good line makes the same bytes."""
    line = buckets.BrokenLine(store, lambda number: 403 if number > 40 else None)
    try:
        failed = merge("gs://bucket/in", "gs://bucket/again", address=line.address)
    finally:
        line.close()
    assert failed.returncode == 1
    assert "gs://bucket" in failed.stderr.splitlines()[-1]
    assert not (store.folder / "again" / "manifest.json").exists()
    done = merge("gs://bucket/in", "gs://bucket/again", address=store.address)
    assert done.returncode == 0, done.stderr
    assert files(store.folder / "again") == wanted
    shutil.rmtree(store.folder / "again")
