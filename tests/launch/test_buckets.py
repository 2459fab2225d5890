"""Commands on gs://, through an object store on loopback: the same bytes as on disk, whatever the line to it does."""

from __future__ import annotations

import json
import pathlib
import random
import subprocess
import sys
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


@pytest.mark.slow
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


# As a stage writes and reads: some megabytes by offset, a small file whole, and all of it again by ranges.
TRAFFIC = """
import numpy as np
from etils import epath
from merging.checkpoints.storage import ByteSink, ByteSource, put_whole
folder = epath.Path("gs://bucket/FOLDER")
data = np.random.default_rng(0).bytes(3_000_000)
sink = ByteSink(folder / "file")
for start in range(0, len(data), 500_000):
    sink.write(start, memoryview(data[start : start + 500_000]))
sink.close()
put_whole(folder / "small", b"abc")
source = ByteSource(folder / "file")
got = b"".join(source.read(start, 100_000) for start in range(0, source.size, 100_000))
source.check_unchanged()
assert got == data
assert (folder / "small").read_bytes() == b"abc"
"""


def send(line: buckets.BrokenLine, name: str) -> None:
    """TRAFFIC over a line."""
    done = subprocess.run(
        [sys.executable, "-c", TRAFFIC.replace("FOLDER", name)],
        cwd=REPOSITORY,
        env=buckets.environment(line.address),
        capture_output=True,
        text=True,
    )
    line.close()
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("status", [503, 429, 0])
def test_requests_that_fail_are_made_again(store: buckets.Store, status: int):
    """One in ten, far more than in life, since these are few."""
    draws = random.Random(1)
    line = buckets.BrokenLine(store, lambda number: status if draws.random() < 0.1 else None)
    send(line, f"failing_{status}")
    assert line.faults >= 2


@pytest.mark.slow
def test_a_store_that_was_killed_comes_back(store: buckets.Store):
    """It is away from the 12th request on, while two more are made."""

    def fault(number: int) -> int | None:
        if number == 12:
            store.kill()
        if number == 14:
            store.start()
        return None

    send(buckets.BrokenLine(store, fault), "killed")
