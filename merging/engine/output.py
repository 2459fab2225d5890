"""Merged pieces on their way to a writer: checked, and put together where their order in the file is another."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from merging.checkpoints.format import Index, LeafSpec, Writer
from merging.engine.pieces import Piece, is_interleaved


class LeafOutput:
    """Takes one merge's pieces in the order in which they were cut and hands them on in storage order.

    Pieces of most leaves are handed on at once. The layers of a leaf that is stacked along an inner axis interleave in
    the file: such a leaf is put together in memory first (`plan` has checked that it fits).
    """

    def __init__(self, writer: Writer, specs: Mapping[str, LeafSpec]):
        self._writer, self._specs = writer, specs
        self._leaf: np.ndarray | None = None
        self._filled = 0

    def put(self, piece: Piece, merged: np.ndarray) -> None:
        """`merged`: 1-D, as many elements as the piece has, in the leaf's output dtype."""
        leaf = piece.tensor.leaf
        if not is_interleaved(leaf):
            self._writer.write(leaf.name, piece.index, merged.reshape(piece.shape))
            return
        if self._leaf is None:
            self._leaf, self._filled = np.empty(leaf.shape, self._specs[leaf.name].dtype), 0
        self._leaf[piece.index] = merged.reshape(piece.shape)
        self._filled += piece.size
        if self._filled == leaf.size:
            whole: Index = tuple(slice(0, n) for n in leaf.shape)
            self._writer.write(leaf.name, whole, self._leaf)
            self._leaf = None


def is_finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or infinite, by the bits of the exponents (quicker than isfinite on bfloat16)."""
    if array.size == 0:
        return True
    bits = array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])
    infinity = np.array(np.inf, array.dtype).view(bits.dtype)
    magnitude = bits & bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    return bool(magnitude.max() < infinity)
