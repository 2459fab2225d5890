"""Checksums of the boxes that a checkpoint was written in: made in the pass that writes, and read again.

A manifest holds {leaf: {box: crc32c}}: the box as `0:128,0:960` (empty for a scalar), the crc32c (RFC 3720, appendix
B.4) of its bytes in C order as 8 hex digits. They are of arrays, not of files, so that they mean the same in any format.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from crc32c import crc32c

from merging.checkpoints.format import CheckpointError, Index, LeafSpec, Reader
from merging.checkpoints.safetensors_header import show

Checksums = Mapping[str, Mapping[str, str]]


def checksum(array: np.ndarray) -> str:
    """crc32c of a C-contiguous array's bytes, 8 hex digits."""
    return f"{crc32c(array.reshape(-1).view(np.uint8)):08x}"


def box_text(index: Index) -> str:
    """`0:128,0:960`; empty for a scalar."""
    return ",".join(f"{part.start}:{part.stop}" for part in index)


def verify(reader: Reader, checksums: Any) -> Iterator[tuple[int, str | None]]:
    """Reads every box again: (bytes read, what is wrong with it or None), box by box. `checksums` as a manifest says them.

    Raises CheckpointError unless the boxes are those of the checkpoint: leaves and elements, each once.
    """
    specs = reader.specs()
    boxes = _boxes(specs, checksums, where=reader.location)
    for name, box, index in boxes:
        array = reader.read(name, index)
        found, written = checksum(array), checksums[name][box]
        wrong = (
            f"leaf {name}, box [{box}]: crc32c is {found}, and was {written} when it was written"
        )
        yield array.nbytes, None if found == written else wrong


def _boxes(
    specs: Mapping[str, LeafSpec], checksums: Any, *, where: str
) -> list[tuple[str, str, Index]]:
    boxes, problems = [], []
    if not isinstance(checksums, dict) or not all(isinstance(v, dict) for v in checksums.values()):
        raise CheckpointError(f"{where}: the manifest's checksums are {show(checksums)}")
    for name in checksums.keys() - specs.keys():
        problems.append(f"leaf {name} of the manifest is not in the checkpoint")
    for name, spec in specs.items():
        covered = 0
        for box in checksums.get(name, {}):
            index = _box(box, spec)
            if index is None:
                problems.append(f"leaf {name}: {box!r} is no box of {list(spec.shape)}")
                continue
            covered += math.prod(part.stop - part.start for part in index)
            boxes.append((name, box, index))
        if covered != spec.size:
            problems.append(
                f"leaf {name}: the manifest has checksums of {covered:,} of {spec.size:,} elements"
            )
    if problems:
        raise CheckpointError(
            f"{where}: the manifest is not of this checkpoint: " + "; ".join(problems[:8])
        )
    return boxes


def _box(text: str, spec: LeafSpec) -> Index | None:
    if not spec.shape:
        return () if text == "" else None
    if not re.fullmatch(r"\d{1,18}:\d{1,18}(,\d{1,18}:\d{1,18})*", text):
        return None
    index = tuple(slice(*map(int, part.split(":"))) for part in text.split(","))
    fits = len(index) == len(spec.shape) and all(
        part.start < part.stop <= size for part, size in zip(index, spec.shape, strict=True)
    )
    return index if fits else None
