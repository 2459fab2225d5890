"""Boxes of arrays: where their bytes lie, which chunks they touch, and chunks put together from boxes."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from merging.checkpoints.format import Index, LeafSpec

Shape = tuple[int, ...]


def whole(shape: Sequence[int]) -> Index:
    """The box that is the whole array."""
    return tuple(slice(0, size) for size in shape)


def box_shape(spec: LeafSpec, index: Index) -> Shape:
    """The shape of a box, after checking that it is one of this leaf."""
    assert len(index) == len(spec.shape) and all(
        part.step in (None, 1) and 0 <= part.start <= part.stop <= size
        for part, size in zip(index, spec.shape, strict=True)
    ), f"{spec.name}: {index} is no box of shape {spec.shape}"
    return tuple(part.stop - part.start for part in index)


def receiver(spec: LeafSpec, index: Index, out: np.ndarray | None) -> np.ndarray:
    """What receives a box that is read: `out` after checking it, or a new array, [*box] in the leaf's dtype, C-contiguous.

    Raises ValueError for an `out` of another shape, dtype or order.
    """
    box = box_shape(spec, index)
    if out is None:
        return np.empty(box, spec.dtype)
    if (out.shape, out.dtype) != (box, spec.dtype) or not out.flags.c_contiguous:
        raise ValueError(
            f"{spec.name}: out is {out.dtype}{list(out.shape)}, C-contiguous: {out.flags.c_contiguous}; wanted"
            f" {spec.dtype}{list(box)}, C-contiguous"
        )
    return out


def check_written(spec: LeafSpec, index: Index, array: np.ndarray) -> None:
    """Raises ValueError unless an array that is written is [*box] in the leaf's dtype."""
    box = box_shape(spec, index)
    if (array.shape, array.dtype) != (box, spec.dtype):
        raise ValueError(
            f"{spec.name}: got {array.dtype}{list(array.shape)}, wanted {spec.dtype}{list(box)}"
        )


def runs(shape: Sequence[int], index: Index) -> tuple[int, Iterator[int]]:
    """Length of the contiguous runs of a box, and where each starts; in elements, C order."""
    run, inner = 1, len(shape)
    # Trailing dimensions taken whole join into one run; the first one taken in part ends it.
    while inner:
        inner -= 1
        length = index[inner].stop - index[inner].start
        run *= length
        if length != shape[inner]:
            break
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    first = sum(part.start * stride for part, stride in zip(index, strides, strict=True))
    outer = [
        range(0, (part.stop - part.start) * stride, stride)
        for part, stride in zip(index[:inner], strides[:inner], strict=True)
    ]
    return run, (first + sum(steps) for steps in itertools.product(*outer))


