"""A checkpoint that lives in memory: the engine's contract without a disk.

What it promises: the same boxes and order as any other format (see `format.py`), so that an engine
is tested, or fed, without files. Arrays may be numpy's or jax's; a jax array comes to the host by
an explicit `device_get`, once. What it leaves out: arrays that are spread over several hosts.
"""

from __future__ import annotations

import hashlib
import json
import threading
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from merging.checkpoints.format import Index, LeafSpec


class Reader:
    """Leaves of a mapping name -> array; nested mappings are joined by `/`. Thread-safe."""

    format = "memory"
    location = "memory"

    def __init__(self, tree: Mapping[str, Any], *, stacked: Mapping[str, int] | None = None):
        self._arrays = dict(_flatten(tree))
        stacked = stacked or {}
        self._specs = {
            name: LeafSpec(
                name=name,
                shape=tuple(array.shape),
                dtype=np.dtype(array.dtype),
                stacked=stacked.get(name),
            )
            for name, array in self._arrays.items()
        }

    def specs(self) -> Mapping[str, LeafSpec]:
        """All leaves in the order of the mapping."""
        return dict(self._specs)

    def read(self, name: str, index: Index, *, out: np.ndarray | None = None) -> np.ndarray:
        """A copy of the box, [*box] in the leaf's dtype, in `out` where given."""
        box = jax.device_get(self._arrays[name])[(*index, ...)]  # `...`: an array even for ()
        if out is None:
            return np.array(box, order="C")
        if (out.shape, out.dtype) != (box.shape, box.dtype):
            raise ValueError(
                f"{name}: out is {out.dtype}{list(out.shape)}, wanted {box.dtype}{list(box.shape)}"
            )
        out[...] = box
        return out

    def digest(self) -> str:
        """sha256 hex digest of names, shapes and dtypes; the values are the caller's to know."""
        leaves = [[s.name, list(s.shape), s.dtype.name] for s in self._specs.values()]
        return hashlib.sha256(json.dumps(leaves).encode()).hexdigest()

    def check_unchanged(self) -> None:
        """Arrays in memory are the caller's to leave alone."""

    def close(self) -> None:
        pass


class Writer:
    """Fills numpy arrays; `arrays` is empty until `commit`."""

    params_path = None
    checksums_beside: Mapping[str, Mapping[str, str]] = types.MappingProxyType({})

    def __init__(self, specs: Mapping[str, LeafSpec]):
        self._arrays = {name: np.empty(spec.shape, spec.dtype) for name, spec in specs.items()}
        self._missing = {name: spec.size for name, spec in specs.items()}  # elements
        self._lock = threading.Lock()
        self.arrays: Mapping[str, np.ndarray] = {}

    @property
    def names_mine(self) -> list[str]:
        """All leaves."""
        return list(self._missing)

    def write(self, name: str, index: Index, array: np.ndarray, *, is_stored: bool = False) -> None:
        """Stores a box, [*box] in the leaf's dtype. Any thread, any order."""
        box = self._arrays[name][(*index, ...)]
        if (array.shape, array.dtype) != (box.shape, box.dtype):
            raise ValueError(
                f"{name}: got {array.dtype}{list(array.shape)}, wanted {box.dtype}{list(box.shape)}"
            )
        box[...] = array
        with self._lock:
            self._missing[name] -= box.size

    def commit(self) -> None:
        """Makes `arrays` visible."""
        wrong = {name: count for name, count in self._missing.items() if count}
        assert not wrong, f"commit with elements missing (negative: written twice): {wrong}"
        self.arrays = self._arrays

    def holds(self, name: str, index: Index) -> bool:
        """Nothing outlives a process in its memory."""
        return False

    def stored(self, name: str, index: Index) -> np.ndarray:
        raise AssertionError("nothing is held")

    def close(self) -> None:
        self._arrays = {}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value
