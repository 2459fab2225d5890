"""Processes of one job keep an eye on each other: none is missing when it begins, and none falls silent without being named.

jax's coordination service ends all processes when one sends no heartbeats any more, and mostly says which (measured with jax 0.10.2
and heartbeats of 10 s: 7 to 9.3 s after SIGSTOP). It says nothing of who has not come when the job begins, nor of who is lost
while processes join it, which then takes the whole time to initialize, nor that it is process 0 itself that has stopped or
gone. All this is said here, over a TCP connection from each process to process 0 at the coordinator's own port, made before jax takes
it: both sides give signs of life, and process 0 tells the others whom it has lost.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

from launch import exit_codes

# Seconds without a heartbeat after which a job ends. Shorter: a machine that is busy for a moment ends it. Longer: hundreds
# of chips wait for one that has gone.
HEARTBEAT_TIMEOUT_S = 60

_SIGNS = 10  # signs of life within that time
_PATIENCE = 0.6  # of that time: before jax ends this process, whose message then stands below ours
_TURN_S = 5.0  # within which one who has connected must say who it is
_HANG_UP_S = 1.0  # for all to hear the last word


class PeersMissing(Exception):
    """Not all processes of a job have come."""


def meet(coordinator: str, *, count: int, index: int, timeout_s: float) -> dict[int, socket.socket]:
    """Returns when all processes are here: connections by number, to all others in process 0, to process 0 in the others.

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
    return {0: _join(host.strip("[]"), int(port), count, index, deadline, timeout_s)}


def watch(
    connections: Mapping[int, socket.socket],
    *,
    count: int,
    index: int,
    timeout_s: float = HEARTBEAT_TIMEOUT_S,
) -> threading.Event:
    """Gives signs of life, and says so when none come, in threads until the process ends.

    Args:
      connections: as `meet` returned them.
      count, index: of the processes.
      timeout_s: without a sign of life after which the job ends.

    Returns:
      An event to be set when jax watches over the job too. Until then this process ends when another is lost.
    """
    watching = _Watch(connections, f"Process {index} of {count}", timeout_s)
    atexit.register(watching.is_ending.set)  # before jax lets all wait for one another, then go
    for work in (watching.give_signs, watching.look):
        threading.Thread(target=work, daemon=True).start()
    return watching.is_joined


# ---- the meeting ------------------------------------------------------------------------------------------------


def _gather(
    host: str, port: int, count: int, deadline: float, timeout_s: float
) -> dict[int, socket.socket]:
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
                for i in [i for i, each in present.items() if not _is_open(each)]:
                    present.pop(i).close()
        opened.pop_all()
    server.close()  # before the others are told: they bring jax to this port
    _tell(present.values(), {})
    return present


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


class _Watch:
    """Signs of life, one empty line each, and lines of who is lost."""

    def __init__(self, connections: Mapping[int, socket.socket], who: str, timeout_s: float):
        self.is_joined = threading.Event()  # jax watches too
        self.is_ending = threading.Event()  # this process, and so all
        self._connections = connections
        self._who = who
        self._timeout_s = timeout_s

    def give_signs(self) -> None:
        while True:
            self._send(b"\n")
            time.sleep(self._timeout_s / _SIGNS)

    def look(self) -> None:
        patience = self._timeout_s * _PATIENCE
        heard = dict.fromkeys(self._connections, time.monotonic())
        lost: set[int] = set()
        with selectors.DefaultSelector() as selector:
            for index, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, index)
            while heard:
                for key, _ in selector.select(self._timeout_s / _SIGNS):
                    index, words = key.data, _received(key.fileobj)
                    if words:
                        heard[index] = time.monotonic()
                        lost.discard(index)
                        self._pass_on(words)
                        continue
                    selector.unregister(key.fileobj)
                    del heard[index]
                    # Of those that go where one was lost, jax ends most.
                    if not lost and not self.is_ending.is_set():
                        self._tell(f"process {index} has gone: see in its log why")
                        self._end_unless_joined()
                    lost.add(index)
                silence = {index: time.monotonic() - at for index, at in heard.items()}
                for index in [i for i in silence if silence[i] > patience and i not in lost]:
                    lost.add(index)
                    self._tell(
                        f"process {index} has given no sign of life for {patience:.0f} s; after"
                        f" {self._timeout_s:.0f} s the job ends"
                    )
                if any(seconds > self._timeout_s for seconds in silence.values()):
                    self._end_unless_joined()

    def _pass_on(self, words: bytes) -> None:
        for line in filter(None, words.decode(errors="replace").split("\n")):
            self._say(line)

    def _tell(self, text: str) -> None:
        self._say(text)
        if 0 not in self._connections:  # this is process 0, and the only one that all hear
            self._send(f"{text}\n".encode())

    def _say(self, text: str) -> None:
        sys.stderr.write(f"{self._who}: {text}.\n")  # in one piece
        sys.stderr.flush()

    def _send(self, line: bytes) -> None:
        for connection in self._connections.values():
            with contextlib.suppress(OSError):  # who has gone is told by `look`
                connection.sendall(line)

    def _end_unless_joined(self) -> None:
        if not self.is_joined.is_set():
            self._hang_up()
            os._exit(exit_codes.BROKEN)  # the main thread is in jax, which waits

    def _hang_up(self) -> None:
        """Lets what was told arrive: the system drops it where a process ends with signs of the other side unread."""
        deadline = time.monotonic() + _HANG_UP_S
        for connection in self._connections.values():
            with contextlib.suppress(OSError):  # who has gone, or gives no answer
                connection.shutdown(socket.SHUT_WR)
                while (left := deadline - time.monotonic()) > 0:
                    connection.settimeout(left)
                    if not connection.recv(65536):
                        break


def _received(connection: socket.socket) -> bytes:
    """What has come; nothing where the other side has gone."""
    try:
        return connection.recv(65536)
    except OSError:
        return b""


def _named(indices: list[int]) -> str:
    return f"process{'es' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"
