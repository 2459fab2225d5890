"""Commands on gs://, through an object store on loopback: the same bytes as on disk, whatever the line to it does."""

from __future__ import annotations

import json
import os
import pathlib
import random
import re
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from launch import devices
from merging.checkpoints import boxes, open_checkpoint
from merging.engine import journal
from tests import buckets
from tests.campaigns import finetune_kills
from tests.launch import small_llama
from tests.merging.training import runs

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


def environment(address: str) -> dict[str, str]:
    """Of a process with one device that finds the store there."""
    return buckets.environment(address) | devices.cpu_environment(os.environ, devices=1)


def run(*command: str, address: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=REPOSITORY,
        env=environment(address),
        capture_output=True,
        text=True,
    )


def merge(folder: str, output: str, *flags: str, address: str) -> subprocess.CompletedProcess[str]:
    return run("launch.merge", *merge_flags(folder, output), *flags, address=address)


def merge_flags(folder: str, output: str) -> list[str]:
    """Of a merge into five files, which takes two passes."""
    experts = ",".join(f"{folder}/expert_{i}" for i in range(2))
    flags = [f"--base={folder}/base", f"--experts={experts}", "--method=ties", f"--output={output}"]
    return [*flags, "--gin.SHARD_BYTES=1_000_000"]


def one_in_a_hundred(number: int) -> int | None:
    """Of many requests, at random; a few are sure to fail."""
    is_failing = random.Random(number).random() < 0.01 or number in (7, 30)
    return (503, 429, buckets.BREAK)[number % 3] if is_failing else None


def counted(line: buckets.BrokenLine) -> int:
    """Faults that clients must have counted; a connection that is closed before an answer is not always one."""
    return line.faults.total() - line.faults[buckets.BREAK]


