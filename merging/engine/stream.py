"""Reads checkpoints piece by piece, many pieces at once, within a budget of bytes.

Each worker thread takes a piece, reads it from every input into buffers of its own, runs a jitted step on it and writes
what comes out, then takes the next. Reading, computing and writing of different pieces thereby overlap, what a worker
reads is still in its core's cache when the step and the writer want it, and no thread waits for another. Memory is the
buffers of the workers: it does not grow with the size of the model.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from merging.checkpoints.format import CheckpointError, Reader
from merging.engine import hosts
from merging.engine.pieces import Piece, Tensor, pieces_of
from merging.engine.step import Geometry
from merging.engine.workers import Result, work_on
from merging.interrupted import Interrupted, ShouldStop, never

ALIGNMENT = 64  # bytes; XLA:CPU takes numpy memory as it is only where it is aligned so


@dataclasses.dataclass(frozen=True)
class LoadedPiece:
    """A piece of all inputs, in memory until its worker goes on to the next.

    Attributes:
      base, experts: numpy, 1-D, padded with zeros to `geometry.shape`.
      size: how many elements are real.
      keys: uint32 [N, 2]. offset: uint32 [2].
    """

    piece: Piece
    base: np.ndarray
    experts: tuple[np.ndarray, ...]
    keys: np.ndarray
    geometry: Geometry
    size: int

    @property
    def tensor(self) -> Tensor:
        return self.piece.tensor

    @property
    def offset(self) -> np.ndarray:
        return self.piece.offset

    def on_devices(self) -> tuple[np.ndarray | jax.Array, tuple[np.ndarray | jax.Array, ...]]:
        """(base, experts) for a jitted step: spread over this host's devices where there are several."""
        sharding = _spread(self.geometry.shape[0])
        if sharding is None:
            return self.base, self.experts
        return jax.device_put((self.base, self.experts), sharding)


def _spread(size: int) -> NamedSharding | None:
    devices = jax.local_devices()
    if len(devices) == 1 or size % len(devices):
        return None
    mesh = jax.sharding.Mesh(np.array(devices), ("piece",))
    return NamedSharding(mesh, PartitionSpec("piece"))


