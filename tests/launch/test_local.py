"""A pod on one machine: joined devices, led output, and a failure that ends all."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from launch import phases
from launch.pod import local

# Guards against a hang; nothing waits for it.
TIMEOUT_S = 120.0


def run(
    code: str, *, processes: int = 2, devices: int = 2, echoed: list[str] | None = None
) -> list[str]:
    """What each process wrote."""
    return local.run_local(
        [sys.executable, "-c", code],
        processes=processes,
        devices=devices,
        timeout_s=TIMEOUT_S,
        echo=[].append if echoed is None else echoed.append,
    )


JOIN = """
from launch import devices
joined = devices.processes(__import__("os").environ)
devices.start(joined, timeout_s=60)
import sys, jax, jax.numpy as jnp
from jax.experimental import multihost_utils
"""

# In one piece: the C++ below writes to stdout too, between the pieces of a `print`.
FOUND = """
indices = multihost_utils.process_allgather(jnp.float32(joined.index)).ravel().tolist()
here, everywhere = jax.local_device_count(), jax.device_count()
sys.stdout.write(f"found {jax.process_index()} {here} {everywhere} {indices}\\n")
"""


@pytest.mark.parametrize(("processes", "devices"), [(2, 2), (1, 4)])
def test_processes_share_their_devices(processes: int, devices: int):
    outputs = run(JOIN + FOUND, processes=processes, devices=devices)
    indices = [float(i) for i in range(processes)]
    for index, output in enumerate(outputs):
        assert f"found {index} {devices} {processes * devices} {indices}" in output


def test_an_exception_in_one_process_ends_all_and_is_named():
    """Without `devices.start` the one that fails would wait for the other at exit, and the other for it."""
    with pytest.raises(
        local.ProcessFailed, match="process 1 failed: exit code 70; all 2 were ended"
    ) as caught:
        run(
            JOIN
            + "multihost_utils.sync_global_devices('both are here')\n"
            + "if joined.index == 1: raise ValueError('no such thing')\n"
            + "__import__('threading').Event().wait()"
        )
    assert caught.value.index == 1
    assert "ValueError: no such thing" in caught.value.output
    assert "Process 1 of 2 failed." in caught.value.output


def test_a_process_that_ignores_sigterm_is_killed():
    code = """
import os, signal, sys, threading
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("pid", os.getpid())
if os.environ["MERGING_PROCESS_INDEX"] == "0":
    threading.Event().wait()
sys.exit(7)
"""
    echoed: list[str] = []
    with pytest.raises(local.ProcessFailed, match="process 1 failed: exit code 7") as caught:
        run(code, echoed=echoed)
    assert caught.value.returncode == 7
    for line in echoed:
        with pytest.raises(ProcessLookupError):
            os.kill(int(line.split()[-1]), 0)


def test_time_runs_out():
    with pytest.raises(local.ProcessFailed, match="after 0.5 s still running: process"):
        local.run_local(
            [sys.executable, "-c", "import threading; threading.Event().wait()"],
            processes=2,
            devices=1,
            timeout_s=0.5,
            echo=[].append,
        )


def test_each_line_is_led_by_the_number_of_its_process():
    echoed: list[str] = []
    outputs = run("print('a'); print('b')", echoed=echoed)
    assert sorted(echoed) == ["[0] a", "[0] b", "[1] a", "[1] b"]
    assert outputs == ["a\nb\n", "a\nb\n"]


def test_the_command_exits_with_an_error_that_names_the_process():
    code = "import os, sys; sys.exit(3 * int(os.environ['MERGING_PROCESS_INDEX']))"
    command = [sys.executable, "-m", "launch.pod.local", "--processes=2", "--devices=1", "--"]
    done = subprocess.run([*command, sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "process 1 failed: exit code 3" in done.stderr
    assert subprocess.run([*command, sys.executable, "-c", ""]).returncode == 0
    done = subprocess.run([*command, "/no/such/program"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "/no/such/program can't be started" in done.stderr


def test_workers_share_each_phase_of_a_study():
    """Each on cores of its own, the report by one, and no phase before the one before has ended."""
    code = "import os, sys; print(sys.argv[1:], sorted(os.sched_getaffinity(0)))"
    echoed: list[str] = []
    local.run_workers(
        [sys.executable, "-c", code], workers=2, timeout_s=TIMEOUT_S, echo=echoed.append
    )
    cores = local.shares(2)
    told = [
        f"[{worker}] {phases.flags_of(phase, worker, 2)} {sorted(mine or os.sched_getaffinity(0))}"
        for phase in ("bases", "experts", "cells")
        for worker, mine in enumerate(cores)
    ]
    told.append(f"[0] {phases.flags_of('report', 0, 2)} {sorted(os.sched_getaffinity(0))}")
    assert told[-1].startswith("""[0] ["--gin.PHASE='report'", '--worker=0', '--num_workers=1']""")
    order = [sorted(echoed[i : i + 2]) for i in range(0, len(echoed), 2)]
    assert order == [told[i : i + 2] for i in range(0, len(told), 2)]


def test_a_worker_that_fails_ends_the_phase_and_those_behind_it():
    code = "import sys; print(sys.argv[1]); sys.exit(3 * ('experts' in sys.argv[1] and '--worker=1' in sys.argv))"
    echoed: list[str] = []
    with pytest.raises(local.ProcessFailed, match="process 1 failed: exit code 3"):
        local.run_workers(
            [sys.executable, "-c", code], workers=2, timeout_s=TIMEOUT_S, echo=echoed.append
        )
    assert not any("cells" in line for line in echoed)


def test_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 4, 6, 7})
    assert local.shares(2) == [{0, 2}, {4, 6, 7}]
    assert local.shares(1) == [{0, 2, 4, 6, 7}]
    assert local.shares(6) == [None] * 6
