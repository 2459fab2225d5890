"""Bytes of a file by range, on local disk and object storage alike.

What it promises: bytes go straight into the caller's buffer; a file that vanished, shrank or was
changed since it was opened is an error that names it, never other bytes; reading is thread-safe
and lets go of the GIL.

`gs://` paths work wherever a local one does. On local disk all threads share one file descriptor and
read by offset (`preadv`): a handle for every thread would be threads x shards x checkpoints,
8 x 30 x 9 = 2160 for one merge, twice the usual limit of 1024. From object storage a read is one request for exactly
those bytes: its clients' file handles read ahead, up to 256 MiB each.

Writing is by offset too, from any thread and in any order: on local disk at once (`pwrite`), to object
storage, which takes bytes one after another only, as soon as what comes before has arrived; the object is there once it
is closed.

Retries are the storage clients' (see `gcs`). Whether a remote object is still the one that was opened is asked once, by `check_unchanged`: at every read it would
cost a round trip.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import re
import stat
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
from etils import epath

from merging.checkpoints.format import CheckpointError

# What fsspec, and so epath, takes for gs://; imported by the first such path.
for _name in ("gs", "gcs"):
    fsspec.register_implementation(
        _name,
        "merging.checkpoints.gcs.FileSystem",
        clobber=True,
        errtxt="gs:// takes gcsfs: pip install 'merging-at-scale[gcs]'",
    )

# A look at the file's size, time and inode after every read would double the calls that give up and take back Python's
# lock, of which a merge's workers make ten thousand a second. Whoever commits calls `check_unchanged` first, so a change
# between two looks can stop a run late, but never goes unseen.
SECONDS_BETWEEN_LOOKS = 0.02

# What the system says of a path that leads to no file, rather than of a disk that fails.
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)

_VANISHED = "{}: the file vanished since it was opened; put it back and run again"


class ByteSource:
    """One file, open for reading by range. Thread-safe.

    Attributes:
      path: as given.
      size: in bytes, when opened.
      mtime_ns: modification time when opened, in ns (whole seconds on object storage).

    Raises CheckpointError where there is no such file or it is not a regular one.
    """

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)
        self._name = os.fspath(self.path)
        self._handles = contextlib.ExitStack()
        self._lock = threading.Lock()  # guards _handles
        self._descriptor: int | None = None
        self._identity: tuple[int, int, int] | None = None
        self._next_look = 0.0
        try:
            if is_local(self.path):
                self._open_local()
            else:
                found = self.path.stat()
                self.size, self.mtime_ns = found.length, found.mtime * 10**9
                self._version = remote_version(self.path)
        except OSError as error:
            is_missing = isinstance(error, FileNotFoundError)  # of gcsfs, without a number
            if not is_missing and error.errno not in _NO_FILE:
                raise
            reason = "no such file" if is_missing else error.strerror
            raise CheckpointError(f"{self._name}: {reason}; check the path") from None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` (writable bytes, contiguous) with the bytes from `offset` (bytes) on.

        Raises CheckpointError where the file ends earlier or is not the one that was opened;
        OSError, with the file's name, where the disk fails.
        """
        try:
            if self._descriptor is None:
                count = read_remote(self.path, offset, buffer)
            else:
                count = self._read_local(offset, buffer)
                now = time.monotonic()
                if count < len(buffer) or now >= self._next_look:
                    self._next_look = now + SECONDS_BETWEEN_LOOKS
                    self._check_unchanged()  # after the read: a change before or during it is seen
        except FileNotFoundError:
            raise CheckpointError(_VANISHED.format(self._name)) from None
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), self._name) from error
        if count < len(buffer):
            raise CheckpointError(
                f"{self._name}: no bytes from {offset + count} on, wanted {offset} to "
                f"{offset + len(buffer)}; the file is truncated: fetch or write it again"
            )

    def check_unchanged(self) -> None:
        """Raises as `read_into` does if the file is not the one that was opened. After the last read, this says that all reads
        were of one file."""
        try:
            if self._descriptor is not None:
                self._check_unchanged()
            elif remote_version(self.path) != self._version:
                raise CheckpointError(
                    f"{self._name}: the object was written again since it was opened; inputs must stay as they are during"
                    " a merge: run again once nothing writes to it"
                )
        except FileNotFoundError:
            raise CheckpointError(_VANISHED.format(self._name)) from None

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on. Takes that memory first. Errors as in `read_into`."""
        result = bytearray(count)
        self.read_into(offset, memoryview(result))
        return bytes(result)

    def close(self) -> None:
        """Closes every thread's handle. Safe to call twice; no reads may be under way or follow."""
        with self._lock:
            self._handles.close()
        if self._descriptor is not None:
            self._descriptor = -1  # any later read is EBADF, not another file's bytes

    def _open_local(self) -> None:
        # Looked at before it is opened: opening a pipe would wait for its writer.
        if not stat.S_ISREG(os.stat(self._name).st_mode):
            raise CheckpointError(f"{self._name}: not a regular file; give the path of a file")
        handle = self._handles.enter_context(self.path.open("rb"))
        self._descriptor = handle.fileno()
        found = os.fstat(self._descriptor)
        self.size, self.mtime_ns = found.st_size, found.st_mtime_ns
        self._identity = (found.st_size, found.st_mtime_ns, found.st_ino)

    def _read_local(self, offset: int, buffer: memoryview) -> int:
        return read_at(self._descriptor, offset, buffer)

    def _check_unchanged(self) -> None:
        found = os.stat(self._name)
        identity = (found.st_size, found.st_mtime_ns, found.st_ino)
        if identity == self._identity:
            return
        changes = [
            f"{what} was {was}, is {now}"
            for what, was, now in zip(
                ("size (bytes)", "modification time (ns)", "inode"),
                self._identity,
                identity,
                strict=True,
            )
            if was != now
        ]
        raise CheckpointError(
            f"{self._name}: the file changed since it was opened: {'; '.join(changes)}; inputs "
            "must stay as they are during a merge: run again once nothing writes to it"
        )


