"""`launch.merge` that tells every read of its inputs and the memory it held: what each process of tests/campaigns/pods.py runs.

    python -m tests.campaigns.counted_merge FOLDER FLAGS...

FOLDER gets reads_I.json of process I: the reads as [file, offset, bytes, whether it was of the sample], and the resident bytes (RssAnon +
RssShmem) before the merge and at most.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import threading
from typing import Any

from launch import command, merge
from merging.checkpoints import storage


def note_reads() -> list[tuple[str, int, int, bool]]:
    """All reads of checkpoints' files from now on, which it goes on filling."""
    from merging.engine import stream

    reads: list[tuple[str, int, int, bool]] = []
    here = threading.local()
    read_into, load = storage.ByteSource.read_into, stream.Stream.load

    def noted_read(self: storage.ByteSource, offset: int, buffer: memoryview) -> None:
        reads.append((os.fspath(self.path), offset, len(buffer), getattr(here, "samples", False)))
        read_into(self, offset, buffer)

    def noted_load(self: stream.Stream, piece: Any, *, is_sample: bool = False) -> Any:
        here.samples = is_sample
        try:
            return load(self, piece, is_sample=is_sample)
        finally:
            here.samples = False

    storage.ByteSource.read_into = noted_read
    stream.Stream.load = noted_load
    return reads


def note_memory() -> dict[str, int]:
    """Resident bytes of the merge that follows: `before`, and `peak`."""
    from merging import merge as stage
    from merging.engine.resources import resident_bytes

    told: dict[str, int] = {}
    run = stage.run

    def noted_run(*arguments: Any, **named: Any) -> stage.Report:
        told["before"] = resident_bytes()
        report = run(*arguments, **named)
        told["peak"] = report.peak_resident_bytes
        return report

    stage.run = noted_run
    return told


def main() -> None:
    program, folder, *given = sys.argv
    index = os.environ["MERGING_PROCESS_INDEX"]
    reads, memory = note_reads(), note_memory()
    sys.argv = [program, *given]
    merge.define_flags()
    try:
        command.run(merge.main)
    finally:
        told = {"reads": reads, **memory}
        (pathlib.Path(folder) / f"reads_{index}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
