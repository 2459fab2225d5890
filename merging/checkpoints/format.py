"""What every checkpoint format gives the engine: a Reader, a Writer, and leaves described without opening them.

A format is one file of this folder with a `Reader` and a `Writer` (see `safetensors.py`, `memory.py`). A reader tells
what is stored without reading any array (`specs`), and reads exactly the bytes of a slice (`read`). A writer is told
all leaves beforehand, receives their boxes from many threads, and makes nothing visible before `commit`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import ml_dtypes
import numpy as np

# A box of a leaf: one slice with explicit, in-range start and stop, step 1, for each dimension.
Index = tuple[slice, ...]

# In the folder of an output from its first moment until it is whole: no reader takes what lies there for a checkpoint.
UNFINISHED_FILE = "unfinished.json"

MERGED_DTYPES = tuple(np.dtype(t) for t in (np.float32, ml_dtypes.bfloat16, np.float16, np.float64))


class CheckpointError(ValueError):
    """A checkpoint that can't be read as it is: says which file and leaf, what was found, what was wanted, what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafSpec:
    """One stored array.

    Attributes:
      name: as it is stored, e.g. `model.layers.0.mlp.up_proj.weight`.
      shape: in elements; () for a scalar.
      dtype: numpy dtype (bfloat16 is ml_dtypes').
      stacked: the axis over layers where one leaf holds the same tensor of all layers (`scan`), else None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: int | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def is_merged(self) -> bool:
        """True for float leaves; integer and boolean leaves are copied from the base."""
        return self.dtype in MERGED_DTYPES


@runtime_checkable
class Reader(Protocol):
    """One checkpoint, open for reading. Thread-safe: many threads call `read` at once."""

    format: str  # a name of `checkpoints.FORMATS`, or "memory"
    location: str  # path or name, for messages

    def specs(self) -> Mapping[str, LeafSpec]:
        """All leaves in storage order. Reads headers only, never array data."""
        ...

    def read(self, name: str, index: Index, *, out: np.ndarray | None = None) -> np.ndarray:
        """The elements of `index`, C order; only those bytes are read.

        `out`, where given, is a C-contiguous array of the box's shape and the leaf's dtype that receives them and is
        returned. Raises CheckpointError naming the file and leaf when bytes are missing or the file changed, shrank
        or vanished since the checkpoint was opened.
        """
        ...

    def digest(self) -> str:
        """Hex digest of what identifies the input: its headers, and each file's name, size and modification time."""
        ...

    def check_unchanged(self) -> None:
        """Raises CheckpointError unless all that was read came from what was opened; called before a commit."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class Writer(Protocol):
    """One checkpoint being written. Nothing is visible under its final name before `commit`.

    One that is made with `is_resumed` goes on where an earlier one with the same arguments, killed or closed, was: boxes
    that `holds` says are there can be read (`stored`) and, where they are right, be written with `is_stored`.

    Attributes:
      params_path: where the leaves lie in the output's tree, keys joined by `/`; None where the format has no tree.
      checksums_beside: after `commit`, of what this writer put beside them, as `checksums` has them, by names from the root.
    """

    params_path: str | None
    checksums_beside: Mapping[str, Mapping[str, str]]

    @property
    def names_mine(self) -> list[str]:
        """The leaves that this process writes, in storage order."""
        ...

    def write(self, name: str, index: Index, array: np.ndarray, *, is_stored: bool = False) -> None:
        """Stores a box (C order). Thread-safe; boxes come in any order, near that of storage, each element once.

        `is_stored`: the array is what `stored` gave for this box, which need not be written again.
        """
        ...

    def holds(self, name: str, index: Index) -> bool:
        """Whether an earlier writer left a box whole, as far as can be told without reading it."""
        ...

    def stored(self, name: str, index: Index) -> np.ndarray:
        """A box that `holds` says is there, [*box] in the leaf's dtype; whether its bytes are right is the caller's to check."""
        ...

    def commit(self) -> None:
        """All bytes synced, then everything appears under the final name at once."""
        ...

    def close(self) -> None:
        """Ends without a commit: nothing appears, and what was written stays for a writer that goes on."""
        ...