class Stream:
    """The base and the experts, open, and the threads that read them.

    Args:
      base, experts: readers of compatible checkpoints (`plan.check_compatible`).
      seed: of the keep masks.
      limit: elements of the largest piece; buffers are made for it.
      workers: threads.
      should_stop: whether to begin no further piece; asked now and then, in the caller's thread.
    """

    def __init__(
        self,
        base: Reader,
        experts: Sequence[Reader],
        *,
        seed: int,
        limit: int,
        workers: int,
        should_stop: ShouldStop = never,
    ):
        self.base, self.experts = base, tuple(experts)
        self._expert_specs = [expert.specs() for expert in experts]
        self.seed, self.limit, self.workers = seed, limit, workers
        self._should_stop = should_stop
        self.bytes_read = 0  # by passes over the inputs
        self.bytes_sampled = 0  # beside them, before the first
        self.read_seconds = 0.0  # of all workers together
        self.while_running: Callable[[], None] = lambda: (
            None
        )  # now and then, in the caller's thread
        self._lock = threading.Lock()
        self._local = threading.local()
        self._keys: dict[str, np.ndarray] = {}

    def run(
        self,
        pieces: Iterable[Piece],
        work: Callable[[Piece], Result],
        take: Callable[[Result], None],
    ) -> None:
        """A pass: `workers.work_on` with this stream's threads.

        All hosts make the same passes. Raises Interrupted on all of them where one was asked to stop in this one.
        """

        def look() -> None:
            self.while_running()
            if self._should_stop():
                raise Interrupted("stopped")

        is_stopped = False
        try:
            work_on(pieces, work, take, workers=self.workers, while_running=look)
        except Interrupted:
            is_stopped = True
        if hosts.combine(np.array([is_stopped], np.int64)):
            raise Interrupted("stopped in the midst")

    def pieces(self, tensors: Iterable[Tensor]) -> Iterator[Piece]:
        """The tensors cut to what the buffers hold."""
        return (piece for tensor in tensors for piece in pieces_of(tensor, self.limit))

    def load(self, piece: Piece, *, is_sample: bool = False) -> LoadedPiece:
        """Reads a piece of every input into this thread's buffers."""
        padded = padded_size(piece.size)
        name = piece.tensor.leaf.name
        dtypes = [piece.tensor.leaf.dtype] + [specs[name].dtype for specs in self._expert_specs]
        arrays = []
        begun = time.perf_counter()
        for slot, (reader, dtype) in enumerate(
            zip((self.base, *self.experts), dtypes, strict=True)
        ):
            raw = self._buffer(slot, padded * dtype.itemsize)
            raw[piece.size * dtype.itemsize :] = 0
            buffer = raw.view(dtype)
            reader.read(name, piece.index, out=buffer[: piece.size].reshape(piece.shape))
            # XLA without 64-bit types takes float64 as float32 anyway; here the rounding is numpy's and explicit.
            arrays.append(buffer.astype(np.float32) if dtype == np.float64 else buffer)
        nbytes = sum(piece.size * dtype.itemsize for dtype in dtypes)
        with self._lock:
            if is_sample:
                self.bytes_sampled += nbytes
            else:
                self.bytes_read += nbytes
            self.read_seconds += time.perf_counter() - begun
        return LoadedPiece(
            piece=piece,
            base=arrays[0],
            experts=tuple(arrays[1:]),
            keys=self._tensor_keys(piece.tensor),
            geometry=Geometry((padded,), (1,), wide=piece.tensor.size > 2**32),
            size=piece.size,
        )

    def _tensor_keys(self, tensor: Tensor) -> np.ndarray:
        keys = self._keys.get(tensor.path)
        if keys is None:
            keys = tensor.keys(seed=self.seed, experts=len(self.experts))
            self._keys[tensor.path] = keys
        return keys

    def _buffer(self, slot: int, nbytes: int) -> np.ndarray:
        """This thread's aligned buffer of that many bytes for one input."""
        buffers = self._local.__dict__.setdefault("buffers", {})
        if slot not in buffers or buffers[slot].nbytes < nbytes:
            buffers[slot] = aligned(max(nbytes, self._slot_bytes(slot)))
        return buffers[slot][:nbytes]

    def _slot_bytes(self, slot: int) -> int:
        specs = (self.base.specs(), *self._expert_specs)[slot]
        itemsize = max((s.dtype.itemsize for s in specs.values()), default=1)
        return (
            min(self.limit, padded_size(max((s.size for s in specs.values()), default=1)))
            * itemsize
        )

    def read_kept(self, piece: Piece) -> np.ndarray:
        """A piece that stays as the base has it, whatever the experts hold."""
        base = self.base.read(piece.tensor.leaf.name, piece.index)
        with self._lock:
            self.bytes_read += base.nbytes
        return base

    def read_copied(self, piece: Piece) -> np.ndarray:
        """A piece of a leaf that is not merged, which all experts must hold as the base does.

        Raises CheckpointError naming the first expert and element that differ.
        """
        leaf = piece.tensor.leaf
        base = self.base.read(leaf.name, piece.index)
        for expert in self.experts:
            other = expert.read(leaf.name, piece.index)
            if not np.array_equal(base, other):
                at = tuple(int(i[0]) for i in np.nonzero(np.atleast_1d(base != other)))
                raise CheckpointError(
                    f"{expert.location}: leaf {leaf.name} is {leaf.dtype}, which is copied from the base and not"
                    f" merged, but it differs from {self.base.location} (first at {at} of the box {piece.index}):"
                    " the experts must share it"
                )
        with self._lock:
            self.bytes_read += base.nbytes * (1 + len(self.experts))
        return base

    def blame_not_finite(self, loaded: LoadedPiece) -> None:
        """Raises CheckpointError naming the input, leaf and element that is NaN or infinite."""
        for reader, array in zip(
            (self.base, *self.experts), (loaded.base, *loaded.experts), strict=True
        ):
            bad = np.flatnonzero(~np.isfinite(array[: loaded.size].astype(np.float32)))
            if len(bad):
                shape = loaded.tensor.shape
                where = tuple(int(i) for i in np.unravel_index(loaded.piece.start + bad[0], shape))
                raise CheckpointError(
                    f"{reader.location}: leaf {loaded.tensor.leaf.name} holds {array[bad[0]]} at {where}"
                    f" ({len(bad)} such values in this piece alone): a checkpoint with NaN or infinity can't be"
                    " merged; leave it out or use an earlier step of its training"
                )
        raise CheckpointError(
            f"leaf {loaded.tensor.leaf.name}: all inputs are finite but the merge is not: its values overflow the output"
            " type; choose OUTPUT_DTYPE='float32' or a smaller scale"
        )


def take(array: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """array[chosen]; by the bits, since numpy copies types that it does not know one by one."""
    bits = {2: np.uint16, 4: np.uint32}[array.dtype.itemsize]
    return array.view(bits)[chosen].view(array.dtype)


def to_float32(array: np.ndarray) -> np.ndarray:
    """A copy in float32; bfloat16 by its bits, which numpy does ten times faster than a cast by ml_dtypes."""
    if array.dtype == ml_dtypes.bfloat16:
        return (array.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(np.float32)


def padded_size(size: int) -> int:
    """The next power of two (at least 4,096): a step is compiled once for each such size, not for every leaf."""
    return max(1 << 12, 1 << (size - 1).bit_length())


def aligned(nbytes: int) -> np.ndarray:
    """Zeroed uint8 memory that XLA:CPU uses without a copy."""
    raw = np.zeros(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes]
