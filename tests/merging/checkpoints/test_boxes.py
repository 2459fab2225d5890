"""Chunks come together from boxes in any order and from any thread, and hold no more than was told."""

import concurrent.futures
import math
import random

import numpy as np
import pytest

from merging.checkpoints import boxes
from merging.checkpoints.format import LeafSpec


def leaf(*shape: int, dtype: type = np.int32, stacked: int | None = None) -> LeafSpec:
    return LeafSpec(name="x", shape=shape, dtype=np.dtype(dtype), stacked=stacked)


@pytest.mark.parametrize(
    ("spec", "chunk_bytes", "chunk"),
    [
        (leaf(), 4, ()),
        (leaf(0, 3), 400, (1, 3)),
        (leaf(100, 10), 400, (10, 10)),
        (leaf(21, 10), 800, (11, 10)),  # two even ones, not 20 and 1
        (leaf(4, 100, 10), 400, (1, 10, 10)),
        (leaf(100, 4, 10, stacked=1), 400, (10, 1, 10)),
        (leaf(3, 1000), 400, (1, 100)),
        (leaf(3, 1000), 1, (1, 1)),
    ],
)
def test_chunks_are_runs_of_at_most_so_many_bytes(spec, chunk_bytes, chunk):
    assert boxes.chunk_shape(spec, chunk_bytes) == chunk


@pytest.mark.parametrize("limit", [1, 7, 60, 1000])
def test_row_boxes_cover_an_array_once_in_order(limit):
    shape = (5, 4, 6)
    flat = np.arange(math.prod(shape)).reshape(shape)
    got = [flat[index] for index in boxes.row_boxes(shape, limit)]
    assert all(part.size <= limit for part in got)
    np.testing.assert_array_equal(np.concatenate([p.ravel() for p in got]), flat.ravel())


@pytest.mark.parametrize("stacked", [None, 1])
@pytest.mark.parametrize("elements", [1, 13, 64, 10_000])
def test_chunks_from_shuffled_boxes_of_several_threads(stacked, elements):
    spec = leaf(40, 6, 10, stacked=stacked)
    want = np.arange(spec.size, dtype=np.int32).reshape(spec.shape)
    got = np.full(spec.shape, -1, np.int32)
    count = []

    def emit(index, array):
        got[index] = array
        count.append(index)

    assembler = boxes.Assembler(spec, boxes.chunk_shape(spec, 4 * 70), emit)
    parts = list(boxes.row_boxes(spec.shape, elements))
    random.Random(0).shuffle(parts)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda index: assembler.put(index, want[index]), parts))
    assert assembler.is_done
    assert len(count) == math.prod(
        -(-s // c) for s, c in zip(spec.shape, assembler.chunk, strict=True)
    )
    np.testing.assert_array_equal(got, want)


def test_memory_is_what_was_told():
    """Boxes at most `window` out of order: chunks begun never take more than `held_bytes` says."""
    spec, chunk_bytes, elements, ahead = leaf(4000, 25), 4 * 1000, 130, 12
    assembler = boxes.Assembler(spec, boxes.chunk_shape(spec, chunk_bytes), lambda *_: None)
    parts = list(boxes.row_boxes(spec.shape, elements))
    rng, waiting, most = random.Random(1), [], 0
    while parts or waiting:
        while (
            parts
            and len(waiting) < ahead
            and (not waiting or parts[0][0].start - waiting[0][0].start < 60)
        ):
            waiting.append(parts.pop(0))
        index = waiting.pop(rng.randrange(len(waiting)))
        assembler.put(index, np.zeros([p.stop - p.start for p in index], np.int32))
        most = max(most, sum(buffer.nbytes for buffer, *_ in assembler._open.values()))
    window = 60 * 25 * 4
    told = boxes.held_bytes({"x": spec}, chunk_bytes=chunk_bytes, window_bytes=window, threads=0)
    assert 0 < most <= told


def test_an_element_that_comes_twice_is_seen():
    spec = leaf(4, 5)
    assembler = boxes.Assembler(spec, (4, 5), lambda *_: None)
    assembler.put((slice(0, 3), slice(0, 5)), np.zeros((3, 5), np.int32))
    with pytest.raises(AssertionError, match="twice"):
        assembler.put((slice(1, 4), slice(0, 5)), np.zeros((3, 5), np.int32))


def test_another_dtype_is_refused():
    assembler = boxes.Assembler(leaf(4), (4,), lambda *_: None)
    with pytest.raises(ValueError, match="wanted int32"):
        assembler.put((slice(0, 4),), np.zeros(4, np.int64))
