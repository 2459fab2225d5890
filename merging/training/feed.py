"""Batches on their way to the devices: made and placed by a thread while the step before is computed.

A source gives rows of a mixture for this host, as numpy arrays, and says where it stands, so that a run goes on exactly
where it was saved. Several sources make one batch with a leading axis over experts.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from merging import partitioning
from merging.training.batch import Batch

# Made ahead of the step that takes them.
AHEAD = 2

Arrays = Mapping[str, np.ndarray]
Position = Mapping[str, int]


class Source(Protocol):
    """Batches of one mixture, for one host: block `host` of `hosts` equal ones of the global batch."""

    def read(self, position: Position | None) -> Iterator[tuple[Arrays, Position]]:
        """Batches from a position on (None: the beginning), each with the position behind it.

        Arrays: tokens, targets, positions, segment_ids [B / hosts, T] int32, loss_weights float32, prefix_mask bool.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Indexed:
    """A source whose batch of a step can be asked for."""

    batch: Callable[[int], Arrays]

    def read(self, position: Position | None) -> Iterator[tuple[Arrays, Position]]:
        step = 0 if position is None else position["step"]
        while True:
            yield self.batch(step), {"step": step + 1}
            step += 1


class Feed:
    """An iterator of (batch on the devices, positions of the sources behind it). Use as a context manager.

    Args:
      sources: one, or one for each expert of a step that trains several.
      place: see `Placement`.
      positions: of the sources; None: the beginning.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        place: Placement,
        *,
        positions: Sequence[Position] | None = None,
    ):
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=AHEAD)
        self._is_closed = threading.Event()
        readers = [
            source.read(position)
            for source, position in zip(sources, positions or [None] * len(sources), strict=True)
        ]
        self._thread = threading.Thread(target=self._make, args=(readers, place), daemon=True)

    def __enter__(self) -> Feed:
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._is_closed.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                pass
        self._thread.join()

    def __next__(self) -> tuple[Batch, list[Position]]:
        made = self._ready.get()
        if isinstance(made, BaseException):
            raise made
        return made

    def _make(self, readers: Sequence[Iterator[tuple[Arrays, Position]]], place: Placement) -> None:
        try:
            while not self._is_closed.is_set():
                read = [next(reader) for reader in readers]
                batch = place([arrays for arrays, _ in read])
                self._put((batch, [dict(position) for _, position in read]))
        except BaseException as error:  # raised again where batches are taken
            self._put(error)

    def _put(self, made: Any) -> None:
        while not self._is_closed.is_set():
            try:
                self._ready.put(made, timeout=0.05)
                return
            except queue.Full:
                pass


class Placement:
    """Where the rows of a global batch lie.

    Args:
      mesh: of all hosts.
      rows, length: of the global batch.
      experts: how many batches are put together along a leading axis; None: one, without that axis.

    Attributes:
      host, hosts: which block of rows this host needs.
    """

    def __init__(self, mesh: Mesh, *, rows: int, length: int, experts: int | None = None):
        self._shape = (rows, length) if experts is None else (experts, rows, length)
        self.sharding = partitioning.rows_sharding(
            self._shape, mesh, has_experts=experts is not None
        )
        axis = len(self._shape) - 2
        places = self.sharding.addressable_devices_indices_map(self._shape).values()
        ends = [place[axis].indices(rows)[:2] for place in places]
        first, last = min(a for a, _ in ends), max(b for _, b in ends)
        count = last - first
        is_block = rows % count == 0 and first % count == 0
        self._first = first if is_block else 0
        self.hosts = rows // count if is_block else 1
        self.host = first // count if is_block else 0

    def __call__(self, each: Sequence[Arrays]) -> Batch:
        """One batch of numpy arrays for each expert (or the only one), on the devices."""
        return Batch(
            tokens=self._place([a["tokens"] for a in each]),
            targets=self._place([a["targets"] for a in each]),
            weights=self._place([a["loss_weights"] for a in each]),
            segment_ids=self._place([a["segment_ids"] for a in each]),
            positions=self._place([a["positions"] for a in each]),
            prefix_mask=self._place([a["prefix_mask"] for a in each]),
        )

    def _place(self, each: Sequence[np.ndarray]) -> jax.Array:
        has_experts = len(self._shape) == 3

        def box(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[-2].indices(self._shape[-2])
            rows = slice(start - self._first, stop - self._first)
            if not has_experts:
                return each[0][rows]
            return np.stack([array[rows] for array in each[index[0]]])

        return jax.make_array_from_callback(self._shape, self.sharding, box)
