"""Boxes of a reader whose bytes lie far apart, read by larger boxes that neighbours share.

A transposed or interleaved leaf asks its source for thousands of short runs: at some microseconds a call, that is a
hundredth of a disk's speed. Such a box is widened to runs of some kilobytes, and what was read is kept, within a bound,
for the boxes that come next.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import math
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from merging.checkpoints.format import Index, LeafSpec, Reader

# Below this a run costs more in calls (some 3 us) than in bytes. Longer runs read more for nothing where no neighbour
# comes, and make tiles too large to keep.
RUN_BYTES = 4096
FEW_RUNS = 16  # cost nothing


class Tiles:
    """Reads boxes of any shape at a fair speed. Thread-safe.

    Args:
      reader: of the source; stays the caller's.
      nbytes: of all tiles held at once, those under way included. Boxes that need none don't count.
    """

    def __init__(self, reader: Reader, *, nbytes: int):
        self._reader, self._nbytes = reader, nbytes
        self._specs = reader.specs()
        self._tiles: collections.OrderedDict[tuple, _Tile] = collections.OrderedDict()
        self._held = 0  # bytes of all tiles
        self._changed = threading.Condition()  # guards tiles and their users

    @contextlib.contextmanager
    def read(
        self, name: str, index: Index, *, out: np.ndarray | None = None
    ) -> Iterator[np.ndarray]:
        """The box, to be looked at inside the context and not to be changed; `out`, filled, where that is given."""
        spec = self._specs[name]
        widths = self._widths(spec, index)
        if widths is None:
            yield self._reader.read(name, index, out=out)
            return
        tiles = list(_covering(spec, index, widths))
        if out is None and len(tiles) == 1:
            with self._tile(spec, tiles[0]) as array:
                yield array[_within(index, tiles[0])]
            return
        if out is None:
            out = np.empty([part.stop - part.start for part in index], spec.dtype)
        for tile in tiles:
            common = tuple(
                slice(max(a.start, b.start), min(a.stop, b.stop))
                for a, b in zip(index, tile, strict=True)
            )
            with self._tile(spec, tile) as array:
                out[_within(common, index)] = array[_within(common, tile)]
        yield out

    def _widths(self, spec: LeafSpec, index: Index) -> list[int] | None:
        """Per axis the width of aligned tiles, 0 where the box is taken as it is; None if the box can be read directly."""
        lengths = [part.stop - part.start for part in index]
        widths = [0] * len(lengths)
        run = spec.dtype.itemsize  # bytes of a contiguous run, from the innermost axis outwards
        for axis in reversed(range(len(lengths))):
            if math.prod(lengths[:axis]) <= FEW_RUNS:
                break
            length, full = lengths[axis], spec.shape[axis]
            if run * length < RUN_BYTES and length < full:
                width = 1 << (-(-RUN_BYTES // run) - 1).bit_length()
                widths[axis] = length = min(width, full)
            run *= length
            if length < full:
                break
        while any(widths) and not self._fits(spec, lengths, widths):
            axis = next(i for i, width in enumerate(widths) if width)
            half = widths[axis] // 2
            widths[axis] = half if half > lengths[axis] else 0
        return widths if any(widths) else None

    def _fits(self, spec: LeafSpec, lengths: Sequence[int], widths: Sequence[int]) -> bool:
        sides = [width or length for width, length in zip(widths, lengths, strict=True)]
        return 2 * math.prod(sides) * spec.dtype.itemsize <= self._nbytes

    @contextlib.contextmanager
    def _tile(self, spec: LeafSpec, index: Index) -> Iterator[np.ndarray]:
        """A tile, read by whoever comes first; nobody drops it inside the context."""
        key = (spec.name, *((part.start, part.stop) for part in index))
        nbytes = math.prod(part.stop - part.start for part in index) * spec.dtype.itemsize
        with self._changed:
            # A thread waits while it uses no tile, and two fit: so some thread can always go on.
            self._changed.wait_for(lambda: key in self._tiles or self._make_room(nbytes))
            is_first = key not in self._tiles
            if is_first:
                self._tiles[key] = _Tile(nbytes)
                self._held += nbytes
            tile = self._tiles[key]
            tile.users += 1
            self._tiles.move_to_end(key)
        try:
            if is_first:
                try:
                    tile.array = self._reader.read(spec.name, index)
                except BaseException:
                    with self._changed:
                        self._drop(key)  # the next one tries again
                    raise
                finally:
                    tile.ready.set()
            tile.ready.wait()
            if tile.array is None:  # another thread's read failed: have its error here as well
                tile.array = self._reader.read(spec.name, index)
            yield tile.array
        finally:
            with self._changed:
                tile.users -= 1
                self._changed.notify_all()

    def _make_room(self, nbytes: int) -> bool:
        """Drops tiles that nobody uses, oldest first, until there is room; whether there is."""
        idle = [key for key, tile in self._tiles.items() if not tile.users]
        while self._held + nbytes > self._nbytes and idle:
            self._drop(idle.pop(0))
        return self._held + nbytes <= self._nbytes

    def _drop(self, key: tuple) -> None:
        self._held -= self._tiles.pop(key).nbytes
        self._changed.notify_all()


@dataclasses.dataclass
class _Tile:
    nbytes: int
    array: np.ndarray | None = None
    users: int = 0
    ready: threading.Event = dataclasses.field(default_factory=threading.Event)


def _covering(spec: LeafSpec, index: Index, widths: Sequence[int]) -> Iterator[Index]:
    """The aligned tiles that hold a box, the last of each axis cut at the leaf's end."""

    def along(part: slice, width: int, size: int) -> list[slice]:
        if not width:
            return [part]
        starts = range(part.start // width * width, part.stop, width)
        return [slice(start, min(start + width, size)) for start in starts]

    yield from itertools.product(*map(along, index, widths, spec.shape))


def _within(index: Index, outer: Index) -> Index:
    """A box, seen from another that holds it."""
    return tuple(
        slice(a.start - b.start, a.stop - b.start) for a, b in zip(index, outer, strict=True)
    )