def leaves(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Of a safetensors file."""
    from safetensors.numpy import load_file

    return load_file(path)


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


@pytest.mark.slow
def test_a_merge_that_was_killed_with_the_store_goes_on(
    store: buckets.Store, wanted: dict[str, bytes]
):
    """Once a shard is whole and written down; what fails on the line besides changes nothing."""
    output = store.folder / "resumed"
    whole: set[str] = set()

    def kill_both(number: int) -> int | None:
        written = {
            each["leaf"]
            for each in journal.read(output / "journal.0.jsonl")[1][1:]
            if "leaf" in each
        }
        for path in output.glob("*.safetensors"):
            if set(leaves(path)) <= written:
                whole.add(path.name)
        if whole:
            victim.kill()
            store.kill()
        return one_in_a_hundred(number)

    line = buckets.BrokenLine(store, kill_both)
    command = [
        sys.executable,
        "-m",
        "launch.merge",
        *merge_flags("gs://bucket/in", "gs://bucket/resumed"),
    ]
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment(line.address)) as victim:
        pass  # until it is killed
    line.close()
    assert whole and not (output / "manifest.json").exists()
    store.start()
    lost = whole.pop()
    store.delete(f"resumed/{lost}")  # as if it had not been closed
    before = len(store.uploads())
    line = buckets.BrokenLine(store, one_in_a_hundred)
    done = merge("gs://bucket/in", "gs://bucket/resumed", address=line.address)
    line.close()
    assert done.returncode == 0, done.stderr
    assert files(output) == wanted
    how = json.loads((output / "manifest.json").read_text())
    assert len(leaves(output / lost)) <= how["pieces"] - how["pieces_resumed"] < how["pieces"]
    told = re.search(r"(\d+) requests to object storage failed and were made again", done.stderr)
    assert told and int(told[1]) >= max(counted(line), how["storage_retries"])
    put = {urllib.parse.unquote(name).removeprefix("resumed/") for name in store.uploads()[before:]}
    assert lost in put and not whole & put


@pytest.mark.slow
def test_a_merge_waits_for_a_store_that_was_killed(
    store: buckets.Store, wanted: dict[str, bytes], inputs: pathlib.Path
):
    """Into a database, which another client writes."""

    def fault(number: int) -> int | None:
        if number == 60:
            store.kill()
        if number == 64:
            store.start()
        return one_in_a_hundred(number)

    line = buckets.BrokenLine(store, fault)
    done = merge(
        "gs://bucket/in", "gs://bucket/waiting", "--gin.FORMAT='orbax'", address=line.address
    )
    line.close()
    assert done.returncode == 0, done.stderr
    reader = open_checkpoint(store.folder / "waiting")
    theirs = {name.replace("/", "."): (reader, name) for name in reader.specs()}
    for path in (inputs / "out").glob("*.safetensors"):
        for name, array in leaves(path).items():
            reader, stored = theirs.pop(name)
            found = reader.read(stored, boxes.whole(reader.specs()[stored].shape))
            assert found.tobytes() == array.tobytes(), name
    assert not theirs
    how = json.loads((store.folder / "waiting/manifest.json").read_text())
    assert how["storage_retries"] >= 4


@pytest.mark.slow
def test_a_training_that_was_killed_goes_on_from_its_checkpoint(
    store: buckets.Store, tmp_path: pathlib.Path
):
    settings = {"train_steps": 8, "checkpoint_every": 2}
    command = ("tests.merging.training.job", "gs://bucket/trained", json.dumps(settings), "{}")
    line = buckets.BrokenLine(store, one_in_a_hundred)
    with subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=REPOSITORY,
        env=environment(line.address),
        stdout=subprocess.PIPE,
        text=True,
    ) as victim:
        assert any(told == "step 5\n" for told in victim.stdout)  # so the one of step 2 is whole
        victim.kill()
    assert not (store.folder / "trained/manifest.json").exists()
    done = run(*command, address=line.address)
    line.close()
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^step (\d)$", done.stdout, re.MULTILINE)[0] in ("3", "5")
    with jax.numpy_dtype_promotion("standard"):
        runs.run(tmp_path / "unbroken", **settings)
    assert finetune_kills.differences(store.folder / "trained", tmp_path / "unbroken") == []


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
    for folder in (inputs / "base", tmp_path / "back"):
        tensors[folder] = {
            leaf.replace("/", "."): array.tobytes()
            for file in folder.glob("*.safetensors")
            for leaf, array in leaves(file).items()
        }
    one, other = tensors.values()
    assert one == other


# As a stage writes and reads: some megabytes by offset, a small file whole, and all of it again by ranges.
TRAFFIC = """
import numpy as np
from etils import epath
from merging.checkpoints import gcs
from merging.checkpoints.storage import ByteSink, ByteSource, put_whole, retried_requests
gcs.SECONDS_OF_SILENCE = 2.0
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
print(retried_requests())
"""


def send(line: buckets.BrokenLine, name: str) -> int:
    """TRAFFIC over a line; how many requests were made again."""
    done = subprocess.run(
        [sys.executable, "-c", TRAFFIC.replace("FOLDER", name)],
        cwd=REPOSITORY,
        env=environment(line.address),
        capture_output=True,
        text=True,
    )
    line.close()
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
def test_requests_that_fail_are_made_again_and_counted(store: buckets.Store):
    """One in eight, far more than in life, since these are few."""
    faults = [503, 429, buckets.BREAK, buckets.STALL]
    line = buckets.BrokenLine(
        store, lambda number: faults[number // 8 % 4] if number % 8 == 5 else None
    )
    assert send(line, "failing") >= counted(line) >= 3  # where this machine stalls, it is more


@pytest.mark.slow
def test_a_store_that_was_killed_comes_back(store: buckets.Store):
    """It is away from the 12th request on, while two more are made, one of them perhaps by HTTP's client itself, uncounted."""

    def fault(number: int) -> int | None:
        if number == 12:
            store.kill()
        if number == 14:
            store.start()
        return None

    assert send(buckets.BrokenLine(store, fault), "killed") >= 1
