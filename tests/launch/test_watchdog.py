"""Processes that meet, and those that fall silent: stopped, killed or cut off, they are named and all end."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from launch import exit_codes, watchdog
from launch.pod import local
from tests.launch import proxy

# ---- the meeting, among threads -----------------------------------------------------------------------------------


def meet(
    *calls: tuple[int, int], timeout_s: float = 30.0, address: str | None = None
) -> list[dict[int, socket.socket] | Exception]:
    """What `watchdog.meet` gave to each (count, index)."""
    coordinator = address or f"127.0.0.1:{local.free_port()}"

    def one(count: int, index: int) -> dict[int, socket.socket] | Exception:
        try:
            return watchdog.meet(coordinator, count=count, index=index, timeout_s=timeout_s)
        except Exception as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return [done.result() for done in [pool.submit(one, *call) for call in calls]]


def close(*answers: dict[int, socket.socket] | Exception) -> None:
    for answer in answers:
        assert isinstance(answer, dict), answer
        for connection in answer.values():
            connection.close()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_all_meet(order: tuple[int, ...]):
    answers = meet(*((3, index) for index in order))
    assert [sorted(answers[order.index(i)]) for i in range(3)] == [[1, 2], [0], [0]]
    close(*answers)


def test_who_is_missing_is_told_to_all():
    answers = meet((4, 0), (4, 2), timeout_s=0.5)
    for answer in answers:
        assert isinstance(answer, watchdog.PeersMissing)
        assert str(answer).startswith("processes 1, 3 of 4 did not come within 0 s")


def test_without_process_0_that_is_said():
    [answer] = meet((2, 1), timeout_s=0.3)
    assert isinstance(answer, watchdog.PeersMissing)
    assert "process 0 did not answer at 127.0.0.1:" in str(answer)


def test_different_counts_are_an_error_to_all():
    for answer in meet((3, 0), (2, 1)):
        assert isinstance(answer, ValueError)
        assert "process 0 was started as one of 3 processes, and process 1 as one of 2" in str(
            answer
        )


def test_strangers_and_the_restarted_do_not_disturb():
    port = local.free_port()
    ready = threading.Thread(
        target=lambda: answers.extend(meet((3, 0), address=f"127.0.0.1:{port}"))
    )
    answers: list[dict[int, socket.socket] | Exception] = []
    ready.start()

    def connect(said: bytes) -> socket.socket:
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                connection = socket.create_connection(("127.0.0.1", port))
                connection.sendall(said)
                return connection

    stranger = connect(b"GET / HTTP/1.1\r\n\r\n")
    earlier = connect(json.dumps({"count": 3, "index": 1}).encode() + b"\n")
    earlier.close()
    close(*meet((3, 1), (3, 2), address=f"127.0.0.1:{port}"))
    ready.join()
    assert [len(answer) for answer in answers] == [2]
    close(*answers)
    stranger.close()


class Line:
    """What a process says while the other end of its connection, here in a test's hands, falls silent or goes."""

    def __init__(self, number: int, other: int, *, timeout_s: float = 100.0) -> None:
        here, self.end = socket.socketpair()
        self.watch = watchdog._Watch({other: here}, f"Process {number} of 4", timeout_s)
        self.watch.is_joined.set()
        self.said = threading.Event()
        self._here, self._lines = here, []
        self._looking = threading.Thread(target=self.watch.look)

    def write(self, text: str) -> None:  # as sys.stderr
        self._lines.append(text)
        self.said.set()

    def flush(self) -> None:
        pass

    def words(self, process: Callable[[], object]) -> str:
        """What it says until the other has done something and gone."""
        with self._here, self.end, contextlib.redirect_stderr(self):
            self._looking.start()
            process()
            self.end.close()
            self._looking.join()
        return "".join(self._lines)


def test_a_process_without_a_sign_of_life_is_named():
    line = Line(2, 0, timeout_s=0.1)

    def fall_silent() -> None:
        line.end.sendall(b"\n\n")
        assert line.said.wait(30)

    assert line.words(fall_silent).startswith(
        "Process 2 of 4: process 0 has given no sign of life for 0 s; after 0 s the job ends.\n"
    )


def test_a_process_that_has_gone_is_named_but_at_the_end():
    gone = "Process 0 of 4: process 3 has gone: see in its log why.\n"
    assert Line(0, 3).words(lambda: None) == gone
    line = Line(0, 3)
    assert line.words(line.watch.is_ending.set) == ""


def test_process_0_tells_all_who_is_lost():
    (here, there), line = socket.socketpair(), Line(0, 3)
    line.watch._connections[1] = here
    with here, there:
        told = "process 3 has gone: see in its log why"

        def hear() -> None:
            line.end.close()
            assert there.makefile().readline() == f"{told}\n"
            there.close()

        line.words(hear)
    line = Line(2, 0)
    assert f"Process 2 of 4: {told}.\n" in line.words(lambda: line.end.sendall(told.encode()))


# ---- processes ----------------------------------------------------------------------------------------------------

