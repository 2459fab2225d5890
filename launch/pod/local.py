"""Runs one command as several processes on this machine: as a pod to try things on, or as workers that share a study.

    python -m launch.pod.local --processes=2 --devices=4 -- python -m launch.merge --base=... --output=...
    python -m launch.pod.local --workers=2 -- python -m launch.study --study=quick --output=...

With --processes they are one job of so many virtual CPU devices each, and meet on loopback. With --workers the command is a study's: each
works for itself on cores of its own at its items of a phase, and a phase starts when the one before it is complete. (Steps of small models
gain next to nothing from a second core, so two workers take half the time of one.)

Each line of output is led by [i], the number of its process. When one process fails the others are ended at once, and
the exit code is not zero and the message names the one that failed first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from absl import app, flags

from launch import devices as device_start
from launch import exit_codes, phases

# Between SIGTERM and SIGKILL. jax.distributed takes SIGTERM for a notice of preemption and goes on, so most processes
# need the second; a shorter grace would cut the last lines of those that do not.
GRACE_S = 2.0

_PROCESSES = flags.DEFINE_integer("processes", 2, "How many processes are one job.", lower_bound=1)
_WORKERS = flags.DEFINE_integer(
    "workers", None, "In place of --processes: how many share a study.", lower_bound=1
)
_DEVICES = flags.DEFINE_integer(
    "devices",
    None,
    "Virtual CPU devices of each process; default 4, and 1 of a worker.",
    lower_bound=1,
)
_TIMEOUT_S = flags.DEFINE_float(
    "timeout_s", None, "End all after so many seconds, of workers in each phase; default never."
)


class ProcessFailed(RuntimeError):
    """One process of a job failed, or the job took too long.

    Attributes:
      index: the process that failed first.
      returncode: its exit code, negative for a signal; None where time ran out.
      output: all that it wrote.
    """

    def __init__(self, message: str, *, index: int, returncode: int | None, output: str):
        super().__init__(message)
        self.index = index
        self.returncode = returncode
        self.output = output


@dataclasses.dataclass(kw_only=True)
class _Child:
    """A running process and the threads that watch it."""

    process: subprocess.Popen[str]
    reader: threading.Thread
    lines: list[str]

    @property
    def output(self) -> str:
        return "".join(self.lines)


def run_local(
    command: Sequence[str],
    *,
    processes: int,
    devices: int,
    timeout_s: float | None,
    env: Mapping[str, str] | None = None,
    echo: Callable[[str], None] | None = None,
) -> list[str]:
    """Runs `command` as one job of several processes; returns what each wrote (stdout and stderr together).

    Args:
      command: program and arguments, the same for all; each finds its number in MERGING_PROCESS_INDEX.
      processes: how many.
      devices: virtual CPU devices of each.
      timeout_s: when to end a job that hangs; None never does.
      env: the environment, default this process's own.
      echo: receives each line as it comes, led by [i]; default stdout.

    Raises:
      ProcessFailed: when a process exits with another code than 0, or time runs out. None is left running.
    """
    environments = job_environments(env, processes=processes, devices=devices)
    return _run(
        [command] * processes,
        environments,
        cores=[None] * processes,
        timeout_s=timeout_s,
        echo=echo or _print_line,
    )


def run_workers(
    command: Sequence[str],
    *,
    workers: int,
    devices: int = 1,
    timeout_s: float | None = None,
    env: Mapping[str, str] | None = None,
    echo: Callable[[str], None] | None = None,
) -> None:
    """Runs a study's phases in their order, each by so many workers on cores of their own; arguments and errors as of `run_local`.

    Args:
      command: of launch.study; told the phase and the worker by flags behind it.
      workers: how many; each knows nothing of the others.
      timeout_s: of each phase.
    """
    environment = _environment(env, devices=devices)
    for phase in phases.PHASES:
        number = phases.workers_of(phase, workers)
        _run(
            [[*command, *phases.flags_of(phase, worker, workers)] for worker in range(number)],
            [environment] * number,
            cores=shares(number),
            timeout_s=timeout_s,
            echo=echo or _print_line,
        )


def shares(number: int) -> list[set[int] | None]:
    """This process's cores for each of so many, as equal as can be; None (all) where the system can't bind, or has too few."""
    if not hasattr(os, "sched_setaffinity"):
        return [None] * number
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < number:
        return [None] * number
    return [
        set(cores[i * len(cores) // number : (i + 1) * len(cores) // number]) for i in range(number)
    ]


def job_environments(
    env: Mapping[str, str] | None, *, processes: int, devices: int
) -> list[dict[str, str]]:
    """The environment of each process of a job on this machine."""
    common = _environment(env, devices=devices) | {
        "MERGING_COORDINATOR": f"127.0.0.1:{free_port()}",
        "MERGING_PROCESS_COUNT": str(processes),
    }
    return [common | {"MERGING_PROCESS_INDEX": str(index)} for index in range(processes)]


def _environment(env: Mapping[str, str] | None, *, devices: int) -> dict[str, str]:
    common = dict(os.environ if env is None else env)
    common |= device_start.cpu_environment(common, devices=devices)
    # Else a process that is killed takes its last lines with it.
    return common | {"PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(argv: Sequence[str]) -> None:
    command = argv[1:]
    if not command:
        raise app.UsageError("give the command after --")
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(exit_codes.PREEMPTED)
    )  # so that `finally` runs
    timeout_s = _TIMEOUT_S.value
    try:
        if _WORKERS.value is not None:
            run_workers(
                command, workers=_WORKERS.value, devices=_DEVICES.value or 1, timeout_s=timeout_s
            )
        else:
            run_local(
                command,
                processes=_PROCESSES.value,
                devices=_DEVICES.value or 4,
                timeout_s=timeout_s,
            )
    except ProcessFailed as failure:
        print(failure, file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        print(f"{command[0]} can't be started: {error}", file=sys.stderr)
        sys.exit(1)


# ---- processes at once ------------------------------------------------------------------------------------------


def _run(
    commands: Sequence[Sequence[str]],
    environments: Sequence[Mapping[str, str]],
    *,
    cores: Sequence[set[int] | None],
    timeout_s: float | None,
    echo: Callable[[str], None],
) -> list[str]:
    """What each of them wrote, when all have ended well."""
    ended: queue.Queue[int] = queue.Queue()
    children: list[_Child] = []
    try:
        for index, how in enumerate(zip(commands, environments, cores, strict=True)):
            children.append(_start(index, *how, echo=echo, ended=ended))
        _wait(children, ended, timeout_s=timeout_s)
    finally:
        _end([child.process for child in children])
        for child in children:
            child.reader.join(GRACE_S)  # a grandchild in another session may hold the pipe open
    return [child.output for child in children]


def _start(
    index: int,
    command: Sequence[str],
    environment: Mapping[str, str],
    cores: set[int] | None,
    *,
    echo: Callable[[str], None],
    ended: queue.Queue[int],
) -> _Child:
    with _bound_to(cores):
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a group of its own, so that what it has started ends with it
        )
    lines: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        with process.stdout as stream:
            for line in stream:
                lines.append(line)
                echo(f"[{index}] {line.rstrip()}")

    def wait() -> None:
        process.wait()
        ended.put(index)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    threading.Thread(target=wait, daemon=True).start()
    return _Child(process=process, reader=reader, lines=lines)


@contextlib.contextmanager
def _bound_to(cores: set[int] | None) -> Iterator[None]:
    """What this thread starts meanwhile runs on these cores only, and XLA makes as many threads as there are."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _wait(children: Sequence[_Child], ended: queue.Queue[int], *, timeout_s: float | None) -> None:
    """Returns when all have exited with 0; raises as soon as one has not, or time is up."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    running = set(range(len(children)))
    while running:
        try:
            index = ended.get(
                timeout=None if deadline is None else max(0.0, deadline - time.monotonic())
            )
        except queue.Empty:
            index = min(running)
            raise _failed(
                children,
                index,
                None,
                f"after {timeout_s} s still running: {_named(sorted(running))}",
            ) from None
        returncode = children[index].process.returncode
        if returncode:
            children[index].reader.join(GRACE_S)
            raise _failed(
                children, index, returncode, f"process {index} failed: {_how(returncode)}"
            )
        running.discard(index)


def _failed(
    children: Sequence[_Child], index: int, returncode: int | None, message: str
) -> ProcessFailed:
    output = children[index].output
    message = f"{message}; all {len(children)} were ended. Last lines of process {index}:\n"
    message += "".join(children[index].lines[-20:])
    return ProcessFailed(message, index=index, returncode=returncode, output=output)


def _end(running: Sequence[subprocess.Popen[str]]) -> None:
    """Ends all process groups: asked first, then killed."""
    alive = [process for process in running if process.poll() is None]
    _signal(alive, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    for process in alive:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    _signal(
        alive, signal.SIGKILL
    )  # groups, since what an ended process has started may have ignored SIGTERM
    for process in alive:
        process.wait()


def _signal(processes: Sequence[subprocess.Popen[str]], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def _print_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")  # in one piece: `print` of two threads mixes lines
    sys.stdout.flush()


def _how(returncode: int) -> str:
    if returncode < 0:
        return f"signal {signal.Signals(-returncode).name}"
    return f"exit code {returncode}"


def _named(indices: Sequence[int]) -> str:
    return f"process{'es' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"


if __name__ == "__main__":
    app.run(main)
