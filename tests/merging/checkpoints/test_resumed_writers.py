"""A writer goes on where an earlier one was: what is stored is found, read back and kept, what is damaged written again."""

from __future__ import annotations

import contextlib
import functools
import pathlib

import numpy as np
import pytest

from merging.checkpoints import boxes, open_checkpoint, orbax, safetensors, t5x, tree_writer
from merging.checkpoints.format import UNFINISHED_FILE, CheckpointError, LeafSpec
from tests import models

ARRAYS = {
    "a": np.arange(24 * 10, dtype=np.float32).reshape(24, 10),
    "b": np.arange(7, dtype=np.float32).astype(models.BFLOAT16),
    "c": np.array(3, np.int64),
}
SPECS = {n: LeafSpec(name=n, shape=a.shape, dtype=a.dtype) for n, a in ARRAYS.items()}

# Chunks of eight rows of "a"; boxes of four.
CHUNK_BYTES = 8 * 10 * 4
WRITERS = {
    "safetensors": functools.partial(safetensors.Writer, shard_bytes=1000),
    "ocdbt": functools.partial(orbax.Writer, chunk_bytes=CHUNK_BYTES),
    "zarr": functools.partial(orbax.Writer, chunk_bytes=CHUNK_BYTES, storage="zarr"),
    "zarr3": functools.partial(orbax.Writer, chunk_bytes=CHUNK_BYTES, storage="zarr3"),
    "t5x": functools.partial(t5x.Writer, chunk_bytes=CHUNK_BYTES),
    "t5x_orbax": functools.partial(t5x.OrbaxWriter, chunk_bytes=CHUNK_BYTES),
}


def rows(first: int) -> tuple[slice, slice]:
    """A box of "a"."""
    return slice(first, first + 4), slice(0, 10)


def is_chunked(kind: str) -> bool:
    return kind != "safetensors"


@pytest.fixture(params=WRITERS)
def left(request: pytest.FixtureRequest, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """(kind, folder) of a writer that was closed after the boxes at rows 0, 4 and 16 of "a"."""
    monkeypatch.setattr(tree_writer, "BATCH_BYTES", 1)
    writer = WRITERS[request.param](tmp_path, SPECS)
    for first in (0, 4, 16):
        writer.write("a", rows(first), ARRAYS["a"][rows(first)])
    writer.close()
    return request.param, tmp_path


def finish(writer: safetensors.Writer, kept: list[int]) -> None:
    """Writes what is not kept, and commits."""
    for first in range(0, 24, 4):
        if first in kept:
            writer.write("a", rows(first), writer.stored("a", rows(first)), is_stored=True)
        else:
            writer.write("a", rows(first), ARRAYS["a"][rows(first)])
    for name in ("b", "c"):
        writer.write(name, boxes.whole(ARRAYS[name].shape), ARRAYS[name])
    writer.commit()


def test_what_is_stored_is_kept(left):
    kind, folder = left
    writer = WRITERS[kind](folder, SPECS, is_resumed=True)
    held = [first for first in range(0, 24, 4) if writer.holds("a", rows(first))]
    # safetensors have room for all that lies before the last box; a chunk that was half put together is lost.
    assert held == ([0, 4] if is_chunked(kind) else [0, 4, 8, 12, 16])
    assert not any(writer.holds(n, boxes.whole(ARRAYS[n].shape)) for n in ("b", "c"))
    for first in (0, 4):
        assert np.array_equal(writer.stored("a", rows(first)), ARRAYS["a"][rows(first)])
    finish(writer, [0, 4])
    check(folder)


def test_a_chunk_of_which_a_box_is_not_kept_is_written_again(left):
    kind, folder = left
    damage(folder)
    writer = WRITERS[kind](folder, SPECS, is_resumed=True)
    assert not np.array_equal(writer.stored("a", rows(4)), ARRAYS["a"][rows(4)])
    finish(writer, [0])
    check(folder)


def test_what_is_cut_short_is_not_held(left):
    kind, folder = left
    if kind in ("ocdbt", "t5x_orbax"):
        pytest.skip("a database commits whole values")
    for path in files_with(folder, ARRAYS["a"][4:6].tobytes()):
        path.write_bytes(path.read_bytes()[:-1])
    writer = WRITERS[kind](folder, SPECS, is_resumed=True)
    lost = (0, 4) if is_chunked(kind) else (16,)
    assert not any(writer.holds("a", rows(first)) for first in lost)
    finish(writer, [])
    check(folder)


def test_a_damaged_database_is_as_none(tmp_path: pathlib.Path):
    for _ in range(2):
        writer = WRITERS["ocdbt"](tmp_path, SPECS, is_resumed=True)
        assert not writer.holds("a", rows(0))
        writer.write("a", (slice(0, 8), slice(0, 10)), ARRAYS["a"][:8])
        writer._store.flush()
        writer.close()
        (tmp_path / "ocdbt.process_0/manifest.ocdbt").write_bytes(b"\0" * 100)


def test_a_writer_that_is_not_told_so_begins_anew(left):
    kind, folder = left
    writer = WRITERS[kind](folder, SPECS)
    assert not writer.holds("a", rows(0))
    finish(writer, [])
    check(folder)


def test_what_is_not_finished_can_not_be_opened(tmp_path: pathlib.Path):
    folder = tmp_path / "out.partial" / "ties"
    folder.mkdir(parents=True)
    finish(safetensors.Writer(folder, SPECS, shard_bytes=1000), [])
    check(folder)
    (tmp_path / "out.partial" / UNFINISHED_FILE).write_text("{}")
    for path in (folder, folder.parent, next(folder.glob("*.safetensors"))):
        with pytest.raises(CheckpointError, match=r"not finished: .*out\.partial"):
            open_checkpoint(path)
    open_checkpoint(folder, is_ours=True).close()


def check(folder: pathlib.Path) -> None:
    with contextlib.closing(open_checkpoint(folder)) as reader:
        read = {n: reader.read(n, boxes.whole(s.shape)) for n, s in reader.specs().items()}
    assert models.same_bits(read, ARRAYS)


def damage(folder: pathlib.Path) -> None:
    """A bit of row 5 of "a"."""
    row = ARRAYS["a"][5].tobytes()
    for path in files_with(folder, row):
        content = path.read_bytes()
        at = content.index(row)
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


def files_with(folder: pathlib.Path, data: bytes) -> list[pathlib.Path]:
    found = [p for p in folder.rglob("*") if p.is_file() and data in p.read_bytes()]
    assert found
    return found
