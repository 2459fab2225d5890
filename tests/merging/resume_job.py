"""What each process of `test_processes.py` runs to be killed, or asked to stop, and to go on: a merge from disk to disk.

python -m tests.merging.resume_job FOLDER NUMBER SIGNAL    sent to process 1 at its so manieth piece
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import sys
import threading
from typing import Any

from launch import devices, preemption

joined = devices.processes(os.environ)
devices.start(joined)

from merging import merge  # noqa: E402
from merging.engine import output, pieces, workers  # noqa: E402
from merging.interrupted import Interrupted  # noqa: E402
from tests.merging.process_settings import EXPERTS, SETTINGS  # noqa: E402

folder, sent_at, number = pathlib.Path(sys.argv[1]), int(sys.argv[2]), signal.Signals[sys.argv[3]]
pieces.PIECE_ELEMENTS = 512
workers.SECONDS_BETWEEN_REPORTS = 0.001

put, lock, puts = output.Outputs.put, threading.Lock(), [0]
is_asked, is_told = preemption.should_stop_soon(joined), threading.Event()


def counted(*arguments: Any) -> None:
    with lock:
        puts[0] += 1
        is_sending = puts[0] == sent_at and joined.index == 1
        is_waiting = puts[0] >= sent_at > 0 and number == signal.SIGTERM
    if is_sending:
        os.kill(os.getpid(), number)
    if is_waiting:  # so that the pass isn't over before both have heard
        assert is_told.wait(120)
    put(*arguments)


def should_stop() -> bool:
    if is_asked():
        is_told.set()
    return is_told.is_set()


output.Outputs.put = counted
said: list[str] = []
settings = merge.Settings(
    base=str(folder / "base"),
    experts=[str(folder / f"expert_{i}") for i in range(EXPERTS)],
    output_dir=folder / "out",
    methods=SETTINGS,
    shard_bytes=4_000,
)
with preemption.ending(print, joined):
    try:
        report = merge.run(merge.plan(settings), log=said.append, should_stop=should_stop)
    except Interrupted:
        (folder / f"stopped_{joined.index}").touch()
        raise
told = {"pieces": report.pieces, "kept": report.pieces_resumed, "said": said, "reads": report.reads}
(folder / f"report_{joined.index}.json").write_text(json.dumps(told))
