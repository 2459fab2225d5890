"""Checkpoints that leave out a leaf because it is another one: a readout that is the embedding, say.

A checkpoint without the leaf is read as if it held a copy of the other. One that holds it although the base does not must
hold that copy: it is read as if the leaf were not there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from merging.checkpoints.boxes import row_boxes
from merging.checkpoints.format import CheckpointError, Index, LeafSpec, Reader
from merging.paths import canonical

COMPARED_ELEMENTS = 1 << 20  # in one go


class TiedReader:
    """A Reader over another, with leaves that are copies of others.

    Args:
      reader: of the checkpoint; closed with this one.
      present: {leaf: leaf that it is a copy of}, read as if stored.
      absent: leaves that are read as if not there.
    """

    def __init__(self, reader: Reader, present: Mapping[str, str], absent: frozenset[str]):
        self._reader, self._present, self._absent = reader, dict(present), absent
        self.location, self.format = reader.location, reader.format

    def specs(self) -> Mapping[str, LeafSpec]:
        known = self._reader.specs()
        specs = {name: spec for name, spec in known.items() if name not in self._absent}
        for name, source in self._present.items():
            specs[name] = dataclasses.replace(known[source], name=name)
        return specs

    def read(self, name: str, index: Index, *, out: np.ndarray | None = None) -> np.ndarray:
        return self._reader.read(self._present.get(name, name), index, out=out)

    def digest(self) -> str:
        return self._reader.digest()

    def check_unchanged(self) -> None:
        self._reader.check_unchanged()

    def close(self) -> None:
        self._reader.close()


def tied(reader: Reader, base: Mapping[str, LeafSpec], pairs: Mapping[str, str]) -> Reader:
    """An expert read with the leaves of the base, where they differ in tied ones.

    Args:
      reader: of the expert.
      base: the base's leaves.
      pairs: {leaf: leaf that it is a copy of}.

    Raises CheckpointError where the expert holds a leaf that the base ties, with other numbers.
    """
    specs = reader.specs()
    present = {
        leaf: source
        for leaf, source in pairs.items()
        if leaf in base and leaf not in specs and source in specs
    }
    paths = {
        canonical(name): name for name in specs
    }  # what the base lacks may be spelled otherwise
    absent = {
        paths[canonical(leaf)]: source
        for leaf, source in pairs.items()
        if leaf not in base and canonical(leaf) in paths
    }
    for leaf, source in absent.items():
        _check_copy(reader, leaf, source)
    return TiedReader(reader, present, frozenset(absent)) if present or absent else reader


def _check_copy(reader: Reader, leaf: str, source: str) -> None:
    specs = reader.specs()
    if source not in specs:
        raise CheckpointError(
            f"{reader.location}: TIED says that {leaf} is a copy of {source}, which is not there"
        )
    one, other = specs[leaf], specs[source]
    is_same = (one.shape, one.dtype) == (other.shape, other.dtype)
    boxes = row_boxes(one.shape, COMPARED_ELEMENTS) if is_same else ()
    if not is_same or any(
        reader.read(leaf, box).tobytes() != reader.read(source, box).tobytes() for box in boxes
    ):
        raise CheckpointError(
            f"{reader.location}: leaf {leaf} is not a copy of {source}, and the base has no {leaf} to merge it into: give"
            " a base that holds both (in transformers: tie_word_embeddings=False and save_pretrained)"
        )
