"""Runs that fail or are stopped: a clear error, nothing lost, and the same command ends with the same bytes."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import merging
from merging import convert, manifest
from merging.checkpoints import open_checkpoint, tree_writer
from merging.checkpoints.format import CheckpointError
from merging.engine import journal, output, plan, stream, survey
from merging.manifest import OutputError
from merging.merge import run
from merging.methods.averaging import Averaging
from merging.methods.dare_ties import DareTies
from merging.methods.ties import Ties
from tests import models

METHODS = {"ties": Ties(), "dare_ties": DareTies(trim_density=0.3, rescale="l1")}
FORMATS = ("safetensors", "orbax", "t5x", "t5x_orbax")


class Stopped(BaseException):
    """What stops a run in these tests, as Ctrl-C would."""


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """Many pieces, and databases that commit each of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("merging.engine.pieces.PIECE_ELEMENTS", 512)
        patch.setattr(convert, "PIECE_ELEMENTS", 512)
        patch.setattr(tree_writer, "BATCH_BYTES", 1)
        yield


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], pathlib.Path]:
    """(inputs, what comes of them)."""
    folder = tmp_path_factory.mktemp("resume")
    shapes = {name.replace(".", "/"): shape for name, shape in models.SHAPES.items()}
    inputs = models.save_all(folder, *models.base_and_experts(2, shapes=shapes))
    merging.merge_checkpoints(**inputs, output_dir=folder / "whole", methods=METHODS)
    return inputs, folder / "whole"


@pytest.fixture
def arguments(shared, tmp_path: pathlib.Path) -> dict[str, Any]:
    """Of a merge whose inputs may be changed."""
    return copied(shared[0], tmp_path)