def small_file(path: epath.PathLike, limit: int = 4 << 20) -> bytes:
    """A file's bytes, whole. Raises CheckpointError where it is larger than `limit` bytes, no regular file, or a link that
    leads out of its folder."""
    if leads_out(path):
        raise CheckpointError(
            f"{os.fspath(path)} is a link to {os.path.realpath(path)}: a checkpoint is read from its own folder only; copy"
            " it with its files"
        )
    with contextlib.closing(ByteSource(path)) as source:
        if source.size > limit:
            raise CheckpointError(
                f"{os.fspath(path)}: {source.size} bytes, wanted at most {limit}; do not trust this checkpoint"
            )
        return source.read(0, source.size)


def is_own_file(path: epath.PathLike) -> bool:
    """Whether this is a regular file, and no link out of its folder."""
    if not is_local(path):
        return epath.Path(path).is_file()
    return os.path.isfile(path) and not leads_out(path)  # to epath, pipes are files


def leads_out(path: epath.PathLike) -> bool:
    """Whether a file is a symbolic link out of its folder.

    A snapshot in the Hugging Face hub's cache is a folder of links to ../../blobs; those are fine.
    """
    if not is_local(path) or not os.path.islink(path):
        return False
    home = os.path.realpath(os.path.dirname(os.path.abspath(os.fspath(path))))
    allowed = {home}
    snapshots = os.path.dirname(home)
    if os.path.basename(snapshots) == "snapshots":
        allowed.add(os.path.join(os.path.dirname(snapshots), "blobs"))
    return os.path.dirname(os.path.realpath(path)) not in allowed


def is_local(path: epath.PathLike) -> bool:
    """True for this machine's file systems (mounted ones too), False for `gs://` and the like."""
    return "://" not in os.fspath(path)


def retried_requests() -> int:
    """Requests to object storage that failed and were made again, of this process."""
    gcs = sys.modules.get("merging.checkpoints.gcs")  # else there was none
    return 0 if gcs is None else gcs.retried()


def read_at(descriptor: int, offset: int, buffer: memoryview) -> int:
    """Fills `buffer` from a local file; bytes read, fewer than wanted only at its end."""
    done, wanted = 0, len(buffer)
    while done < wanted:
        count = os.preadv(descriptor, [buffer[done:] if done else buffer], offset + done)
        if not count:
            break
        done += count
    return done


def read_remote(path: epath.PathLike, offset: int, buffer: memoryview) -> int:
    """Fills `buffer` from an object, by one request; bytes read, fewer than wanted only at its end.

    Raises OSError for what the storage client gave up on.
    """
    system, name = _remote(path)
    if not len(buffer):
        return 0
    with _remote_errors(path):
        data = system.cat_file(name, start=offset, end=offset + len(buffer))
    buffer[: len(data)] = data
    return len(data)


