r"""Runs that are killed at random steps, by SIGKILL and SIGTERM in turns, and started again: the bits of an unbroken run.

  python -m tests.campaigns.finetune_kills [--kills=20] [--layouts=8,2x4] [--seed=0]

On 8 virtual devices of one process, and on 2 processes of 4: each layout is killed so many times, in as many runs as that
takes. Curve and final parameters of every run are compared bit for bit with one of the same layout that nobody stopped. Exit code 1
where something differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import random
import re
import signal
import sys
import tempfile
import time
from typing import Any

import numpy as np

from launch.pod import local
from tests.merging.training import runs

STEPS = 40
SETTINGS: dict[str, Any] = {"train_steps": STEPS, "checkpoint_every": 3, "validate_every": 10}
MESH = {"data": 2, "fsdp": 2, "model": 2}
LAYOUTS = {"8": (1, 8), "2x4": (2, 4)}  # processes, devices of each
WITHIN = 8  # steps after the start of a process in which it is killed
TIMEOUT_S = 600  # a run that hangs is a failure


@dataclasses.dataclass
class Told:
    """How often a layout was killed, and what it came to.

    Attributes:
      kills: by the name of the signal.
      runs: that were brought to their end.
      lost: steps that were taken again.
      different: what was not equal, in words.
    """

    kills: dict[str, int] = dataclasses.field(default_factory=dict)
    runs: int = 0
    lost: int = 0
    different: list[str] = dataclasses.field(default_factory=list)


class Job:
    """The processes of a run, one of which is sent a signal when a step has been seen.

    Args:
      folder: of the output.
      processes, devices: how many, and devices of each.
    """

    def __init__(self, folder: pathlib.Path, processes: int, devices: int):
        self._folder, self._processes, self._devices = folder, processes, devices
        self._pids: dict[int, int] = {}
        self.begun: int | None = None  # steps taken before this start
        self.last = 0  # the last step seen
        self._at: tuple[int, int, signal.Signals] | None = None

    def run(self, at: tuple[int, int, signal.Signals] | None) -> bool:
        """Whether it came to its end. `at`: (steps after the first one seen, number of a process, signal that it gets)."""
        self._at, self.begun, self._pids = at, None, {}
        self.is_sent = False
        command = [sys.executable, "-m", "tests.merging.training.job", str(self._folder)]
        try:
            local.run_local(
                [*command, json.dumps(SETTINGS), json.dumps(MESH)],
                processes=self._processes,
                devices=self._devices,
                timeout_s=TIMEOUT_S,
                echo=self._hear,
            )
        except local.ProcessFailed as failure:
            if failure.returncode in (-signal.SIGKILL, 128 + signal.SIGTERM) and self.is_sent:
                return False
            # Processes that start minutes apart on a busy machine give one another up (Gloo waits for 30 s).
            if "Gloo context initialization failed" in failure.output and self.begun is None:
                print("processes missed one another at their start: once more", flush=True)
                return self.run(at)
            raise
        return True

    def _hear(self, line: str) -> None:
        index, _, text = line[1:].partition("] ")
        if found := re.fullmatch(r"pid (\d+)", text):
            self._pids[int(index)] = int(found[1])
        if found := re.fullmatch(r"step (\d+)", text):
            self.last = int(found[1])
            self.begun = self.last - 1 if self.begun is None else self.begun
            if self._at is not None and self.last >= self.begun + 1 + self._at[0]:
                _, victim, number = self._at
                self._at, self.is_sent = None, True
                os.kill(self._pids[victim], number)


def campaign(layout: str, *, kills: int, seed: int, folder: pathlib.Path) -> Told:
    """Kills a layout's runs so many times; what they came to."""
    processes, devices = LAYOUTS[layout]
    draw, told = random.Random(f"{layout} {seed}"), Told()
    unbroken = folder / "unbroken"
    assert Job(unbroken, processes, devices).run(None)
    done = 0
    while done < kills:
        output = folder / str(told.runs)
        job, seen = Job(output, processes, devices), 0
        while True:
            number = (signal.SIGKILL, signal.SIGTERM)[done % 2]
            at = (draw.randrange(WITHIN), draw.randrange(processes), number)
            is_whole = job.run(at if done < kills else None)
            told.lost += max(0, seen - (job.begun if job.begun is not None else seen))
            if is_whole:
                break
            seen = job.last
            done += 1
            told.kills[number.name] = told.kills.get(number.name, 0) + 1
            print(f"{layout}: kill {done} of {kills}, {number.name} at step {seen}", flush=True)
        told.runs += 1
        different = differences(output, unbroken)
        print(f"{layout}: run {told.runs}, {'; '.join(different) or 'all bits equal'}", flush=True)
        told.different += different
    return told


def differences(output: pathlib.Path, unbroken: pathlib.Path) -> list[str]:
    """What differs between two outputs, in words."""
    told = []
    if runs.curve(output) != runs.curve(unbroken):
        told.append(f"{output.name}: the curve")
    found, wanted = runs.params(output), runs.params(unbroken)
    told += [
        f"{output.name}: {name}"
        for name in wanted.keys() | found.keys()
        if name not in found or not np.array_equal(found[name], wanted.get(name))
    ]
    return told


def main() -> None:
    """Kills, prints, and fails where it must."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    is_good = True
    for layout in asked.layouts.split(","):
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/compiled")
            told = campaign(layout, kills=asked.kills, seed=asked.seed, folder=pathlib.Path(folder))
        is_good &= not told.different
        print(
            f"{layout}: {told.kills} in {told.runs} runs of {STEPS} steps, {told.lost} steps taken again,"
            f" {'; '.join(told.different) or 'all bits equal'}, {time.monotonic() - started:.0f} s",
            flush=True,
        )
    sys.exit(0 if is_good else "not equal")


if __name__ == "__main__":
    main()
