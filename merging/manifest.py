"""The manifest of an output folder: written last, it says that the folder is whole and how it was made.

An output is staged in a folder beside it, `<output>.partial`, and gets its name by one rename after the manifest is on
disk, so that nobody ever sees a part of it under its name. One of our own folders without a manifest is not an output.
Buckets know no renaming: there the files lie under the output's name from the start, and the manifest, which is put last
and whole, is what makes an output of them.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import jax
from etils import epath

from merging.checkpoints.format import UNFINISHED_FILE
from merging.checkpoints.safetensors_header import load_json, show
from merging.checkpoints.storage import (
    is_local,
    put_file,
    put_whole,
    retried_requests,
    small_file,
    sync,
    temporary_files,
)

MANIFEST = "manifest.json"
# In a staging folder from its first moment: shows that it is ours to go on with, or to remove.
MARKER = UNFINISHED_FILE
JOURNALS = "journal.*.jsonl"  # beside it; see `engine.journal`
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # what file systems without locks say
_DIGEST = re.compile("[0-9a-f]{64}")
LIBRARIES = ("jax", "jaxlib", "numpy", "ml_dtypes", "tensorstore", "orbax-checkpoint")

_OBJECTS = ("identity", "environment", "inputs", "checksums", "merges")  # what is read again
_MAX_MANIFEST_BYTES = 256 << 20  # checksums of a model of 2^40 parameters


class OutputError(ValueError):
    """An output folder that can't be used: says what is there, what was wanted and what to do."""


class Busy(OutputError):
    """Another run is at work on the output, or has just ended there."""


