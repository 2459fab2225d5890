"""Merged pieces on their way to a writer: checked, summed and recorded."""

from __future__ import annotations

import threading

import numpy as np

from merging.checkpoints.checksums import box_text, checksum
from merging.checkpoints.format import Writer
from merging.engine.pieces import Piece


class Output:
    """One merge's output. Thread-safe.

    Attributes:
      checksums: {leaf: {box: crc32c}}, as the manifest has them; see `checkpoints.checksums`.
      nbytes: of the data written, without what was there.
    """

    def __init__(self, writer: Writer):
        self.writer = writer
        self.checksums: dict[str, dict[str, str]] = {}
        self.nbytes = 0
        self._lock = threading.Lock()

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


def is_finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or infinite, by the bits of the exponents (quicker than isfinite on bfloat16)."""
    if array.size == 0:
        return True
    bits = array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])
    infinity = np.array(np.inf, array.dtype).view(bits.dtype)
    magnitude = bits & bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    return bool(magnitude.max() < infinity)