def remote_version(path: epath.PathLike) -> str:
    """What changes whenever an object is written."""
    system, name = _remote(path)
    with _remote_errors(path):
        system.invalidate_cache(name)
        found = system.info(name)
    return str([found.get(key) for key in ("generation", "etag", "size", "mtime")])


def list_remote(folder: epath.PathLike) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path from the folder, what the storage says of it) of all objects below, by one request for a thousand."""
    system, name = _remote(folder)
    with _remote_errors(folder):
        system.invalidate_cache(name)
        found = system.find(name, detail=True)
    for path, details in found.items():
        relative = path.removeprefix(f"{name.rstrip('/')}/")
        if relative != path and not path.endswith("/"):  # what consoles put for a folder
            yield relative, details


def _remote(path: epath.PathLike) -> tuple[Any, str]:
    """The storage client for a path, one for the process, and the path's name in it."""
    return fsspec.core.url_to_fs(os.fspath(path))


@contextlib.contextmanager
def _remote_errors(path: epath.PathLike) -> Iterator[None]:
    """Storage clients have exceptions of their own, which become OSErrors."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _CLIENTS or isinstance(error, OSError):
            raise
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}", os.fspath(path)) from error


_CLIENTS = ("gcsfs", "aiohttp", "google")


def absolute(path: epath.PathLike) -> epath.Path:
    """The same place from whatever folder one works in: Orbax refuses relative paths, only when it writes."""
    return epath.Path(os.path.abspath(path) if is_local(path) else path)


# Bytes after which a local disk is told to begin writing them. Left alone, Linux keeps up to a tenth of memory dirty and
# then stalls the writer, or the final sync, for all of it. Smaller: more calls for nothing. Larger: longer bursts, for
# which the next writes wait (64 MiB: four times as long as 16), and the last, which nothing overlaps, grows.
_WRITEBACK_BYTES = 16 << 20


class ByteSink:
    """One file being written by ranges, each byte once. Thread-safe; its OSErrors carry its name."""

    def __init__(self, path: epath.PathLike, *, is_kept: bool = False):
        """Creates the file, or empties it; `is_kept`: one that is there stays as it is, and can be read.

        An object in a bucket can't be changed: one that is kept stays while nothing is written to it, and is put anew, with
        what is kept of it, where something is.
        """
        self.path = epath.Path(path)
        self.nbytes = 0  # written, kept, or waiting for what comes before
        self._lock = threading.Lock()
        self._handle: Any = None
        self._descriptor: int | None = None
        self._dirty: list[int] = []  # start and end of what the disk was not yet told to write
        self._kept: list[tuple[int, int]] = []  # remote: offset and bytes of an object that stays
        self._waiting: dict[int, bytes] = {}  # remote: by offset, what came too early
        self._at = 0  # remote: how far the object is written
        self._is_local = is_local(self.path)
        with naming(self.path):
            if self._is_local:
                # etils knows no mode that leaves a file as it is.
                is_kept = is_kept and self.path.exists()
                self._handle = open(self.path, "r+b") if is_kept else self.path.open("wb")
                self._descriptor = self._handle.fileno()
            elif not is_kept:
                self._begin_object()

    def write(self, offset: int, data: memoryview) -> None:
        """Puts bytes at an offset (bytes)."""
        with naming(self.path):
            if not self._is_local:
                with self._lock:
                    if self._handle is None:
                        self._begin_object()
                    self._append(offset, bytes(data))
                    self.nbytes += len(data)
                return
            done = 0
            while done < len(data):
                done += os.pwrite(self._descriptor, data[done:] if done else data, offset + done)
        with self._lock:
            self.nbytes += len(data)
            start, end = self._dirty or (offset, offset)
            start, end = min(start, offset), max(end, offset + len(data))
            if end - start < _WRITEBACK_BYTES:
                self._dirty = [start, end]
                return
            self._dirty = []
        start_writeback(self._descriptor, start, end - start)

    def keep(self, offset: int, data: memoryview) -> None:
        """Takes over bytes that are in the file already."""
        with self._lock, naming(self.path):
            if self._handle is None:
                self._kept.append((offset, len(data)))
            elif not self._is_local:
                self._append(offset, bytes(data))
            self.nbytes += len(data)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` from a kept file, with zeros beyond its end."""
        with naming(self.path):
            if self._is_local:
                done = read_at(self._descriptor, offset, buffer)
            else:
                done = read_remote(self.path, offset, buffer)
        buffer[done:] = bytes(len(buffer) - done)

    def close(self) -> None:
        """The bytes are on disk when it returns; an object is there."""
        with naming(self.path):
            assert not self._waiting, f"{self.path} lacks the bytes from {self._at} on"
            if self._handle is None:
                return  # an object of which all is kept
            if self._is_local:
                os.fsync(self._descriptor)
                self._descriptor = -1  # any later write is EBADF, not into another file
            self._handle.close()
            if not self._is_local:
                self._handle.commit()
                self._handle = None

    def abandon(self) -> None:
        """Closes the file, whatever state it is in, which stays; an object does not appear, and one that was there stays."""
        with contextlib.suppress(OSError), naming(self.path):  # the disk may be what failed
            if self._is_local:
                self._handle.close()
            elif self._handle is not None:
                handle, self._handle = self._handle, None
                handle.discard()

    def _begin_object(self) -> None:
        system, name = _remote(self.path)
        self._handle = system.open(name, "wb", autocommit=False)
        for offset, nbytes in self._kept:
            for start in range(offset, offset + nbytes, _COPIED_BYTES):
                data = bytearray(min(_COPIED_BYTES, offset + nbytes - start))
                read_remote(self.path, start, memoryview(data))
                self._append(start, bytes(data))

    def _append(self, offset: int, data: bytes) -> None:
        self._waiting[offset] = data
        while self._at in self._waiting:
            chunk = self._waiting.pop(self._at)
            self._handle.write(chunk)
            self._at += len(chunk)