class Staging:
    """An output folder in the making; one run at a time holds it, from `create` or `resume` on.

    Args:
      output: the folder to be; must not exist, its parent is made if need be.

    Attributes:
      folder: where to put the files until `commit`.

    What holds it is a lock (flock) on the marker, which the kernel lets go of when the process ends, however it ends. File
    systems without locks, and buckets, have none: there nothing stops two runs on one output, and the one that
    commits last is told that the output has appeared.
    """

    def __init__(self, output: epath.PathLike):
        self.output = epath.Path(output)
        self.folder = (
            self.output.parent / (self.output.name + ".partial")
            if is_local(self.output)
            else self.output
        )
        self._lock: BinaryIO | None = None

    def create(self, what: Mapping[str, Any]) -> None:
        """Makes the folder, in place of what an earlier run of ours left unfinished; `what` says what will be in it.

        Raises OutputError if something else is in the way, or the place can't be written to; Busy if another run is at work there.
        """
        self._hold()
        self._clear()
        self._mark(what)

    def resume(self, what: Mapping[str, Any], *, if_there: epath.Path | None = None) -> bool:
        """As `create`, but what an earlier run left unfinished on the way to the same output stays; whether there was any.

        `if_there`: a file without which there is nothing to go on with. Raises OutputError if it was on the way to another
        output.
        """
        self._hold()
        then = unfinished(self.folder)
        if then is None or (if_there is not None and not if_there.exists()):
            self.create(what)
            return False
        refuse_other(self.folder, then, what)
        return True

    def is_whole(self, what: Mapping[str, Any]) -> bool:
        """Whether the output is there but for its name, since the run that made it was killed in `commit`; gives it its name.

        Raises OutputError as `create`, and where another output is so.
        """
        if (self.folder / MARKER).exists():
            self._hold()
        # Else no lock: of two that rename, one finds it done.
        found = read(self.folder)
        if found is None:
            return False
        if found.get("identity_digest") != digest(what):
            raise OutputError(
                f"{self.folder} holds the output of another run, whole but for its name: rename it to {self.output} or"
                " remove it"
            )
        self._publish()
        return True

    def commit(self, manifest: Mapping[str, Any]) -> None:
        """Writes the manifest, then gives the folder its name."""
        write(self.folder, manifest)
        self._publish()

    def discard(self) -> None:
        """Removes the staging folder, if something unfinished is there."""
        if (self.folder / MARKER).exists():
            self._clear()
            (self.folder / MARKER).unlink(missing_ok=True)
            if is_local(self.folder):  # a bucket knows no empty folders
                self.folder.rmdir()
            self.close()

    def close(self) -> None:
        """Lets go of the folder, which stays."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _hold(self) -> None:
        """Makes the folder and its marker where they are not there, and takes the lock."""
        if self._lock is not None:
            return
        marker = self.folder / MARKER
        if is_local(marker) and os.path.islink(marker):
            raise OutputError(f"{marker} is a link, which this program never makes: remove it")
        if self.folder.exists() and not marker.exists():
            if any(self.folder.iterdir()):  # an empty one is of a run that was killed here
                raise OutputError(
                    f"{self.folder} is in the way: output is staged there, and what it holds was not put there by this"
                    " program; move it away or choose another OUTPUT_DIR"
                )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not is_local(self.folder):
                if not marker.exists():
                    marker.write_text("")
                return
            self._lock = marker.open("ab")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise Busy(
                f"another run is at work in {self.folder}: wait until it ends, or choose another OUTPUT_DIR"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                self.close()
                raise OutputError(
                    f"can't write to {self.output.parent}: {error.strerror or error} ({error.filename}); choose an"
                    " OUTPUT_DIR whose parent is a folder that you may write to"
                ) from error
        if self.output.exists() or not _is_at(self._lock, marker):
            # It ended between a look and the lock, and may have given the folder its name.
            self.close()
            raise Busy(f"another run has just ended in {self.folder}: run the command again")

    def _mark(self, what: Mapping[str, Any]) -> None:
        put_file(self.folder / MARKER, json.dumps(what, indent=1).encode())

    def _clear(self) -> None:
        """Removes all but the marker, which goes last: what lies in a folder without one is not ours."""
        for path in list(self.folder.iterdir()):
            if path.name != MARKER:
                path.rmtree() if path.is_dir() else path.unlink()

    def _publish(self) -> None:
        left = temporary_files(self.folder) if is_local(self.folder) else ()
        for path in (*self.folder.glob(JOURNALS), *left, self.folder / MARKER):
            path.unlink(missing_ok=True)
        if not is_local(self.output):
            return
        # Another run that found it whole may give it its name at any moment from here on.
        with contextlib.suppress(FileNotFoundError):
            sync(self.folder)
            if self.output.exists() and self.folder.exists():
                raise OutputError(
                    f"{self.output} has appeared during the run; the result stays in {self.folder}"
                )
            self.folder.rename(self.output)
        if not self.output.exists():
            raise OutputError(f"{self.folder} has vanished during the run: run the command again")
        sync(self.output.parent)
        self.close()


def _is_at(handle: BinaryIO, path: epath.Path) -> bool:
    """Whether an open file is the one that has this name now."""
    return path.exists() and os.path.samestat(os.fstat(handle.fileno()), os.stat(path))


def unfinished(folder: epath.Path) -> Any:
    """What the marker of a staging folder says; None where a run was stopped before it was whole, and so before anything else."""
    try:
        return load_json(small_file(folder / MARKER, _MAX_MANIFEST_BYTES), MARKER)
    except ValueError:
        return None


def refuse_other(folder: epath.Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises OutputError, with all that differs, if what lies unfinished in a staging folder is of another run."""
    if digest(then) != digest(now):
        raise OutputError(
            f"{folder} holds the unfinished output of another run, which differs: "
            + "; ".join(differences(then, now))
            + ". Nothing of it is taken over: go on with what it was begun with, choose another OUTPUT_DIR, or remove"
            f" {folder} to begin anew"
        )