def row_boxes(shape: Sequence[int], limit: int) -> Iterator[Index]:
    """Cuts an array into boxes of at most `limit` elements, each contiguous, in C order; none where it is empty."""
    if 0 in shape:
        return
    if math.prod(shape) <= limit:
        yield whole(shape)
        return
    rows = max(1, limit // math.prod(shape[1:]))
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        if rows > 1 or math.prod(shape[1:]) <= limit:
            yield (slice(start, stop), *whole(shape[1:]))
        else:
            yield from ((slice(start, stop), *inner) for inner in row_boxes(shape[1:], limit))


def bytes_of(array: np.ndarray) -> memoryview:
    """The bytes of a C-contiguous array, writable (bfloat16 has no buffer of its own)."""
    return memoryview(array.reshape(-1).view(np.uint8))


# --- Chunks -------------------------------------------------------------------------------------


def chunk_shape(spec: LeafSpec, chunk_bytes: int) -> Shape:
    """The chunks in which a leaf is stored: contiguous runs of at most `chunk_bytes`, of one layer where stacked.

    Chunks are as even as can be, since the last one is stored at full size. No dimension is 0.
    """
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes is {chunk_bytes}, wanted a positive number of bytes")
    limit = max(1, chunk_bytes // spec.dtype.itemsize)
    chunk = [1] * len(spec.shape)
    for axis in reversed(range(len(spec.shape))):
        if axis == spec.stacked:
            continue
        size = max(1, spec.shape[axis])
        if size > limit:
            chunk[axis] = -(-size // -(-size // limit))
            break
        chunk[axis] = size
        limit //= size
    return tuple(chunk)


def chunks_of(index: Index, chunk: Shape) -> Iterator[Shape]:
    """The positions in the grid of all chunks that a box touches, in C order."""
    if any(part.start >= part.stop for part in index):
        return iter(())
    return itertools.product(
        *(range(p.start // c, -(-p.stop // c)) for p, c in zip(index, chunk, strict=True))
    )


def chunk_box(position: Shape, chunk: Shape, shape: Sequence[int]) -> Index:
    """The box of a chunk, cut at the array's edges."""
    return tuple(
        slice(p * c, min((p + 1) * c, size))
        for p, c, size in zip(position, chunk, shape, strict=True)
    )


def intersection(a: Index, b: Index) -> Index:
    """The box that two boxes share."""
    return tuple(
        slice(max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b, strict=True)
    )


def relative(index: Index, origin: Index) -> Index:
    """A box as seen from the first element of another."""
    return tuple(
        slice(part.start - start.start, part.stop - start.start)
        for part, start in zip(index, origin, strict=True)
    )


class Assembler:
    """Puts the chunks of one array together from boxes that come in any order, from several threads.

    A box that covers a chunk is handed on without a copy; of others, parts are gathered until the chunk is full. What it
    holds is the chunks begun and not yet full: see `held_bytes`.

    Args:
      emit: called once a chunk with its box and array [*box], in the thread that brought its last element.
    """

    def __init__(self, spec: LeafSpec, chunk: Shape, emit: Callable[[Index, np.ndarray], None]):
        self.spec, self.chunk = spec, chunk
        self._emit = emit
        self._lock = threading.Lock()  # guards what follows
        # With the number of elements wanting, and whether all that came are stored.
        self._open: dict[Shape, tuple[np.ndarray, int, bool]] = {}
        self._wanting = spec.size

    @property
    def is_done(self) -> bool:
        """Whether every element has come."""
        return self._wanting == 0

    @property
    def wanting(self) -> int:
        """How many elements have not come."""
        return self._wanting

    def put(self, index: Index, array: np.ndarray, *, is_stored: bool = False) -> None:
        """Takes a box, [*box] in the leaf's dtype. The array is the caller's again when it returns.

        A chunk of which all boxes are stored is not emitted.

        Raises ValueError for another shape or dtype; an element that comes twice is an AssertionError where it is seen.
        """
        check_written(self.spec, index, array)
        for position in chunks_of(index, self.chunk):
            of_chunk = chunk_box(position, self.chunk, self.spec.shape)
            shared = intersection(index, of_chunk)
            part = array[(*relative(shared, index), ...)]  # `...`: an array even for ()
            full = None if is_stored else part
            if shared != of_chunk:
                full = self._gather(position, of_chunk, shared, part, is_stored)
            if full is not None:
                self._emit(of_chunk, full)
        with self._lock:
            self._wanting -= array.size
            assert self._wanting >= 0, f"{self.spec.name}: elements came twice"

    def _gather(
        self, position: Shape, of_chunk: Index, shared: Index, part: np.ndarray, is_stored: bool
    ) -> np.ndarray | None:
        """Copies a part into its chunk; the chunk where that fills it and it is to be stored."""
        with self._lock:
            if position not in self._open:
                shape = tuple(p.stop - p.start for p in of_chunk)
                self._open[position] = np.empty(shape, self.spec.dtype), math.prod(shape), True
            buffer = self._open[position][0]
        buffer[(*relative(shared, of_chunk), ...)] = part  # parts are disjoint: no lock
        with self._lock:
            _, wanting, is_all_stored = self._open[position]
            wanting -= part.size
            is_all_stored &= is_stored
            self._open[position] = buffer, wanting, is_all_stored
            assert wanting >= 0, f"{self.spec.name}: elements of {of_chunk} came twice"
            if wanting:
                return None
            del self._open[position]
            return None if is_all_stored else buffer


def held_bytes(
    specs: Mapping[str, LeafSpec], *, chunk_bytes: int, window_bytes: int, threads: int
) -> int:
    """Bytes that assemblers may hold at once, from specs alone.

    Args:
      window_bytes: how far apart boxes may come from storage order: the bytes of all boxes that may be put before one that
        precedes them (results waiting in line, and those in work).
      threads: how many put boxes at once; each has one full chunk on its way to the store.
    """
    return window_bytes + (2 + threads) * largest_chunk_bytes(specs, chunk_bytes)


def largest_chunk_bytes(specs: Mapping[str, LeafSpec], chunk_bytes: int) -> int:
    """Of the chunks in which these leaves are stored."""
    return max(
        (math.prod(chunk_shape(s, chunk_bytes)) * s.dtype.itemsize for s in specs.values()),
        default=0,
    )