@pytest.fixture(scope="module")
def half(shared, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """What a merge left that was stopped in its midst."""
    arguments = copied(shared[0], tmp_path_factory.mktemp("half"))
    stop(arguments)
    return arguments["output_dir"].with_name("out.partial")


@pytest.fixture
def stopped(half: pathlib.Path, arguments) -> dict[str, Any]:
    """Arguments of a merge that was stopped in its midst."""
    shutil.copytree(half, arguments["output_dir"].with_name("out.partial"))
    return arguments


def copied(inputs: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    """Arguments of a merge in a folder, of copies that are as old as the inputs."""
    for each in (inputs["base"], *inputs["experts"]):
        shutil.copytree(each, folder / pathlib.Path(each).name)
    return {
        "base": folder / "base",
        "experts": [folder / "expert_0", folder / "expert_1"],
        "output_dir": folder / "out",
        "methods": METHODS,
    }


def check(arguments: dict[str, Any], whole: pathlib.Path, names: Any = METHODS) -> None:
    """The output is what an unbroken run gives, and nothing else is left."""
    out = pathlib.Path(arguments["output_dir"])
    for name in names:
        with contextlib.closing(open_checkpoint(out / name)) as reader:
            read = {n: reader.read(n, tuple(map(slice, [0] * len(s.shape), s.shape)))
                    for n, s in reader.specs().items()}  # fmt: skip
        assert models.same_bits(read, models.load(whole / name)), name
    assert not out.with_name("out.partial").exists()
    assert not [p.name for p in out.iterdir() if "journal" in p.name or "unfinished" in p.name]


@contextlib.contextmanager
def stopping(
    owner: Any, name: str, after: int, error: Callable[[], BaseException] = Stopped
) -> Iterator[list[int]]:
    """A function that raises instead of being called for the n-th time; gives the calls."""
    function, calls = getattr(owner, name), itertools.count()
    seen: list[int] = []

    def stopped(*arguments: Any, **named: Any) -> Any:
        seen.append(next(calls))
        if seen[-1] == after:
            raise error()
        return function(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stopped)
        yield seen


def stop(arguments: dict[str, Any], after: int = 50, **more: Any) -> None:
    """A merge that is stopped after so many pieces were handed to their writers."""
    with stopping(output.Output, "put", after), pytest.raises(Stopped):
        merging.merge_checkpoints(**arguments, **more)
    assert not pathlib.Path(arguments["output_dir"]).exists()


# ---- going on ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_a_stopped_merge_goes_on(shared, arguments, format: str, tmp_path: pathlib.Path):
    stop(arguments, format=format)
    with pytest.raises(CheckpointError, match="is not finished"):
        open_checkpoint(tmp_path / "out.partial" / "ties")
    said: list[str] = []
    with stopping(stream.Stream, "load", -1) as loads:
        report = merging.merge_checkpoints(**arguments, format=format, log=said.append)
    assert report.pieces_resumed > 0 and len(loads) <= report.pieces - report.pieces_resumed
    there, wanted = re.search(
        r"resuming: (\d+) of (\d+) pieces are there", "\n".join(said)
    ).groups()
    assert (int(there), int(wanted)) == (report.pieces_resumed, report.pieces)
    assert "resuming: the survey is there" in said and report.reads == 1
    if format == "safetensors":  # a piece was half handed over, and others under way
        assert 24 <= report.pieces_resumed <= 27
    check(arguments, shared[1])
    told = json.loads((tmp_path / "out/ties/manifest.json").read_text())
    assert (told["pieces"], told["pieces_resumed"]) == (report.pieces, report.pieces_resumed)


def test_statistics_are_those_of_an_unbroken_run(shared, stopped, tmp_path: pathlib.Path):
    merging.merge_checkpoints(**stopped)
    found, wanted = (
        json.loads((folder / "ties/statistics.json").read_text())["model"]
        for folder in (tmp_path / "out", shared[1])
    )
    assert found["norms"] == pytest.approx(wanted["norms"], rel=1e-9)
    assert found["sampled"] == wanted["sampled"] and found["kept_share"] == wanted["kept_share"]


def test_a_survey_that_was_stopped_is_done_again(shared, arguments):
    with stopping(survey, "survey_in_worker", 5), pytest.raises(Stopped):
        merging.merge_checkpoints(**arguments)
    report = merging.merge_checkpoints(**arguments)
    assert report.reads == 3 and not report.pieces_resumed
    check(arguments, shared[1])


def test_stopped_again_and_again(shared, arguments):
    for after in (7, 30, 55):
        stop(arguments, after)
    merging.merge_checkpoints(**arguments)
    check(arguments, shared[1])


def test_with_more_memory_pieces_stay_as_they_were_cut(shared, stopped, monkeypatch):
    monkeypatch.setattr("merging.engine.pieces.PIECE_ELEMENTS", 1024)
    assert merging.merge_checkpoints(**stopped).pieces_resumed > 0
    check(stopped, shared[1])


def test_with_less_memory_all_is_computed_again(shared, stopped, monkeypatch):
    monkeypatch.setattr("merging.engine.pieces.PIECE_ELEMENTS", 64)
    merging.merge_checkpoints(**stopped)
    check(stopped, shared[1])


def test_a_piece_whose_bytes_are_not_what_they_were_is_computed_again(
    shared, stopped, tmp_path: pathlib.Path
):
    file = tmp_path / "out.partial/ties/model.safetensors"
    content = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    content[begin + 10] ^= 1
    file.write_bytes(content)
    before = len(journal.read(tmp_path / "out.partial/journal.0.jsonl")[1]) - 2
    assert merging.merge_checkpoints(**stopped).pieces_resumed == before - 1
    check(stopped, shared[1])


@pytest.mark.parametrize("damage", ["torn", "flipped", "header"])
def test_a_damaged_journal_counts_as_far_as_it_is_whole(
    shared, stopped, tmp_path: pathlib.Path, damage: str
):
    path = tmp_path / "out.partial/journal.0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    if damage == "torn":
        path.write_bytes(b"".join(lines)[:-5])
    else:
        at = 0 if damage == "header" else 10
        lines[at] = lines[at].replace(b'"', b"'", 1)
        path.write_bytes(b"".join(lines))
    left = {"torn": len(lines) - 3, "flipped": 8, "header": 0}[damage]
    assert merging.merge_checkpoints(**stopped).pieces_resumed == left
    check(stopped, shared[1])


def test_an_output_that_lacks_only_its_name_gets_it(shared, arguments):
    with stopping(manifest.Staging, "_publish", 0), pytest.raises(Stopped):
        merging.merge_checkpoints(**arguments)
    report = merging.merge_checkpoints(**arguments)
    assert report.was_done and report.bytes_read == 0
    check(arguments, shared[1])


@pytest.mark.parametrize("marker", ["", '{"stage": "me'])
def test_a_run_that_was_killed_as_it_began_leaves_nothing_to_go_on_with(
    tmp_path: pathlib.Path, marker: str
):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / manifest.MARKER).write_text(marker)
    with contextlib.closing(manifest.Staging(tmp_path / "out")) as staging:
        assert not staging.is_whole({"stage": "merge"})
        assert not staging.resume({"stage": "merge"})
        assert json.loads((staging.folder / manifest.MARKER).read_text()) == {"stage": "merge"}


@pytest.mark.parametrize("format", FORMATS)
def test_a_stopped_conversion_goes_on(shared, format: str, tmp_path: pathlib.Path):
    settings = convert.Settings(
        input=shared[1] / "ties", output_dir=tmp_path / "out", format=format
    )
    with stopping(output.Output, "put", 20), pytest.raises(Stopped):
        convert.convert(settings)
    said: list[str] = []
    convert.convert(settings, log=said.append)
    assert re.search(r"resuming: [1-9]\d* of \d+ pieces are there", said[0])
    with contextlib.closing(open_checkpoint(tmp_path / "out")) as reader:
        read = {n: reader.read(n, tuple(map(slice, [0] * len(s.shape), s.shape)))
                for n, s in reader.specs().items()}  # fmt: skip
    assert models.same_bits(read, models.load(shared[1] / "ties"))


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"output_dtype": "float32"}, 'output_dtype was null, is "float32"'),
        ({"format": "orbax"}, 'format was "safetensors", is "orbax"'),
        ({"shard_bytes": 10_000}, "shard_bytes was 5000000000, is 10000"),
        ({"methods": {**METHODS, "ties": Ties(density=0.1)}}, r"merges\.ties was .*is .*0\.1"),
        ({"methods": dict(reversed(METHODS.items()))}, r"outputs\[0\] was"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_journal_of_other_settings_is_refused(
    shared, stopped, tmp_path: pathlib.Path, change: dict, message: str
):
    match = rf"out\.partial holds the unfinished output of another run.*{message}.*remove .* anew"
    with pytest.raises(OutputError, match=match):
        merging.merge_checkpoints(**{**stopped, **change})
    assert merging.merge_checkpoints(**stopped).pieces_resumed > 0, "nothing is lost by it"
    check(stopped, shared[1])


def test_a_journal_of_other_inputs_is_refused(stopped):
    os.utime(stopped["experts"][1] / "model.safetensors", ns=(1, 1))
    with pytest.raises(OutputError, match=r"experts\[1\] has changed"):
        merging.merge_checkpoints(**stopped)


def test_a_journal_of_another_version_of_the_code_is_refused(stopped, monkeypatch):
    now = manifest.environment()
    monkeypatch.setattr(manifest, "environment", lambda: {**now, "code": "0" * 64})
    with pytest.raises(OutputError, match="code has changed"):
        merging.merge_checkpoints(**stopped)
    monkeypatch.setattr(manifest, "environment", lambda: {**now, "processes": 2})
    with pytest.raises(OutputError, match="processes was 1, is 2"):
        merging.merge_checkpoints(**stopped)


def test_one_run_at_a_time(shared, arguments):
    put, waiting, going = output.Output.put, threading.Event(), threading.Event()

    def slow(*given: Any, **named: Any) -> Any:
        waiting.set()
        assert going.wait(60)
        return put(*given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output.Output, "put", slow)
        first = threading.Thread(target=merging.merge_checkpoints, kwargs=arguments)
        first.start()
        assert waiting.wait(60)
        for methods in (METHODS, {"other": Averaging()}):
            with pytest.raises(OutputError, match=r"another run is at work in .*out\.partial"):
                merging.merge_checkpoints(**{**arguments, "methods": methods})
        going.set()
        first.join(60)
    check(arguments, shared[1])


# ---- what fails on the way -----------------------------------------------------------------------------------------


def _full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _on(patch: pytest.MonkeyPatch, function: str, file: str, nth: int, error: Callable) -> None:
    """An error of the operating system at the n-th call for a file whose path ends so, a regular expression."""
    real, calls = getattr(os, function), itertools.count()

    def failing(descriptor: Any, *arguments: Any, **named: Any) -> Any:
        name = descriptor
        if isinstance(descriptor, int):
            name = os.readlink(f"/proc/self/fd/{descriptor}")
        if re.search(f"{file}$", str(name)) and next(calls) >= nth:
            raise error()
        return real(descriptor, *arguments, **named)

    patch.setattr(os, function, failing)


FULL = {
    "the journal's beginning": ("write", "journal.0.jsonl", 0),
    "after the survey": ("write", "journal.0.jsonl", 1),
    "the journal": ("write", "journal.0.jsonl", 3),
    "a file's beginning": ("pwrite", "ties/model.safetensors", 0),
    "writing": ("pwrite", "ties/model.safetensors", 9),
    "the end of writing": ("fsync", "ties/model.safetensors", 0),
    "commit": ("fsync", "out.partial/dare_ties", 0),
    "a merge's manifest": ("fsync", r"ties/manifest\.json\.[0-9a-f]+\.tmp", 0),
    "the manifest": ("fsync", r"out\.partial/manifest\.json\.[0-9a-f]+\.tmp", 0),
    "the end": ("fsync", "out.partial", 0),
}

BEFORE_THE_MERGE = ("the journal's beginning", "after the survey", "a file's beginning")


@pytest.mark.parametrize("phase", FULL)
def test_a_full_disk_in_every_phase(shared, arguments, half, phase: str, monkeypatch):
    if phase not in BEFORE_THE_MERGE:
        shutil.copytree(half, arguments["output_dir"].with_name("out.partial"))
    monkeypatch.setattr("merging.engine.workers.SECONDS_BETWEEN_REPORTS", 0.001)
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        _on(patch, *FULL[phase], _full)
        with pytest.raises(OSError, match="No space left on device: '.+'"):
            merging.merge_checkpoints(**arguments, log=said.append)
    assert not arguments["output_dir"].exists()
    assert phase == "the journal's beginning" or re.match(
        r"stopped: what is finished stays in .*out\.partial; the same command goes on there",
        said[-1],
    )
    report = merging.merge_checkpoints(**arguments)
    assert report.was_done == (phase == "the end")
    if phase in ("commit", "a merge's manifest", "the manifest"):
        assert report.pieces_resumed == report.pieces
    check(arguments, shared[1])


@pytest.fixture
def disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system of 512 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    ("format", "free"),
    [
        pytest.param(
            format, free, marks=() if (format, free) == ("orbax", 24 << 10) else pytest.mark.slow
        )
        for format in FORMATS
        for free in (0, 4096, 24 << 10, 80 << 10)
    ],
)
def test_a_disk_that_is_full(shared, arguments, disk: pathlib.Path, format: str, free: int):
    arguments = {**arguments, "output_dir": disk / "out", "format": format}
    planned = plan.plan(plan.Settings(**arguments))
    room = os.statvfs(disk)
    (disk / "others").write_bytes(bytes(room.f_bavail * room.f_frsize - free))
    with pytest.raises((OSError, OutputError), match=r"(?i)no space left|can't write to"):
        run(planned)
    assert not (disk / "out").exists()
    (disk / "others").unlink()
    merging.merge_checkpoints(**arguments)
    check(arguments, shared[1])


