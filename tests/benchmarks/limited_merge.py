"""`launch.merge` on storage of a stated rate: what each process of tests/benchmarks/scaling.py runs.

    python -m tests.benchmarks.limited_merge BYTES_PER_S each|all FOLDER FLAGS...

Every read and write of a checkpoint's files waits until its bytes have gone over a line of that rate, one behind another: a line of
this process (each), or one that all processes share (all). A rate of 0 waits for nothing. What went over it is told in FOLDER.
"""

from __future__ import annotations

import fcntl
import json
import os
import pathlib
import struct
import sys
import threading
import time

from launch import command, merge
from merging.checkpoints import storage

# What a line that was idle sends at once, in seconds of its rate: a thread that wakes late on a busy machine is not the line's fault.
BURST_S = 0.1


class Line:
    """A line that sends so many bytes a second, shared by all who name the same file, which holds when it is free next.

    Attributes:
      sent: bytes by this process.
    """

    def __init__(self, path: pathlib.Path, bytes_per_s: float):
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        self._seconds_per_byte = 1 / bytes_per_s if bytes_per_s else 0.0
        self._lock = threading.Lock()  # flock is the process's, not the thread's
        self.sent = 0

    def send(self, nbytes: int) -> None:
        """Returns when so many bytes have gone over."""
        seconds = nbytes * self._seconds_per_byte
        with self._lock:
            self.sent += nbytes
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            raw = os.pread(self._descriptor, 8, 0)
            free = struct.unpack("d", raw)[0] if raw else 0.0
            end = (
                max(free, time.monotonic() - BURST_S) + seconds
            )  # a clock that all processes share
            os.pwrite(self._descriptor, struct.pack("d", end), 0)
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        if seconds:
            time.sleep(max(0.0, end - time.monotonic()))


def limit(read: Line, write: Line) -> None:
    """All files of checkpoints are read and written over these from now on."""
    read_into, put = storage.ByteSource.read_into, storage.ByteSink.write

    def slow_read(self: storage.ByteSource, offset: int, buffer: memoryview) -> None:
        read.send(len(buffer))
        read_into(self, offset, buffer)

    def slow_write(self: storage.ByteSink, offset: int, data: memoryview) -> None:
        write.send(len(data))
        put(self, offset, data)

    storage.ByteSource.read_into = slow_read
    storage.ByteSink.write = slow_write


def main() -> None:
    program, rate, kind, folder, *given = sys.argv
    index = os.environ["MERGING_PROCESS_INDEX"]
    line = pathlib.Path(folder) / ("line" if kind == "all" else f"line_{index}")
    # Both directions share it, as they do the rate of a bucket or a disk; each counts its own.
    read, write = (Line(line, float(rate)) for _ in range(2))
    limit(read, write)
    sys.argv = [program, *given]
    merge.define_flags()
    try:
        command.run(merge.main)
    finally:
        told = {"read": read.sent, "written": write.sent}
        (pathlib.Path(folder) / f"sent_{index}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
