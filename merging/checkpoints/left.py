"""Chunks that an earlier writer left, killed or closed on the way: found again and read by range.

Nothing of it is trusted: a file may be cut short, and what a box holds is checked by who asks. A database that can't be read,
as after a power cut, is as none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from etils import epath

from merging.checkpoints import boxes, ocdbt, zarr
from merging.checkpoints.folder import Blob, Folder
from merging.checkpoints.format import CheckpointError, Index, LeafSpec


class Left:
    """The chunks in a folder, or in an OCDBT database in it. Thread-safe.

    Args:
      folder: may not exist.
      in_database: whether the chunks are values of a database.

    Attributes:
      is_damaged: there is a database, but it can't be read.
    """

    def __init__(self, folder: epath.Path, *, in_database: bool):
        self._folder: Folder | None = None
        self._blobs: Mapping[str, Blob] = {}
        self.is_damaged = False
        if not folder.exists():
            return
        self._folder = Folder(folder)
        if not in_database:
            files = self._folder.files.items()
            self._blobs = {name: Blob(found.size, name) for name, found in files}
        elif ocdbt.MANIFEST in self._folder.files:
            try:
                self._blobs = ocdbt.entries(self._folder)
            except CheckpointError:
                self.is_damaged = True

    def holds(
        self, array: str, leaf: LeafSpec, chunk: boxes.Shape, version: int, box: Index
    ) -> bool:
        """Whether every chunk that a box touches is there at full size, uncompressed."""
        size = int(np.prod(chunk, dtype=np.int64)) * leaf.dtype.itemsize
        blobs = (blob for _, blob in self._chunks(array, leaf, chunk, version, box))
        return all(blob is not None and blob.nbytes == size for blob in blobs)

    def read(
        self, array: str, leaf: LeafSpec, chunk: boxes.Shape, version: int, box: Index
    ) -> np.ndarray:
        """A box of which all chunks are there, [*box] in the leaf's dtype."""
        result = boxes.receiver(leaf, box, None)
        for of_chunk, blob in self._chunks(array, leaf, chunk, version, box):
            shared = boxes.intersection(box, of_chunk)
            zarr.read_part(
                lambda offset, buffer, blob=blob: self._folder.read_into(blob, offset, buffer),
                chunk,
                boxes.relative(shared, of_chunk),
                result[(*boxes.relative(shared, box), ...)],
            )
        return result

    def _chunks(
        self, array: str, leaf: LeafSpec, chunk: boxes.Shape, version: int, box: Index
    ) -> Iterator[tuple[Index, Blob | None]]:
        """The box of each chunk, and where it lies."""
        for position in boxes.chunks_of(box, chunk):
            of_chunk = boxes.chunk_box(position, chunk, leaf.shape)
            key = f"{array}/{zarr.chunk_key(version, of_chunk, chunk)}"
            yield of_chunk, self._blobs.get(key)