_COPIED_BYTES = 8 << 20  # of an object, at once


def put_file(path: epath.Path, content: bytes) -> None:
    """A small file, whole; on disk when it returns."""
    with naming(path), path.open("wb") as handle:
        handle.write(content)
        if is_local(path):
            handle.flush()
            os.fsync(handle.fileno())


def put_whole(path: epath.Path, content: bytes) -> None:
    """A small file in place of what is there, at once: whoever looks finds the old one or the new one."""
    if not is_local(path):
        put_file(path, content)  # an object appears when all of it has come
        return
    # Of a name of its own: of two that put the same file neither finds the other's bytes in it, or finds it gone.
    temporary = path.parent / f"{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        put_file(temporary, content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_files(folder: epath.Path) -> Iterator[epath.Path]:
    """What `put_whole`s that were killed left in a folder, or in those right in it."""
    for pattern in ("*.tmp", "*/*.tmp"):
        yield from (path for path in folder.glob(pattern) if _TEMPORARY.search(path.name))


_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp$")


class LinesFile:
    """A text file that grows by lines. Buckets can't add to an object: there it is put anew, whole, by every flush."""

    def __init__(self, path: epath.Path, text: str = ""):
        """Begins with a text, in place of what is there."""
        self._path = path
        self._text = text
        path.write_text(text)
        self._handle = path.open("a") if is_local(path) else None

    def write(self, line: str) -> None:
        """Adds a line, with its end."""
        if self._handle is not None:
            self._handle.write(line)
        else:
            self._text += line

    def flush(self) -> None:
        """What was written is to be seen by others."""
        if self._handle is not None:
            self._handle.flush()
        else:
            put_file(self._path, self._text.encode())

    def __enter__(self) -> LinesFile:
        return self

    def __exit__(self, *error: Any) -> None:
        self.flush()
        if self._handle is not None:
            self._handle.close()


def sync(path: epath.PathLike) -> None:
    """A local file or folder is on disk when it returns; object storage has no need of it."""
    if is_local(path):
        with naming(path):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def naming(path: epath.PathLike) -> Iterator[None]:
    """Errors of the disk, or of the storage client, get the name of the file."""
    try:
        with _remote_errors(path):
            yield
    except OSError as error:
        message = error.strerror or str(error)
        raise OSError(error.errno, message, os.fspath(path)) from error


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Linux's system call, which Python has no name for; None elsewhere."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


def start_writeback(descriptor: int, offset: int, nbytes: int) -> None:
    """Has the kernel begin to write a range of a local file to its disk. A hint: only fsync makes sure, and tells errors.

    fdatasync in a second thread would do the same, but locks the file against further writes meanwhile.
    """
    function = _sync_file_range()
    if function is not None:
        function(descriptor, offset, nbytes, 2)  # SYNC_FILE_RANGE_WRITE
