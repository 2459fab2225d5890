"""Processes of one job keep an eye on each other: none is missing when it begins, and none falls silent without being named.

jax's coordination service ends all processes when one sends no heartbeats any more, and says which (measured with jax 0.10.2 and
heartbeats of 10 s: 7 to 9.3 s after SIGSTOP, at once where a connection breaks). That is the watchdog. It is silent on two things,
which are said here, over a TCP connection from each process to process 0 at the coordinator's own port, made before jax takes it:
who has not come when the job begins, and that it is process 0 itself that has stopped.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

# Seconds without a heartbeat after which a job ends. Shorter: a machine that is busy for a moment ends it. Longer: hundreds
# of chips wait for one that has gone.
HEARTBEAT_TIMEOUT_S = 60

_SIGNS = 10  # signs of life within that time
_PATIENCE = 0.6  # of that time: before jax ends this process, whose message then stands below ours
_TURN_S = 5.0  # within which one who has connected must say who it is


class PeersMissing(Exception):
    """Not all processes of a job have come."""


def meet(coordinator: str, *, count: int, index: int, timeout_s: float) -> list[socket.socket]:
    """Returns when all processes are here: connections to all others in process 0, to process 0 in the others.

    Args:
      coordinator: host:port of process 0; nothing may listen there, and nothing does when this returns.
      count: processes.
      index: of this one.
      timeout_s: how long to wait.

    Raises:
      PeersMissing: with the numbers of those that did not come.
      ValueError: where processes were started with different counts.
    """
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + timeout_s
    if index == 0:
        return _gather(host, int(port), count, deadline, timeout_s)
    return [_join(host.strip("[]"), int(port), count, index, deadline, timeout_s)]


def watch(
    connections: list[socket.socket],
    *,
    count: int,
    index: int,
    timeout_s: float = HEARTBEAT_TIMEOUT_S,
) -> None:
    """Gives signs of life (process 0), or says so when none come (the others), in a thread until the process ends."""
    work = _give_signs if index == 0 else _await_signs
    who = f"Process {index} of {count}"
    threading.Thread(target=work, args=(connections, who, timeout_s), daemon=True).start()


# ---- the meeting ------------------------------------------------------------------------------------------------


def _gather(
    host: str, port: int, count: int, deadline: float, timeout_s: float
) -> list[socket.socket]:
    present: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as opened:  # closes all where it fails
        server = opened.enter_context(_listen(host, port, deadline))
        while len(present) < count - 1:
            try:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                connection = opened.enter_context(server.accept()[0])
            except TimeoutError:
                missing = [i for i in range(1, count) if i not in present]
                message = (
                    f"{_named(missing)} of {count} did not come within {timeout_s:.0f} s: see in their logs why, and"
                    " start all again"
                )
                _tell(present.values(), {"missing": message})
                raise PeersMissing(message) from None
            said = _heard(connection)
            if said is None:  # not one of ours
                connection.close()
                continue
            if said["count"] != count:
                message = (
                    f"process 0 was started as one of {count} processes, and process {said['index']} as one of"
                    f" {said['count']}: give all the same --process_count"
                )
                _tell([*present.values(), connection], {"differs": message})
                raise ValueError(message)
            before = present.get(said["index"])
            if before is not None:  # it was started again
                before.close()
            present[said["index"]] = connection
            if len(present) == count - 1:
                present = {i: each for i, each in present.items() if _is_open(each)}
        opened.pop_all()
    server.close()  # before the others are told: they bring jax to this port
    _tell(present.values(), {})
    return list(present.values())


def _join(
    host: str, port: int, count: int, index: int, deadline: float, timeout_s: float
) -> socket.socket:
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection((host, port), timeout=_TURN_S)
        except OSError:  # not there yet, or not known yet to the name service
            time.sleep(0.2)
            continue
        with contextlib.ExitStack() as opened:
            opened.enter_context(connection)
            _tell([connection], {"count": count, "index": index})
            answer = _heard(connection, max(0.0, deadline - time.monotonic()) + _TURN_S)
            if answer is not None:
                if "missing" in answer:
                    raise PeersMissing(answer["missing"])
                if "differs" in answer:
                    raise ValueError(answer["differs"])
                opened.pop_all()
                return connection
        time.sleep(0.2)  # process 0 was started again, or an earlier job is still there
    raise PeersMissing(
        f"process 0 did not answer at {host}:{port} within {timeout_s:.0f} s: see in its log why, and start all again"
    )


def _listen(host: str, port: int, deadline: float) -> socket.socket:
    is_local = host in ("127.0.0.1", "localhost")
    while True:
        try:
            if is_local:
                return socket.create_server((host, port), backlog=1024)
            if socket.has_dualstack_ipv6():
                return socket.create_server(
                    ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
                )
            return socket.create_server(("", port), backlog=1024)
        except OSError as error:  # by an earlier job that is just ending, perhaps
            if time.monotonic() > deadline:
                raise PeersMissing(f"process 0 can't listen at port {port}: {error}") from error
            time.sleep(0.2)


def _is_open(connection: socket.socket) -> bool:
    """Whether the other side, which says no more for now, still waits."""
    connection.setblocking(False)
    try:
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _tell(connections: Iterable[socket.socket], said: Mapping[str, Any]) -> None:
    for connection in connections:
        connection.settimeout(_TURN_S)
        with contextlib.suppress(OSError):  # who has gone since is noticed by its heartbeats
            connection.sendall(json.dumps(said).encode() + b"\n")


def _heard(connection: socket.socket, timeout_s: float = _TURN_S) -> dict[str, Any] | None:
    """One line of JSON; None where something else comes, or nothing."""
    connection.settimeout(timeout_s)
    line = b""
    with contextlib.suppress(OSError, ValueError):
        while not line.endswith(b"\n") and len(line) < 4096:
            byte = connection.recv(1)  # no more: signs of life come behind it
            if not byte:
                return None
            line += byte
        said = json.loads(line)
        return said if isinstance(said, dict) else None
    return None


# ---- afterwards -------------------------------------------------------------------------------------------------


def _give_signs(connections: list[socket.socket], who: str, timeout_s: float) -> None:
    while connections:
        for connection in list(connections):
            try:
                connection.sendall(b".")
            except OSError:
                connections.remove(connection)
        time.sleep(timeout_s / _SIGNS)


def _await_signs(connections: list[socket.socket], who: str, timeout_s: float) -> None:
    [connection] = connections
    patience = timeout_s * _PATIENCE
    connection.settimeout(patience)
    while True:
        try:
            if not connection.recv(4096):
                return  # it has ended; jax says how
        except TimeoutError:
            sys.stderr.write(
                f"{who}: process 0 has given no sign of life for {patience:.0f} s; after {timeout_s:.0f} s the job ends.\n"
            )
            sys.stderr.flush()
        except OSError:
            return


def _named(indices: list[int]) -> str:
    return f"process{'es' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"
