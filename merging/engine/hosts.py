"""What the engine needs of several hosts: who am I, adding counts, and waiting for one another."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np


def is_main() -> bool:
    """True on the host that writes manifests."""
    return jax.process_index() == 0


def combine(array: np.ndarray) -> np.ndarray:
    """The sum over all hosts of an int64 or float64 array, the same on each, added in the order of the hosts."""
    if jax.process_count() == 1:
        return array
    from jax.experimental import multihost_utils

    # As bytes: without 64-bit types JAX would cut the numbers to 32 bits.
    raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    gathered = np.asarray(multihost_utils.process_allgather(raw))
    parts = gathered.reshape(jax.process_count(), -1).view(array.dtype)
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    return total.reshape(array.shape)


def gather_json(value: Any) -> list[Any]:
    """Every host's JSON value, in the order of the hosts, on all of them."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    raw = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array([raw.size], np.int32))).ravel()
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: raw.size] = raw
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def of_main(value: Any) -> Any:
    """The main host's JSON value, on all of them."""
    return gather_json(value)[0]


def wait_for_all(name: str) -> None:
    """Returns when every host has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
