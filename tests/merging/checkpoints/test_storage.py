"""Files written by ranges hold the same bytes whatever the order; reading is tested through test_safetensors.py."""

import concurrent.futures
import errno
import os
import pathlib
import random
import threading

import numpy as np
import pytest
from etils import epath

from merging.checkpoints import storage
from merging.checkpoints.storage import ByteSink

CONTENT = np.random.default_rng(0).bytes(1000)


@pytest.fixture(params=["local", "remote"])
def path(request, tmp_path, monkeypatch):
    """Of a file on disk, and of one that is written as on object storage, by appending only."""
    if request.param == "remote":
        monkeypatch.setattr(storage, "is_local", lambda path: False)
    return tmp_path / "file"


def pieces(count):
    """(offset, bytes) that make up CONTENT, of unequal sizes, in order."""
    ends = [
        0,
        *sorted(random.Random(count).sample(range(1, len(CONTENT)), count - 1)),
        len(CONTENT),
    ]
    return [(a, memoryview(CONTENT)[a:b]) for a, b in zip(ends, ends[1:], strict=False)]


def test_any_order_gives_the_same_bytes(path):
    for order in (list, lambda p: p[::-1], lambda p: random.Random(0).sample(p, len(p))):
        sink = ByteSink(path)
        for offset, data in order(pieces(40)):
            sink.write(offset, data)
        assert sink.nbytes == len(CONTENT)
        sink.close()
        assert path.read_bytes() == CONTENT


def test_threads_write_at_once(path):
    sink, together = ByteSink(path), threading.Barrier(4)

    def write(mine):
        together.wait()
        for offset, data in mine:
            sink.write(offset, data)

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        for share in [threads.submit(write, pieces(400)[i::4]) for i in range(4)]:
            share.result()
    assert sink.nbytes == len(CONTENT)
    sink.close()
    assert path.read_bytes() == CONTENT


def test_what_was_there_is_gone(path):
    path.write_bytes(bytes(5000))
    sink = ByteSink(path)
    sink.write(0, memoryview(CONTENT))
    sink.close()
    assert path.read_bytes() == CONTENT


def test_the_callers_buffer_may_be_used_again(path):
    sink, buffer = ByteSink(path), bytearray(b"late!")
    sink.write(5, memoryview(buffer))
    buffer[:] = b"early"
    sink.write(0, memoryview(buffer))
    sink.close()
    assert path.read_bytes() == b"earlylate!"


def test_object_storage_is_appended_to_only(tmp_path, monkeypatch):
    """What comes too early waits, and an object with a gap is never passed off as whole."""
    monkeypatch.setattr(storage, "is_local", lambda path: False)
    monkeypatch.setattr(os, "pwrite", None)
    sink = ByteSink(tmp_path / "file")
    sink.write(0, memoryview(b"ab"))
    sink.write(4, memoryview(b"ef"))
    assert sink.nbytes == 4
    with pytest.raises(AssertionError, match="file lacks the bytes from 2 on"):
        sink.close()
    sink.abandon()
    assert not (tmp_path / "file").exists()


def test_a_kept_object_stays_until_something_is_written(tmp_path, monkeypatch):
    """Then it is put anew, with what is kept of it; if that is given up, the old one is there."""
    monkeypatch.setattr(storage, "is_local", lambda path: False)
    monkeypatch.setattr(storage, "_COPIED_BYTES", 7)
    path, old = tmp_path / "file", CONTENT[:100]
    path.write_bytes(old)
    before = path.stat()
    kept = ByteSink(path, is_kept=True)
    found = bytearray(30)
    kept.read_into(80, memoryview(found))
    assert found == old[80:] + bytes(10)
    for offset in (0, 40):
        kept.keep(offset, memoryview(old)[offset : offset + 40])
    kept.keep(80, memoryview(old)[80:])
    assert kept.nbytes == 100
    kept.close()
    assert path.stat() == before

    for is_whole in (False, True):
        sink = ByteSink(path, is_kept=True)
        sink.keep(0, memoryview(old)[:40])
        sink.write(40, memoryview(b"0123456789"))
        sink.keep(50, memoryview(old)[50:])
        assert sink.nbytes == 100
        sink.close() if is_whole else sink.abandon()
        assert path.read_bytes() == (old[:40] + b"0123456789" + old[50:] if is_whole else old)


def test_an_abandoned_file_is_kept_and_gone_on_with(tmp_path):
    path = tmp_path / "file"
    sink = ByteSink(path)
    sink.write(3, memoryview(CONTENT))
    sink.abandon()
    sink.abandon()
    again = ByteSink(path, is_kept=True)
    found = bytearray(len(CONTENT) + 8)
    again.read_into(3, memoryview(found))
    assert found == CONTENT + bytes(8)
    again.keep(3, memoryview(CONTENT))
    again.write(0, memoryview(b"abc"))
    assert again.nbytes == 3 + len(CONTENT)
    again.close()
    assert path.read_bytes() == b"abc" + CONTENT
    ByteSink(path).close()
    assert path.read_bytes() == b"", "without is_kept it is emptied"


def test_short_writes_go_on(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    sink = ByteSink(tmp_path / "file")
    for offset, data in reversed(pieces(10)):
        sink.write(offset, data)
    sink.close()
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_is_named(tmp_path):
    path = tmp_path / "file"
    path.symlink_to("/dev/full")
    sink = ByteSink(path)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'") as error:
        sink.write(0, memoryview(CONTENT))
        sink.close()
    assert error.value.errno == errno.ENOSPC
    sink.abandon()


def test_a_file_that_can_not_be_made_is_named(tmp_path):
    path = tmp_path / "in" / "no" / "folder"
    with pytest.raises(FileNotFoundError, match=f"No such file or directory: '{path}'"):
        ByteSink(path)


@pytest.mark.parametrize("order", [list, lambda p: p[::-1]], ids=["in order", "backwards"])
def test_writeback_begins_early_and_leaves_little_for_the_end(tmp_path, monkeypatch, order):
    asked = []
    monkeypatch.setattr(storage, "_WRITEBACK_BYTES", 100)
    monkeypatch.setattr(
        storage, "start_writeback", lambda fd, offset, nbytes: asked.append((offset, nbytes))
    )
    sink = ByteSink(tmp_path / "file")
    largest = max(len(data) for _, data in pieces(40))
    for offset, data in order(pieces(40)):
        sink.write(offset, data)
    ranges = order(asked)
    assert all(100 <= nbytes < 100 + 2 * largest for _, nbytes in asked)
    assert all(a + n == b for (a, n), (b, _) in zip(ranges, ranges[1:], strict=False))
    assert len(CONTENT) - sum(nbytes for _, nbytes in asked) < 100 + largest
    sink.close()
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_two_that_put_the_same_file_at_once(tmp_path: pathlib.Path, monkeypatch):
    path, put = epath.Path(tmp_path) / "scores.jsonl", storage.put_file
    others = iter([b"the other's"])

    def while_another_puts_it(temporary: epath.Path, content: bytes) -> None:
        put(temporary, content)
        for other in others:
            storage.put_whole(path, other)
            assert path.read_bytes() == other

    monkeypatch.setattr(storage, "put_file", while_another_puts_it)
    storage.put_whole(path, b"mine")
    assert path.read_bytes() == b"mine"
    assert [each.name for each in tmp_path.iterdir()] == ["scores.jsonl"]
