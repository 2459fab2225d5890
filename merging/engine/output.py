"""Pieces on their way to writers: checked, summed and recorded; those that an earlier run finished, kept."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from merging.checkpoints.checksums import box_text, checksum
from merging.checkpoints.format import Writer
from merging.engine.journal import Finished, Journal
from merging.engine.pieces import Piece


class Output:
    """One merge's output. Thread-safe.

    Attributes:
      checksums: {leaf: {box: crc32c}}; see `checkpoints.checksums`.
      nbytes: of the data written, without what was there.
    """

    def __init__(self, writer: Writer):
        self.writer = writer
        self.checksums: dict[str, dict[str, str]] = {}
        self.nbytes = 0
        self._lock = threading.Lock()

    def recorded(self) -> dict[str, Any]:
        """What a manifest says of all that this process wrote, after the commit.

        Where the leaves lie in the tree, and checksums by names from its root.
        """
        path = self.writer.params_path
        rooted = {f"{path}/{name}" if path else name: each for name, each in self.checksums.items()}
        return {
            "params_path": path,
            "checksums": {**rooted, **self.writer.checksums_beside},
        }

    def left(self, piece: Piece, wanted: str) -> np.ndarray | None:
        """A piece as an earlier run left it, or None where it isn't there with this checksum."""
        name = piece.tensor.leaf.name
        if not self.writer.holds(name, piece.index):
            return None
        array = self.writer.stored(name, piece.index)
        return array if checksum(array) == wanted else None

    def put(self, piece: Piece, merged: np.ndarray, *, is_stored: bool = False) -> str:
        """Writes a piece; returns its checksum.

        `merged`: as many elements as the piece has, in the leaf's output dtype. `is_stored`: it is what `left` gave.
        """
        name = piece.tensor.leaf.name
        found = checksum(merged)
        self.writer.write(name, piece.index, merged.reshape(piece.shape), is_stored=is_stored)
        with self._lock:
            of_leaf = self.checksums.setdefault(name, {})
            box = box_text(piece.index)
            assert box not in of_leaf, f"{name}: box {box} was written twice"
            of_leaf[box] = found
            self.nbytes += 0 if is_stored else merged.nbytes
        return found


@dataclasses.dataclass(frozen=True)
class There:
    """What an earlier run left.

    Attributes:
      finished: pieces that all outputs hold.
      pieces: of this process, in all.
      share: of the elements, which need not be computed.
    """

    finished: int
    pieces: int
    share: float


class Outputs:
    """All outputs of a run, and the journal of what is finished in them. Thread-safe.

    Attributes:
      each: by name of the output.
      pieces, kept: how many have come, and how many of them an earlier run had finished.
    """

    def __init__(self, writers: Mapping[str, Writer], journal: Journal):
        self.each = {name: Output(writer) for name, writer in writers.items()}
        self.pieces = self.kept = 0
        self._journal = journal
        self._left: dict[tuple[str, str], Finished] = {}
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Of the data written."""
        return sum(output.nbytes for output in self.each.values())

    def look(self, pieces: Iterable[Piece]) -> There:
        """Which of the pieces are finished and there, as far as can be told without reading them."""
        if not self._journal.pieces:
            return There(0, 0, 0.0)
        number = elements = there = 0
        for piece in pieces:
            number, elements = number + 1, elements + piece.size
            key = piece.tensor.leaf.name, box_text(piece.index)
            finished = self._journal.pieces.get(key)
            writers = (output.writer for output in self.each.values())
            if finished is not None and all(w.holds(key[0], piece.index) for w in writers):
                self._left[key] = finished
                there += piece.size
        return There(len(self._left), number, there / max(1, elements))

    def keep(self, piece: Piece) -> Finished | None:
        """Goes on with what is stored of a piece; None where it is to be computed. `look` comes before."""
        finished = self._left.get((piece.tensor.leaf.name, box_text(piece.index)))
        if finished is None:
            return None
        pairs = zip(self.each.values(), finished.checksums, strict=True)
        arrays = [output.left(piece, wanted) for output, wanted in pairs]
        if any(array is None for array in arrays):
            return None
        for output, array in zip(self.each.values(), arrays, strict=True):
            output.put(piece, array, is_stored=True)
        self._count(1)
        return finished

    def put(
        self, piece: Piece, arrays: Sequence[np.ndarray], statistics: np.ndarray | None = None
    ) -> None:
        """Writes a piece to every output and notes it as finished; arguments as of `Output.put` and `Journal.finish`."""
        pairs = zip(self.each.values(), arrays, strict=True)
        checksums = [output.put(piece, array) for output, array in pairs]
        self._journal.finish(piece, checksums, statistics)
        self._count(0)

    def close(self) -> None:
        """Ends without a commit; what is stored stays."""
        for output in self.each.values():
            output.writer.close()

    def _count(self, kept: int) -> None:
        with self._lock:
            self.pieces += 1
            self.kept += kept


def is_finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or infinite, by the bits of the exponents (quicker than isfinite on bfloat16)."""
    if array.size == 0:
        return True
    bits = array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])
    infinity = np.array(np.inf, array.dtype).view(bits.dtype)
    magnitude = bits & bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    return bool(magnitude.max() < infinity)