COUNT = 3
LIMIT_S = 10  # of heartbeats here
PATIENCE_S = 120  # a guard against a hang; nothing waits for it

# Like a stage between two collectives, for ever.
STAGE = f"""
import os, sys, threading
from launch import devices
joined = devices.processes(os.environ)
devices.start(joined, timeout_s=90, heartbeat_timeout_s={LIMIT_S})
import jax.numpy as jnp
from jax.experimental import multihost_utils
multihost_utils.sync_global_devices("all are here")
sys.stdout.write("ready\\n")
sys.stdout.flush()
COLLECTIVE = False
while True:
    if COLLECTIVE:
        multihost_utils.process_allgather(jnp.float32(0))
    threading.Event().wait(0.1)
"""


class Job:
    """Processes that run STAGE, and what they wrote after they had met."""

    def __init__(self, *, code: str = STAGE, coordinators: dict[int, str] | None = None):
        environments = local.job_environments(None, processes=COUNT, devices=1)
        self.address = environments[0]["MERGING_COORDINATOR"]
        for index, coordinator in (coordinators or {}).items():
            environments[index]["MERGING_COORDINATOR"] = coordinator
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", code],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for environment in environments
        ]
        for process in self.processes:
            assert any(line == "ready\n" for line in process.stdout), "it did not start"

    def ends(self, *, but: int) -> dict[int, tuple[int, str]]:
        """Exit code and last words of all but one, when they have ended."""
        return {
            index: (process.wait(PATIENCE_S), process.stdout.read())
            for index, process in enumerate(self.processes)
            if index != but
        }

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdout.close()


@pytest.fixture
def jobs() -> Iterator[Callable[..., Job]]:
    made: list[Job] = []

    def make(**arguments: object) -> Job:
        made.append(Job(**arguments))
        return made[-1]

    yield make
    for job in made:
        job.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "number", "has_collectives"),
    [
        (0, signal.SIGSTOP, False),
        (0, signal.SIGKILL, False),
        (1, signal.SIGSTOP, True),
        (1, signal.SIGKILL, True),
        (1, signal.SIGKILL, False),
    ],
)
def test_a_silent_process_ends_all_and_is_named(
    jobs, victim: int, number: int, has_collectives: bool
):
    code = STAGE.replace("COLLECTIVE = False", f"COLLECTIVE = {has_collectives}")
    job = jobs(code=code)
    job.processes[victim].send_signal(number)
    for returncode, words in job.ends(but=victim).values():
        assert returncode in (-signal.SIGABRT, exit_codes.BROKEN)
        if number == signal.SIGKILL:
            assert f"process {victim} has gone: see in its log why" in words
        else:
            assert (
                f"process {victim} has given no sign of life for 6 s; after 10 s the job" in words
            )
        if victim:  # jax's words
            assert "unhealthy (stopped sending heartbeats):\n1\n" in words


# In STAGE before all join: how one is lost that the others have met.
LOST = """
from launch import watchdog
meet = watchdog.meet
def met(*arguments, **named):
    connections = meet(*arguments, **named)
    if joined.index == VICTIM:
        sys.stdout.write("ready\\n")
        sys.stdout.flush()
        os.kill(os.getpid(), NUMBER)
    sys.stdout.write("ready\\n")
    sys.stdout.flush()
    return connections
watchdog.meet = met
devices.start("""


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "number"), [(0, signal.SIGSTOP), (1, signal.SIGKILL)])
def test_a_process_that_is_lost_while_all_join_is_named(jobs, victim: int, number: int):
    """jax waits for it until the time to initialize is over, and does not say for whom."""
    lost = LOST.replace("VICTIM", str(victim)).replace("NUMBER", str(int(number)))
    job = jobs(code=STAGE.replace("devices.start(", lost.strip()))
    for returncode, words in job.ends(but=victim).values():
        assert returncode == exit_codes.BROKEN
        assert f"process {victim} has" in words


@pytest.mark.slow
def test_a_process_that_is_cut_off_ends_all_and_is_named(monkeypatch):
    port = local.free_port()
    monkeypatch.setattr(local, "free_port", lambda: port)
    with proxy.Proxy(f"127.0.0.1:{port}") as line:
        job = Job(coordinators={2: line.address})
        try:
            line.cut()
            ended = job.ends(but=-1)
        finally:
            job.close()
    for index in (0, 1):
        assert "unhealthy (stopped sending heartbeats):\n2\n" in ended[index][1]
    assert "process 0 has given no sign of life" in ended[2][1]


@pytest.mark.slow
def test_a_process_that_never_comes_is_named_and_all_end():
    code = STAGE.replace("timeout_s=90", "timeout_s=5")
    environments = local.job_environments(dict(os.environ), processes=3, devices=1)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=each,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for each in (environments[0], environments[2])
    ]
    for process in processes:
        words = process.communicate(timeout=PATIENCE_S)[0]
        assert process.returncode == exit_codes.BROKEN
        assert "process 1 of 3 did not come within 5 s: see in their logs why" in words
