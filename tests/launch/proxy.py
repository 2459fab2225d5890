"""A line between a process and its coordinator that can be cut."""

from __future__ import annotations

import contextlib
import select
import socket
import threading


class Proxy:
    """Hands bytes on between a process and its coordinator, until it is cut. Use as a context manager.

    Args:
      target: host:port of the coordinator.

    Attributes:
      address: host:port that the process is told instead.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._server.getsockname())
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._is_cut = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def cut(self) -> None:
        """Whatever comes later is swallowed: nobody is told that the line is dead."""
        self._is_cut.set()

    def drop(self) -> None:
        """Closes the line on both sides, who see it at once; nobody gets through any more."""
        self._is_cut.set()
        self._close()

    def _close(self) -> None:
        for each in (self._server, *(end for pair in self._pairs for end in pair)):
            with contextlib.suppress(OSError):  # closed already
                each.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits there
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._server.accept()
                try:
                    there = socket.create_connection(self._target)
                except ConnectionRefusedError:
                    here.close()
                    continue
                self._pairs.append((here, there))
                threading.Thread(target=self._hand_on, args=(here, there), daemon=True).start()

    def _hand_on(self, here: socket.socket, there: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            while True:
                for ready in select.select([here, there], [], [])[0]:
                    data = ready.recv(65536)
                    if not data:
                        here.close()
                        there.close()
                        return
                    if not self._is_cut.is_set():
                        (there if ready is here else here).sendall(data)
