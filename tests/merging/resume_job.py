"""What each process of `test_processes.py` runs to be killed, and to go on: a merge from disk to disk."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import sys
import threading
from typing import Any

from launch import devices

joined = devices.processes(os.environ)
devices.start(joined)

import merging  # noqa: E402
from merging.engine import output, pieces, workers  # noqa: E402
from tests.merging.process_settings import EXPERTS, SETTINGS  # noqa: E402

folder, kill_at = pathlib.Path(sys.argv[1]), int(sys.argv[2])
pieces.PIECE_ELEMENTS = 512
workers.SECONDS_BETWEEN_REPORTS = 0.001

put, lock, puts = output.Outputs.put, threading.Lock(), [0]


def counted(*arguments: Any) -> None:
    with lock:
        puts[0] += 1
        if puts[0] == kill_at and joined.index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    put(*arguments)


output.Outputs.put = counted
said: list[str] = []
report = merging.merge_checkpoints(
    base=str(folder / "base"),
    experts=[str(folder / f"expert_{i}") for i in range(EXPERTS)],
    output_dir=folder / "out",
    methods=SETTINGS,
    shard_bytes=4_000,
    log=said.append,
)
told = {"pieces": report.pieces, "kept": report.pieces_resumed, "said": said, "reads": report.reads}
(folder / f"report_{joined.index}.json").write_text(json.dumps(told))
