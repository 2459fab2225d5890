"""The journal of a run: which pieces of the output are finished, so that a run that was killed need not compute them again.

A file of lines in the staging folder, one for each process: `<crc32c of the JSON, 8 hex digits> <JSON>`. The first is the
header: all that the bytes of the output depend on (code, libraries, device, settings, inputs) and how the output is cut.
Then come the facts of the survey, and the pieces: leaf, box, the crc32c of its bytes in each output, and its statistics.

What it promises:
- A piece in the journal was computed from inputs that were unchanged when it was written down: they are looked at before
  each write. A piece is written down after its bytes were handed to the storage.
- Killed at any instant (SIGKILL), the run loses what was not yet written down: the pieces since the last write (pauses are
  thirty times as long as a write takes), and where the format puts pieces together or stores them in batches, those
  that were still in memory. Bytes that were handed to the kernel outlive the process, so nothing is synced here.
- After a power cut the journal may name pieces whose bytes never reached the disk. No piece is taken on trust: its bytes
  are read and compared with its checksum, and it is computed again where they differ.
- A line that is torn, or damaged, and all behind it count as not written.
- A journal of other code, settings, inputs or number of processes is refused with what differs, never mixed.

Object storage can't append to an object: there the journal is put whole by each write, and nothing of an object is there before
it is closed. So a run that was killed also loses the shards that it was writing, and keeps those that it had closed.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from crc32c import crc32c
from etils import epath

from merging import manifest
from merging.checkpoints.checksums import box_text
from merging.checkpoints.format import CheckpointError, Reader
from merging.checkpoints.storage import is_local, naming, put_file
from merging.engine.pieces import Piece

# A write is followed by a pause of so many times what it took, so that it costs no more than 3 % of one thread.
_PAUSE = 30


@dataclasses.dataclass(frozen=True)
class Finished:
    """A piece in the journal.

    Attributes:
      checksums: of its bytes in each output, in the order of the outputs.
      statistics: float64, as `Statistics.to_vector`; None where there are none.
    """

    checksums: tuple[str, ...]
    statistics: np.ndarray | None


class Journal:
    """The journal of one process. Thread-safe.

    Args:
      folder: the staging folder.
      process: number of this process.
      header: JSON: all that must be the same for a run to go on.
      limit: elements of the largest piece; an earlier run's stays where it is not larger, so that the pieces are the same.
      check: raises if the inputs are not what they were.

    Attributes:
      limit: the same, decided.
      survey: the facts of the survey as JSON, or None.
      pieces: what is finished, by leaf and box.
      is_resumed: whether an earlier run's journal is gone on with.

    Raises OutputError if what is there is of another run.
    """

    def __init__(
        self,
        folder: epath.Path,
        process: int,
        header: Mapping[str, Any],
        *,
        limit: int,
        check: Callable[[], None],
    ):
        self._path = file_of(folder, process)
        self._check = check
        self._lock = threading.Lock()  # guards _waiting
        self._waiting: list[bytes] = []
        self._next_write = 0.0
        self._is_open = True
        self._descriptor: int | None = None
        self._whole = bytearray()  # in a bucket: what is written down
        self.limit = limit
        self.survey: Any = None
        self.pieces: dict[tuple[str, str], Finished] = {}
        whole, records = read(self._path)
        self.is_resumed = bool(records)
        if records:
            manifest.refuse_other(folder, records[0]["header"], header)
            if records[0]["limit"] <= limit:
                self.limit = records[0]["limit"]
            self._take(records[1:])
        if is_local(folder):
            with naming(self._path):
                self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                os.ftruncate(self._descriptor, len(whole))
                os.lseek(self._descriptor, len(whole), os.SEEK_SET)
        else:
            self._whole += whole
        if not records:
            self._append([_line({"header": header, "limit": limit})])

    def finish(self, piece: Piece, checksums: Sequence[str], statistics: np.ndarray | None) -> None:
        """Notes a piece whose bytes are with all writers; `flush` writes it down."""
        told: dict[str, Any] = {
            "leaf": piece.tensor.leaf.name,
            "box": box_text(piece.index),
            "checksums": list(checksums),
        }
        if statistics is not None:
            told["statistics"] = base64.b64encode(statistics.astype("<f8").tobytes()).decode()
        self._note(told)

    def finish_survey(self, facts: Any) -> None:
        """Notes the facts of a survey, JSON."""
        self._note({"survey": facts})

    def flush_now_and_then(self) -> None:
        """`flush`, unless the last was a moment ago."""
        begun = time.monotonic()
        if begun >= self._next_write:
            self.flush()
            ended = time.monotonic()
            self._next_write = ended + _PAUSE * (ended - begun)

    def flush(self) -> None:
        """Writes down what was noted. Raises CheckpointError if the inputs are not what they were, and writes nothing then."""
        with self._lock:
            lines, self._waiting = self._waiting, []
        if lines and self._is_open:
            self._check()  # after the last of these pieces was read
            self._append(lines)

    def close(self) -> None:
        """Writes nothing more."""
        self._is_open = False
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _note(self, record: Mapping[str, Any]) -> None:
        line = _line(record)
        with self._lock:
            self._waiting.append(line)

    def _append(self, lines: Sequence[bytes]) -> None:
        if self._descriptor is None:
            self._whole += b"".join(lines)
            put_file(self._path, bytes(self._whole))
            return
        data = memoryview(b"".join(lines))
        try:
            with naming(self._path):
                while data:
                    data = data[os.write(self._descriptor, data) :]
        except OSError:
            self.close()  # its last line may be torn: nothing may follow
            raise

    def _take(self, records: Sequence[Mapping[str, Any]]) -> None:
        for record in records:
            if "survey" in record:
                self.survey = record["survey"]
                continue
            statistics = record.get("statistics")
            self.pieces[record["leaf"], record["box"]] = Finished(
                tuple(record["checksums"]),
                None
                if statistics is None
                else np.frombuffer(base64.b64decode(statistics), "<f8").astype(np.float64),
            )


@contextlib.contextmanager
def kept(
    staging: manifest.Staging,
    identity: Mapping[str, Any],
    inputs: Sequence[Reader],
    *,
    limit: int,
    log: Callable[[str], None],
) -> Iterator[Journal]:
    """The journal of this process while a run is under way in a staging folder that is held; arguments as of `Journal`.

    What fails inside leaves all that is finished for the next run, and says so; except where what the inputs hold is at
    fault: then the same would fail again, and the folder is removed.
    """

    def check() -> None:
        for reader in inputs:
            reader.check_unchanged()

    header = {**identity, **manifest.environment()}
    journal = Journal(staging.folder, jax.process_index(), header, limit=limit, check=check)
    try:
        yield journal
    except BaseException as error:
        is_unchanged = True
        try:
            journal.flush()
            check()
        except CheckpointError:
            is_unchanged = False
        except OSError:
            pass  # the disk, of which `error` tells; what was not written down is computed again
        if isinstance(error, ValueError) and is_unchanged and jax.process_count() == 1:
            staging.discard()
        elif not is_local(staging.folder) or staging.folder.exists():  # a bucket may be what failed
            log(
                f"stopped: what is finished stays in {staging.folder}; the same command goes on there"
            )
        raise
    finally:
        journal.close()


def file_of(folder: epath.PathLike, process: int) -> epath.Path:
    """The journal of a process."""
    return epath.Path(folder) / manifest.JOURNALS.replace("*", str(process))


def read(path: epath.Path) -> tuple[bytes, list[Any]]:
    """(whole lines, what they say) of a journal; nothing where there is none."""
    if not path.exists():
        return b"", []
    data = path.read_bytes()
    records, end = [], 0
    for line in _whole_lines(data):
        checksum, _, text = line.partition(b" ")
        if checksum != b"%08x" % crc32c(text):
            break
        records.append(json.loads(text))
        end += len(line) + 1
    return data[:end], records


def _whole_lines(data: bytes) -> Iterator[bytes]:
    start = 0
    while (stop := data.find(b"\n", start)) >= 0:
        yield data[start:stop]
        start = stop + 1


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (crc32c(text), text)
