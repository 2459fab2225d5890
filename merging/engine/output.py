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
      nbytes: of the data written.
    """

    def __init__(self, writer: Writer):
        self.writer = writer
        self.checksums: dict[str, dict[str, str]] = {}
        self.nbytes = 0
        self._lock = threading.Lock()

    def put(self, piece: Piece, merged: np.ndarray) -> None:
        """`merged`: as many elements as the piece has, in the leaf's output dtype."""
        name = piece.tensor.leaf.name
        found = checksum(merged)
        self.writer.write(name, piece.index, merged.reshape(piece.shape))
        with self._lock:
            of_leaf = self.checksums.setdefault(name, {})
            box = box_text(piece.index)
            assert box not in of_leaf, f"{name}: box {box} was written twice"
            of_leaf[box] = found
            self.nbytes += merged.nbytes


def is_finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or infinite, by the bits of the exponents (quicker than isfinite on bfloat16)."""
    if array.size == 0:
        return True
    bits = array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])
    infinity = np.array(np.inf, array.dtype).view(bits.dtype)
    magnitude = bits & bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    return bool(magnitude.max() < infinity)
