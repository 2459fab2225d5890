"""Batches for training: `batch(step)` is an index into rows packed once, the same whatever the hosts.

A packed cache holds one epoch of a mixture (or as many rows as a run needs) for one seed and pair of lengths. Rows have
one length, so the cache is three arrays in raw files, read by memory map: row r stands at r times the bytes of a row,
and no index or record format is needed. Each epoch goes through the rows in another order. A host reads its block of
the global batch.

A mixture too big to pack is streamed instead: packed in chunks as it is read, with a position that can be saved.

Both give dicts of numpy arrays, see `packing.batch`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from tasks import identity, mixing, packing, vocabularies
from tasks.packing import Batch, Lengths, Tokens
from tasks.stream import NoExamples, Stream

INDEX = "index.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """Which rows of a global batch are this host's: block `host` of `hosts` equal ones.

    Attributes:
      batch_size: rows of the global batch.
      host: number of this host.
      hosts: how many there are.
    """

    batch_size: int
    host: int = 0
    hosts: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size % self.hosts or not 0 <= self.host < self.hosts:
            raise ValueError(
                f"host {self.host} of {self.hosts} can't take an equal share of {self.batch_size} rows"
            )

    @property
    def rows(self) -> slice:
        mine = self.batch_size // self.hosts
        return slice(self.host * mine, (self.host + 1) * mine)


class PackedBatches:
    """Batches of a packed cache.

    Args:
      folder: that `pack_mixture` returned.
      share: this host's rows.
      seed: of the order of rows within each epoch.
    """

    def __init__(self, folder: str | pathlib.Path, *, share: Share, seed: int = 0) -> None:
        self.folder, self.share, self.seed = pathlib.Path(folder), share, seed
        self.index: Mapping[str, Any] = json.loads((self.folder / INDEX).read_text())
        self._arrays = {
            name: np.memmap(
                self.folder / name, dtype, "r", shape=(self.index["rows"], self.index["length"])
            )
            for name, dtype in self.index["dtypes"].items()
        }
        self._order = functools.lru_cache(maxsize=2)(self._order_of)

    def batch(self, step: int) -> Batch:
        """This host's rows of the global batch of a step."""
        rows, size = self.index["rows"], self.share.batch_size
        wanted = step * size + np.arange(size)[self.share.rows]
        epochs, places = np.divmod(wanted, rows)
        numbers = np.empty_like(wanted)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            numbers[inside] = self._order(int(epoch))[places[inside]]
        picked = {name: array[numbers] for name, array in self._arrays.items()}
        return packing.batch(**picked, start_id=self.index["start_id"])

    def _order_of(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.index["rows"])