def differences(then: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two JSON values, in words: `seed was 0, is 1`."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        keys = dict.fromkeys([*then, *now])
        return [
            line
            for key in keys
            for line in differences(then.get(key), now.get(key), f"{name}.{key}" if name else key)
        ]
    if isinstance(then, list | tuple) and isinstance(now, list | tuple) and len(then) == len(now):
        pairs = enumerate(zip(then, now, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{name}[{i}]")]
    if then == now:
        return []
    if all(isinstance(each, str) and _DIGEST.fullmatch(each) for each in (then, now)):
        return [f"{name} has changed"]
    return [f"{name} was {_brief(then)}, is {_brief(now)}"]


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def write(folder: epath.PathLike, manifest: Mapping[str, Any]) -> None:
    """Puts a manifest into a folder, whole or not at all."""
    text = json.dumps(manifest, indent=1) + "\n"
    put_whole(epath.Path(folder) / MANIFEST, text.encode())


def read(folder: epath.PathLike) -> dict[str, Any] | None:
    """The manifest of a folder, or None if it has none.

    Raises OutputError if there is one that can't be read.
    """
    path = epath.Path(folder) / MANIFEST
    if not path.exists():
        return None
    try:
        found = load_json(small_file(path, _MAX_MANIFEST_BYTES), MANIFEST)
        for key in _OBJECTS:
            if not isinstance(found.get(key, {}), dict):
                raise ValueError(f"{key} is {show(found[key])}, wanted an object")
        if not isinstance(found.get("params_path"), str | None):
            raise ValueError(f"params_path is {show(found['params_path'])}, wanted a string")
        return found
    except (ValueError, OSError) as error:
        raise OutputError(f"{path} can't be read: {error}") from error


def is_done(output: epath.PathLike, identity: Mapping[str, Any]) -> bool:
    """Whether the output is there, made by the same stage from the same inputs with the same settings.

    Raises OutputError if something else is there.
    """
    output = epath.Path(output)
    if not output.exists():
        return False
    if not output.is_dir():
        raise OutputError(f"{output} is a file: move it away or choose another OUTPUT_DIR")
    found = read(output)
    if found is None:
        if not is_local(output) and (output / MARKER).exists():
            return False
        if not any(output.iterdir()):
            raise OutputError(
                f"{output} exists already (empty): remove it or choose another OUTPUT_DIR"
            )
        raise OutputError(
            f"{output} holds something that this program did not make (it has no {MANIFEST}): nothing in it is"
            " touched; choose another OUTPUT_DIR"
        )
    if found.get("identity_digest") == digest(identity):
        return True
    then = found.get("identity", {})
    different = sorted(k for k in {*then, *identity} if then.get(k) != identity.get(k))
    raise OutputError(
        f"{output} holds the output of another run, which differs in {', '.join(different) or 'its version'}: choose another"
        " OUTPUT_DIR, or remove it first"
    )


def check_apart(output: epath.Path, inputs: Sequence[epath.PathLike]) -> None:
    """Raises OutputError if the output is, holds or lies in an input."""
    there = os.path.realpath(output)
    for each in inputs:
        here = os.path.realpath(each)
        if os.path.commonpath([here, there]) in (here, there):
            raise OutputError(
                f"the output {output} and the input {each} are the same folder or one lies in the other: inputs are"
                " never changed; choose another OUTPUT_DIR"
            )


def check_free_space(output: epath.Path, nbytes: int) -> None:
    """Raises OutputError if the disk is too full for the output (local paths; a bucket has no end).

    What an unfinished run left of it has its room already.
    """
    place = output
    while not os.path.isdir(place):
        if place == place.parent:
            return
        place = place.parent
    left = os.fspath(Staging(output).folder)
    for folder, _, files in os.walk(left):
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # of a run that is at work there
                nbytes -= os.lstat(os.path.join(folder, file)).st_blocks * 512
    free = shutil.disk_usage(place).free
    if free < nbytes:
        raise OutputError(
            f"the output takes {nbytes:,} bytes and {place} has {free:,} free: make room or choose another OUTPUT_DIR"
        )


def digest(value: Any) -> str:
    """Hex SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@functools.cache
def environment() -> dict[str, Any]:
    """What the result may depend on besides configuration and inputs: code, libraries, device."""
    libraries = {}
    for name in LIBRARIES:
        try:
            libraries[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            libraries[name] = None
    device = jax.devices()[0]
    return {
        "code": code_digest(),
        "python": platform.python_version(),
        "libraries": libraries,
        "device": {"platform": device.platform, "kind": device.device_kind},
        "processes": jax.process_count(),
        "devices": jax.device_count(),
    }


@functools.cache
def code_digest() -> str:
    """Hex SHA-256 over this library's source files: which code made a result, committed or not."""
    root = pathlib.Path(__file__).parent  # installed code is on local disk
    total = hashlib.sha256()
    for path in sorted(root.glob("**/*.py")):
        total.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def provenance(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What every manifest says: the stage, when (ISO 8601, UTC) and where it ran, and what `is_done` compares.

    `storage_retries`: requests to object storage that this process, since it began, made again because they failed.
    """
    return {
        "stage": identity["stage"],
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "identity": dict(identity),
        "identity_digest": digest(identity),
        "storage_retries": retried_requests(),
    }
