"""The files of a folder, known when it is opened: read by range, and seen to stay as they are.

What it promises: nothing outside the folder is read (a symbolic link in it is refused), and a file that vanished, shrank or
changed since the folder was opened is an error that names it. A checkpoint in chunks has more files than a process may
hold open, so each read opens its file anew; its identity is looked at in the same breath.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator

from etils import epath

from merging.checkpoints.format import CheckpointError
from merging.checkpoints.storage import is_local, list_remote, read_at, read_remote


@dataclasses.dataclass(frozen=True)
class Identity:
    """What tells whether a file is the one that was seen: size in bytes, modification time in ns, inode (in a bucket the
    generation, another number whenever an object is written)."""

    size: int
    mtime_ns: int
    inode: int


@dataclasses.dataclass(frozen=True)
class Blob:
    """Some bytes of a file of the folder; or the bytes themselves, where a database holds them beside its keys."""

    nbytes: int
    file: str = ""
    offset: int = 0
    inline: bytes | None = None

    def part(self, start: int, nbytes: int) -> Blob:
        """Some of its bytes, from `start` on."""
        if self.inline is not None:
            return Blob(nbytes, inline=self.inline[start : start + nbytes])
        return Blob(nbytes, self.file, self.offset + start)


class Folder:
    """A folder, open for reading. Thread-safe.

    Attributes:
      path: as given.
      files: identity by path from the folder, `/` between parts, sorted.

    Raises CheckpointError where there is a symbolic link, or anything but files and folders.
    """

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)
        self.is_local = is_local(self.path)
        self._root = os.fspath(self.path)
        self.files = dict(sorted(self._scan()))

    def read(self, blob: Blob) -> bytes:
        """All bytes of a blob. Takes that memory first, so the caller bounds it."""
        result = bytearray(blob.nbytes)
        self.read_into(blob, 0, memoryview(result))
        return bytes(result)

    def read_into(self, blob: Blob, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` with the blob's bytes from `offset` on.

        Raises CheckpointError where the file ends earlier or is not the one that was seen; OSError, with the file's
        name, where the disk fails.
        """
        assert 0 <= offset and offset + len(buffer) <= blob.nbytes, "a read beyond the blob"
        if blob.inline is not None:
            buffer[:] = blob.inline[offset : offset + len(buffer)]
            return
        name = f"{self._root}/{blob.file}"
        try:
            if self.is_local:
                done = self._read_local(name, blob, offset, buffer)
            else:
                done = read_remote(self.path / blob.file, blob.offset + offset, buffer)
        except FileNotFoundError:
            raise CheckpointError(f"{name}: the file vanished since it was opened") from None
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), name) from error
        if done < len(buffer):
            raise CheckpointError(
                f"{name}: ends at byte {blob.offset + offset + done}, wanted "
                f"{blob.offset + offset + len(buffer)}; the file is truncated: fetch or write it again"
            )

    def check(self, files: Iterable[str]) -> None:
        """Raises CheckpointError unless these files are as they were when the folder was opened; not looked at in a bucket."""
        if self.is_local:
            for file in files:
                name = f"{self._root}/{file}"
                try:
                    self._compare(name, file, _identity(os.lstat(name)))
                except FileNotFoundError:
                    raise CheckpointError(
                        f"{name}: the file vanished since it was opened"
                    ) from None

    def check_all(self) -> None:
        """`check` of every file, in a bucket too, where it is one listing."""
        if self.is_local:
            self.check(self.files)
            return
        now = dict(self._scan())
        for file in self.files:
            if file not in now:
                raise CheckpointError(f"{self._root}/{file}: the file vanished since it was opened")
            self._compare(f"{self._root}/{file}", file, now[file])

    def _read_local(self, name: str, blob: Blob, offset: int, buffer: memoryview) -> int:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            done = read_at(descriptor, blob.offset + offset, buffer)
            # After the read: a change before it or during it is seen.
            self._compare(name, blob.file, _identity(os.fstat(descriptor)))
            return done
        finally:
            os.close(descriptor)

    def _compare(self, name: str, file: str, now: Identity) -> None:
        was = self.files[file]
        if now != was:
            raise CheckpointError(
                f"{name}: the file changed since it was opened: it was {was}, is {now}; inputs must stay as they are: "
                "run again once nothing writes to it"
            )

    def _scan(self) -> Iterator[tuple[str, Identity]]:
        if self.is_local:
            yield from _scan_local(os.fspath(self.path), "")
            return
        for file, found in list_remote(self.path):
            changed = int(found["mtime"].timestamp()) * 10**9 if "mtime" in found else 0
            yield file, Identity(found["size"], changed, int(found.get("generation") or 0))


def _scan_local(root: str, below: str) -> Iterator[tuple[str, Identity]]:
    with os.scandir(os.path.join(root, below)) as entries:
        for entry in entries:
            relative = f"{below}/{entry.name}" if below else entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from _scan_local(root, relative)
            elif entry.is_file(follow_symlinks=False):
                yield relative, _identity(entry.stat(follow_symlinks=False))
            else:
                kind = "a symbolic link" if entry.is_symlink() else "no regular file"
                raise CheckpointError(
                    f"{os.path.join(root, relative)} is {kind}: a checkpoint is read from its own folder only; copy it "
                    "with its files"
                )


def _identity(found: os.stat_result) -> Identity:
    return Identity(found.st_size, found.st_mtime_ns, found.st_ino)
