"""The manifest of an output folder: written last, it says that the folder is whole and how it was made.

An output is staged in a folder beside it, `<output>.partial`, and gets its name by one rename after the manifest is on
disk, so that nobody ever sees a part of it under its name. One of our own folders without a manifest is not an output.
Buckets know no renaming: there the files lie under the output's name from the start, and the manifest, which is put last
and whole, is what makes an output of them.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from merging.checkpoints.safetensors_header import load_json, show
from merging.checkpoints.storage import is_local, put_whole, small_file, sync

MANIFEST = "manifest.json"
MARKER = (
    "unfinished.json"  # in a staging folder from its first moment: shows that it is ours to remove
)
LIBRARIES = ("jax", "jaxlib", "numpy", "ml_dtypes", "tensorstore", "orbax-checkpoint")

_OBJECTS = ("identity", "environment", "inputs", "checksums", "merges")  # what is read again
_MAX_MANIFEST_BYTES = 256 << 20  # checksums of a model of 2^40 parameters


class OutputError(ValueError):
    """An output folder that can't be used: says what is there, what was wanted and what to do."""


class Staging:
    """An output folder in the making.

    Args:
      output: the folder to be; must not exist, its parent is made if need be.

    Attributes:
      folder: where to put the files until `commit`.
    """

    def __init__(self, output: epath.PathLike):
        self.output = epath.Path(output)
        self.folder = (
            self.output.parent / (self.output.name + ".partial")
            if is_local(self.output)
            else self.output
        )

    def create(self, what: Mapping[str, Any]) -> None:
        """Makes the folder, in place of what an earlier run of ours left unfinished; `what` says what will be in it.

        Raises OutputError if something else is in the way or the place can't be written to.
        """
        if self.folder.exists():
            if not (self.folder / MARKER).exists():
                raise OutputError(
                    f"{self.folder} is in the way: output is staged there, and what it holds was not put there by this"
                    " program; move it away or choose another OUTPUT_DIR"
                )
            self.folder.rmtree()
        try:
            self.folder.mkdir(parents=True)
            (self.folder / MARKER).write_text(json.dumps(what, indent=1))
        except OSError as error:
            raise OutputError(
                f"can't write to {self.output.parent}: {error.strerror or error} ({error.filename}); choose an OUTPUT_DIR"
                " whose parent is a folder that you may write to"
            ) from error

    def resume(self, what: Mapping[str, Any]) -> bool:
        """As `create`, but what an earlier run left unfinished on the way to the same output stays; whether there was any.

        Raises OutputError if it was on the way to another one.
        """
        marker = self.folder / MARKER
        if not marker.exists():
            self.create(what)
            return False
        try:
            then = load_json(small_file(marker, _MAX_MANIFEST_BYTES), MARKER)
        except ValueError as error:
            raise OutputError(f"{marker} can't be read: {error}; remove {self.folder}") from error
        if digest(then) != digest(what):
            different = sorted(k for k in {*then, *what} if then.get(k) != what.get(k))
            raise OutputError(
                f"{self.folder} holds a run that was not finished and differs in {', '.join(different)}: go on with its"
                " settings, choose another OUTPUT_DIR, or remove it to begin anew"
            )
        return True

    def commit(self, manifest: Mapping[str, Any]) -> None:
        """Writes the manifest, then gives the folder its name."""
        write(self.folder, manifest)
        (self.folder / MARKER).unlink()
        if not is_local(self.output):
            return
        sync(self.folder)
        if self.output.exists():
            raise OutputError(
                f"{self.output} has appeared during the run; the result stays in {self.folder}"
            )
        self.folder.rename(self.output)
        sync(self.output.parent)

    def discard(self) -> None:
        """Removes the staging folder, if it is there."""
        if (self.folder / MARKER).exists():
            self.folder.rmtree()


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
    """Raises OutputError if the disk is too full for the output (local paths; a bucket has no end)."""
    place = output
    while not os.path.isdir(place):
        if place == place.parent:
            return
        place = place.parent
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
    """What every manifest says: the stage, when (ISO 8601, UTC) and where it ran, and what `is_done` compares."""
    return {
        "stage": identity["stage"],
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "identity": dict(identity),
        "identity_digest": digest(identity),
    }
