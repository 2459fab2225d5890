"""What the tests of tree formats share: arrays that hurt, and whole checkpoints read and copied."""

from __future__ import annotations

import hashlib
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from merging.checkpoints import boxes, memory

ARRAYS = {
    "decoder/layers_0/mlp/wi/kernel": np.arange(60, dtype=np.float32).reshape(12, 5),
    "decoder/norm.scale": np.arange(7).astype(ml_dtypes.bfloat16),
    "decoder/cube": np.arange(120, dtype=np.float16).reshape(4, 5, 6),
    "zeros": np.zeros((9, 3), np.float32),
    "scalar": np.array(2.5, np.float32),
    "one": np.array([3], np.int64),
    "flags": np.array([True, False, True]),
    "bytes": np.arange(250, dtype=np.uint8).reshape(25, 10),
}


def memory_reader() -> memory.Reader:
    return memory.Reader(ARRAYS)


def nested(arrays: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *above, last = name.split("/")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last] = array
    return tree


def read_all(reader: Any) -> dict[str, np.ndarray]:
    return {n: reader.read(n, boxes.whole(s.shape)) for n, s in reader.specs().items()}


def same(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> bool:
    """Same names, shapes, dtypes and bits."""
    return got.keys() == want.keys() and all(
        (got[n].shape, got[n].dtype, got[n].tobytes())
        == (np.shape(want[n]), want[n].dtype, np.asarray(want[n]).tobytes())
        for n in want
    )


def copy(reader: Any, writer: Any, elements: int = 17) -> None:
    """Writes this writer's leaves in small boxes, last ones first, and commits."""
    for name in writer.names_mine:
        for index in reversed(list(boxes.row_boxes(reader.specs()[name].shape, elements))):
            writer.write(name, index, reader.read(name, index))
    writer.commit()


def digests(reader: Any) -> dict[str, list[Any]]:
    """As `expected.json` of the real T5X checkpoints gives them."""
    return {
        name: [list(a.shape), a.dtype.name, hashlib.sha256(a.tobytes()).hexdigest()[:16]]
        for name, a in read_all(reader).items()
    }


def made(path: pathlib.Path) -> pathlib.Path:
    path.mkdir(parents=True)
    return path