class StreamedBatches:
    """Batches of a mixture that is packed as it is read: an iterator whose `position` can be saved and given back.

    Every host packs all rows and keeps its own, so a position, like the batches, is the same whatever the hosts.

    Args:
      stream: the examples.
      share: this host's rows.
      position: where to go on; None: the beginning.
      chunk: examples that are packed, and whose rows are shuffled, together. A restored run packs its chunk again.

    Raises NoExamples where a whole epoch gives no row.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        share: Share,
        position: Mapping[str, int] | None = None,
        chunk: int = 16_384,
    ) -> None:
        self.stream, self.share, self.chunk = stream, share, chunk
        self.position = dict(position or {"epoch": 0, "example": 0, "row": 0})
        self.start_id = vocabularies.start_id(stream.tasks[0].output_features["inputs"].vocabulary)
        self._rows: list[packing.Row] | None = None
        # Whether this epoch gave a row; of what lies before a position that is given nothing is known.
        self._has_rows = self.position["example"] > 0
        self._reader: Iterator[Tokens] | None = None

    def __iter__(self) -> StreamedBatches:
        return self

    def __next__(self) -> Batch:
        rows: list[packing.Row] = []
        while len(rows) < self.share.batch_size:
            chunk, at = self._current(), self.position["row"]
            taken = chunk[at : at + self.share.batch_size - len(rows)]
            rows += taken
            self.position["row"] += len(taken)
            if self.position["row"] == len(chunk):
                self._advance()
        return packing.batch(**packing.concatenated(rows[self.share.rows]), start_id=self.start_id)

    def _current(self) -> list[packing.Row]:
        """The rows of the chunk at the position."""
        if self._rows is None:
            epoch, first = self.position["epoch"], self.position["example"]
            if self._reader is None:
                self._reader = self.stream.take(epoch, first)
            examples = itertools.islice(self._reader, self.chunk)
            rows = list(packing.pack(examples, length=self.stream.lengths.row))
            order = np.random.default_rng([self.stream.seed, epoch, first]).permutation(len(rows))
            self._rows = [rows[number] for number in order]
            self._has_rows |= bool(rows)
        return self._rows

    def _advance(self) -> None:
        self._rows = None
        self.position["row"] = 0
        self.position["example"] += self.chunk
        if self.position["example"] >= len(self.stream):
            if not self._has_rows:
                raise _without_rows(self.stream)
            self.position |= {"epoch": self.position["epoch"] + 1, "example": 0}
            self._reader, self._has_rows = None, False


def pack_mixture(
    mixture: str,
    *,
    cache_dir: str | pathlib.Path,
    lengths: Lengths,
    seed: int = 0,
    split: str = "train",
    truncation: str = "end",
    max_rows: int | None = None,
    rate_cap: int = mixing.RATE_CAP,
) -> pathlib.Path:
    """Packs an epoch of a mixture, unless that is done, and returns its folder, which appears whole or not at all.

    The name of the folder holds a digest of all that the rows depend on: the arguments, the tasks with their sources
    and vocabulary, and the code of this package.

    Args:
      mixture: a registered mixture or task.
      cache_dir: a local folder, of this host or shared; hosts that pack at once do the same work, and the first to
        finish counts.
      lengths: of inputs and targets.
      seed: of the order of examples.
      split: see `Stream`.
      truncation: see `packing.truncate`.
      max_rows: stop after so many rows, for a run that needs no more; None: a whole epoch.
      rate_cap: see `mixing`.

    Raises:
      ValueError: see `Stream`; NoExamples if there is no example.
    """
    stream = Stream(
        mixture, split=split, lengths=lengths, seed=seed, truncation=truncation, rate_cap=rate_cap
    )
    depends_on = _identity(stream, max_rows)
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    folder = pathlib.Path(cache_dir) / f"{mixture}-{split}-{digest[:16]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = pathlib.Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        _write(stream, making, max_rows, depends_on)
        _put(making, folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return folder


def _write(
    stream: Stream, folder: pathlib.Path, max_rows: int | None, depends_on: Mapping[str, Any]
) -> None:
    started = time.monotonic()
    features = stream.tasks[0].output_features
    is_small = max(feature.vocabulary.vocab_size for feature in features.values()) <= 1 << 16
    dtypes = {
        "targets": "uint16" if is_small else "int32",
        "segment_ids": "uint16",
        "kinds": "uint8",
    }
    counts = dict.fromkeys(
        ("rows", "examples", "tokens", "targets", "cut_inputs", "cut_targets"), 0
    )

    def cuts_counted(examples: Iterable[Tokens]) -> Iterator[Tokens]:
        for example in examples:
            for part in example.cut:
                counts[f"cut_{part}"] += 1
            yield example

    files = {name: (folder / name).open("wb") for name in dtypes}
    try:
        for row in packing.pack(cuts_counted(stream.take(0)), length=stream.lengths.row):
            for name, dtype in dtypes.items():
                files[name].write(getattr(row, name).astype(dtype).tobytes())
            counts["rows"] += 1
            counts["examples"] += int(row.segment_ids.max())
            counts["tokens"] += int(np.count_nonzero(row.kinds))
            counts["targets"] += int(np.count_nonzero(row.kinds == packing.TARGET))
            if counts["rows"] == max_rows:
                break
    finally:
        for file in files.values():
            file.close()
    if not counts["rows"]:
        raise _without_rows(stream)
    index = {
        **counts,
        "full": counts["tokens"] / (counts["rows"] * stream.lengths.row),
        "length": stream.lengths.row,
        "dtypes": dtypes,
        "start_id": vocabularies.start_id(features["inputs"].vocabulary),
        "seconds": round(time.monotonic() - started, 2),
        "identity": depends_on,
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _without_rows(stream: Stream) -> NoExamples:
    return NoExamples(
        f"{stream.mixture} has {len(stream):,} {stream.split} examples and none gives a row: its prompts passed over all"
    )


def _put(making: pathlib.Path, folder: pathlib.Path) -> None:
    """Renames, unless another process was first."""
    making.chmod(0o755)
    try:
        os.rename(making, folder)
    except OSError:
        if not (folder / INDEX).is_file():
            raise


def _identity(stream: Stream, max_rows: int | None) -> dict[str, Any]:
    return {
        "mixture": stream.mixture,
        "split": stream.split,
        "seed": stream.seed,
        "lengths": dataclasses.asdict(stream.lengths),
        "truncation": stream.truncation,
        "max_rows": max_rows,
        "counts": [int(count) for count in stream.counts],
        **identity.of_tasks(task.name for task in stream.tasks),
    }
