"""How a model is cut: leaves into tensors, tensors into pieces that fit in the budget.

A *leaf* is a stored array; a *tensor* is one layer's array: the leaf itself, or an entry of a stacked leaf. A *piece* is
a run of elements of one tensor, contiguous in C order, small enough that the buffers of all workers fit in the budget.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from merging.checkpoints.format import Index, LeafSpec
from merging.kernels.masks import tensor_key
from merging.paths import Stacked, canonical

# A piece of 2^19 elements of 9 bfloat16 inputs is 9 MiB: two of them stay in a last-level cache of 32 MiB, so that
# compute and output find the bytes just read. Smaller pieces pay Python's overhead more often (2^17 was half as fast on
# 2 cores), larger ones fall out of the cache (2^21: 1.5 times slower).
PIECE_ELEMENTS = 1 << 19
SMALLEST_PIECE = 1 << 12  # elements; below this, the time goes into calls

# Bytes of temporaries per element of a piece: packed survey bits, gathered codes, statistics.
SCRATCH_BYTES = 12


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One layer's tensor: what `scope="tensor"`, L1 norms and keep masks mean by a tensor.

    Attributes:
      leaf: the stored array it is (part of).
      layer: index along the leaf's stacked axis, or None.
      path: canonical, with the layer's index in it.
      is_kept: it stays as the base has it.
      first_row: only rows from here on are meant.
    """

    leaf: LeafSpec
    layer: int | None
    path: str
    is_kept: bool = False
    first_row: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        axis = self.leaf.stacked
        shape = self.leaf.shape
        return shape if axis is None else shape[:axis] + shape[axis + 1 :]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def first_element(self) -> int:
        """Flat index of the first element that is meant."""
        return self.first_row * math.prod(self.shape[1:])

    def keys(self, *, seed: int, experts: int) -> np.ndarray:
        """Key words of the keep masks, uint32 [N, 2]."""
        return np.stack([tensor_key(seed=seed, expert=i, path=self.path) for i in range(experts)])

    def leaf_index(self, index: Index) -> Index:
        """A box of the tensor as a box of its leaf."""
        axis = self.leaf.stacked
        if axis is None:
            return index
        return index[:axis] + (slice(self.layer, self.layer + 1),) + index[axis:]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A box of a tensor whose elements are contiguous in the tensor's C order.

    Attributes:
      index: box of the leaf.
      start: flat index of its first element in the tensor.
      size: elements.
    """

    tensor: Tensor
    index: Index
    start: int
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the box in the leaf."""
        return tuple(s.stop - s.start for s in self.index)

    @property
    def offset(self) -> np.ndarray:
        """`start` as low and high word, uint32 [2]."""
        return np.array([self.start & 0xFFFFFFFF, self.start >> 32], np.uint32)


def parts_of(
    leaf: LeafSpec, stacked: Stacked, is_merged: Callable[[Tensor], bool], rows: int | None
) -> list[Tensor]:
    """A float leaf's tensors: those to be merged, and what is kept as the base has it.

    Args:
      is_merged: whether a tensor of the leaf is to be merged.
      rows: where given, only the first so many rows are, and the others kept.
    """
    if rows is None or rows == leaf.shape[0]:
        return [
            tensor if is_merged(tensor) else dataclasses.replace(tensor, is_kept=True)
            for tensor in tensors_of(leaf, stacked)
        ]
    # A tensor cut after some rows keeps the flat indices of the elements in them.
    common = dataclasses.replace(leaf, shape=(rows, *leaf.shape[1:]))
    parts = parts_of(common, stacked, is_merged, None)
    return [*parts, Tensor(leaf, None, canonical(leaf.name), is_kept=True, first_row=rows)]


def copied_tensor(leaf: LeafSpec) -> Tensor:
    """A leaf that is not merged, as one tensor whatever its layers."""
    return Tensor(dataclasses.replace(leaf, stacked=None), None, leaf.name)


def tensors_of(leaf: LeafSpec, stacked: Stacked) -> list[Tensor]:
    """The tensors of a leaf, in the order of their layers."""
    if leaf.stacked is None:
        return [Tensor(leaf, None, canonical(leaf.name))]
    return [
        Tensor(leaf, layer, stacked.layer_path(leaf.name, layer))
        for layer in range(leaf.shape[leaf.stacked])
    ]


def pieces_of(tensor: Tensor, limit: int) -> Iterator[Piece]:
    """Cuts a tensor into contiguous pieces of at most `limit` elements, in C order."""
    start = tensor.first_element
    while start < tensor.size:
        piece = piece_at(tensor, start, limit)
        yield piece
        start = piece.start + piece.size


def piece_at(tensor: Tensor, start: int, limit: int) -> Piece:
    """The largest box of at most `limit` elements that is contiguous in C order and begins at a flat index.

    The start is moved down to where such boxes can begin: whole steps of the first axis below which one step fits.
    """
    shape = tensor.shape
    axis = 0
    while axis < len(shape) and math.prod(shape[axis + 1 :]) > limit:
        axis += 1
    if axis == len(shape):  # a scalar
        return Piece(tensor, tensor.leaf_index(()), 0, 1)
    inner = math.prod(shape[axis + 1 :])
    *outer, row = (int(i) for i in np.unravel_index(start // inner, shape[: axis + 1]))
    stop = min(row + max(1, limit // inner), shape[axis])
    index = (
        *(slice(i, i + 1) for i in outer),
        slice(row, stop),
        *(slice(0, n) for n in shape[axis + 1 :]),
    )
    return Piece(tensor, tensor.leaf_index(index), start // inner * inner, (stop - row) * inner)


def bytes_per_element(
    base: LeafSpec, experts: Sequence[LeafSpec], outputs: int, out_itemsize: int, workers: int
) -> int:
    """Bytes that one element of a piece takes in all workers: inputs, scratch and outputs of each."""
    inputs = base.dtype.itemsize + sum(e.dtype.itemsize for e in experts)
    return workers * (inputs + SCRATCH_BYTES + outputs * out_itemsize)


def piece_limit(
    *,
    budget_bytes: int,
    per_element: Mapping[str, int],
    doing: str,
    instead: str = "",
    most: int | None = None,
) -> int:
    """Elements of the largest piece that the budget allows, a power of two.

    Args:
      per_element: bytes that an element takes in all workers, by leaf.
      doing, instead: for the message: "merge", and what else would help.
      most: elements of a piece, whatever the budget; PIECE_ELEMENTS if not given.

    Raises ValueError, with the bytes needed, if not even the smallest piece of the widest leaf fits.
    """
    widest, name = max(((each, name) for name, each in per_element.items()), default=(1, "nothing"))
    fitting = budget_bytes // widest
    if fitting < SMALLEST_PIECE:
        raise ValueError(
            f"a memory budget of {budget_bytes:,} bytes is too small to {doing} {name}: pieces of"
            f" {SMALLEST_PIECE:,} elements need {SMALLEST_PIECE * widest:,} bytes; raise MEMORY_BUDGET_BYTES{instead}"
        )
    return min(PIECE_ELEMENTS if most is None else most, 1 << (fitting.bit_length() - 1))