def test_what_is_left_has_its_room_already(arguments, monkeypatch, tmp_path: pathlib.Path):
    stop(arguments, 80)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=40_000))
    with pytest.raises(OutputError, match="has 40,000 free"):
        merging.merge_checkpoints(**{**arguments, "output_dir": tmp_path / "elsewhere"})
    merging.merge_checkpoints(**arguments)


@pytest.mark.parametrize("nth", [40, 125], ids=["survey", "merge"])
def test_a_read_error(shared, arguments, nth: int):
    def broken() -> OSError:
        return OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.MonkeyPatch.context() as patch:
        _on(patch, "preadv", "expert_1/model.safetensors", nth, broken)
        with pytest.raises(OSError, match=r"Input/output error: '.*expert_1/model\.safetensors'"):
            merging.merge_checkpoints(**arguments)
    merging.merge_checkpoints(**arguments)
    check(arguments, shared[1])


@pytest.mark.parametrize(
    ("how", "nth"),
    [
        pytest.param("changes", 60, id="changes-survey", marks=pytest.mark.slow),
        pytest.param("changes", 125, id="changes-merge"),
        pytest.param("shrinks", 60, id="shrinks-survey"),
        pytest.param("shrinks", 125, id="shrinks-merge", marks=pytest.mark.slow),
        pytest.param("vanishes", 60, id="vanishes-survey", marks=pytest.mark.slow),
        pytest.param("vanishes", 125, id="vanishes-merge"),
    ],
)
def test_a_source_that_does_not_stay(
    shared, arguments, how: str, nth: int, monkeypatch, tmp_path: pathlib.Path
):
    monkeypatch.setattr("merging.engine.workers.SECONDS_BETWEEN_REPORTS", 0.001)
    monkeypatch.setattr(journal, "_PAUSE", 0)
    source, kept = arguments["experts"][0] / "model.safetensors", tmp_path / "kept"
    shutil.copy2(source, kept)
    load, calls = stream.Stream.load, itertools.count()

    def changing(*given: Any, **named: Any) -> Any:
        if next(calls) == nth:
            if how == "vanishes":
                source.unlink()
            else:
                content = source.read_bytes()
                source.write_bytes(content[:-4000] if how == "shrinks" else content[::-1])
        return load(*given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream.Stream, "load", changing)
        with pytest.raises(CheckpointError, match=r"expert_0/model\.safetensors"):
            merging.merge_checkpoints(**arguments)
    assert next(calls) > nth and not arguments["output_dir"].exists()
    if how == "changes":
        source.write_bytes(kept.read_bytes())
        with pytest.raises(OutputError, match=r"experts\[0\] has changed.*to begin anew"):
            merging.merge_checkpoints(**arguments)
    shutil.copy2(kept, source)
    report = merging.merge_checkpoints(**arguments)
    if nth == 125:
        assert report.pieces_resumed > 0, "what was done before it changed is kept"
    check(arguments, shared[1])
