"""A checkpoint that is a tree: parameters, often among other state, under keys of dictionaries and places in lists.

What Orbax and T5X share: which leaves are the parameters (`params_path`), what the others are, and how a path becomes a
name. A leaf's name is its keys joined by `/`. A key that contains `/` would make two paths one name, so it is refused, as
is one that can't be part of a file name. Keys may contain `.`; two paths that are one where joined by `.`, which is how
these formats name files, are refused.

What is no array is kept beside the leaves: None, empty containers, strings and numbers that a format holds without an
array. They are part of the structure that a writer takes over from a reader (`Structure`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from merging.checkpoints import boxes
from merging.checkpoints.folder import Folder
from merging.checkpoints.format import CheckpointError, Index, LeafSpec
from merging.checkpoints.safetensors_header import refuse, show

# Keys of dictionaries are strings, places in lists and tuples are ints.
Path = tuple[str | int, ...]

# What is no array: None, {}, [], (), or a string or number.
Constant = Any

# Top-level keys that tell a train state from bare parameters.
_STATE_KEYS = ("opt_state", "optimizer_state", "optimizer", "step", "tx")

_MAX_KEY_BYTES = 4096


@runtime_checkable
class Stored(Protocol):
    """An array in a file of some format."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, index: Index, out: np.ndarray) -> None: ...


@dataclasses.dataclass(frozen=True)
class Structure:
    """The shape of a tree without its arrays, from the root, as a writer takes it over.

    Attributes:
      paths: of all leaves by name; says which keys are places in lists.
      constants: what is no array, by path.
      params_path: of the parameters.
    """

    paths: Mapping[str, Path]
    constants: Mapping[Path, Constant]
    params_path: str


class TreeReader:
    """What readers of trees have in common. Thread-safe.

    Args:
      location: for messages.
      folder: whose files hold everything.
      header: bytes that identify the tree and its arrays, for the digest.
      leaves: every array of the tree by path, in storage order.
      constants: what is no array.
      params_path: where the parameters are, keys joined by `/`; "" for the whole tree; None where the caller does not
        say, which is an error for a tree that holds more than parameters.

    Raises CheckpointError for names that can't be told apart, and where `params_path` is wanted or leads nowhere.
    """

    def __init__(
        self,
        location: str,
        folder: Folder,
        header: Iterable[bytes],
        leaves: Mapping[Path, Stored],
        constants: Mapping[Path, Constant],
        params_path: str | None,
    ):
        self.location = location
        self._folder = folder
        paths = check_paths(leaves, location)
        if params_path is None:
            _refuse_train_state(location, leaves)
            params_path = ""
        self.structure = Structure(paths, dict(constants), params_path)
        prefix = f"{params_path}/" if params_path else ""
        self._leaves: dict[str, Stored] = {}
        self._rest: dict[str, Stored] = {}
        for name, path in paths.items():
            mine = name.startswith(prefix)
            (self._leaves if mine else self._rest)[name[len(prefix) * mine :]] = leaves[path]
        if not self._leaves:
            raise CheckpointError(
                f"{location}: no arrays at PARAMS_PATH {params_path!r}; there are some at "
                f"{_candidates(leaves)}"
            )
        self._digest = hashlib.sha256()
        for part in header:
            self._digest.update(hashlib.sha256(part).digest())
        files = [[name, found.size, found.mtime_ns] for name, found in folder.files.items()]
        self._digest.update(json.dumps(files).encode())

    @property
    def rest(self) -> Mapping[str, LeafSpec]:
        """The leaves outside of the parameters (optimizer slots, step), by their names from the root."""
        return {name: _spec(name, stored) for name, stored in self._rest.items()}

    def specs(self) -> Mapping[str, LeafSpec]:
        """The parameters, by their names from `params_path` on, in storage order; known since the opening."""
        return {name: _spec(name, stored) for name, stored in self._leaves.items()}

    def read(self, name: str, index: Index, *, out: np.ndarray | None = None) -> np.ndarray:
        """The box `index` of a parameter, [*box] in its dtype; see `format.Reader`."""
        assert name in self._leaves, f"{self.location} has no leaf {name!r}; ask specs() for names"
        return self._read(name, self._leaves[name], index, out)

    def read_rest(self, name: str, index: Index) -> np.ndarray:
        """The box of a leaf of `rest`."""
        assert name in self._rest, f"{self.location} has no leaf {name!r} outside of the parameters"
        return self._read(name, self._rest[name], index, None)

    def digest(self) -> str:
        """sha256 hex digest of the tree's and each array's metadata, and each file's name, size (bytes), mtime (ns)."""
        return self._digest.hexdigest()

    def check_unchanged(self) -> None:
        """Raises CheckpointError unless every file is as it was when the checkpoint was opened."""
        self._folder.check_all()

    def close(self) -> None:
        """Files are open only while they are read."""

    def _read(self, name: str, stored: Stored, index: Index, out: np.ndarray | None) -> np.ndarray:
        spec = _spec(name, stored)
        out = boxes.receiver(spec, index, out)
        if out.size:
            try:
                stored.read(index, out)
            except CheckpointError as error:
                raise CheckpointError(f"leaf {name}: {error}") from None
        return out


def _spec(name: str, stored: Stored) -> LeafSpec:
    return LeafSpec(name=name, shape=tuple(stored.shape), dtype=stored.dtype)


# --- Paths --------------------------------------------------------------------------------------


def name_of(path: Path) -> str:
    """The keys joined by `/`: the leaf's name."""
    return "/".join(map(str, path))


def stored_name(path: Path) -> str:
    """The keys joined by `.`: the array's name in its folder or database."""
    return ".".join(map(str, path))


def check_paths(paths: Iterable[Path], where: object) -> dict[str, Path]:
    """The paths by name. Raises CheckpointError with all that can't be a leaf's, or that can't be told apart."""
    named: dict[str, Path] = {}
    problems = []
    taken: dict[str, Path] = {}
    for path in paths:
        stored = stored_name(path)
        for key in path:
            if isinstance(key, str) and (problem := _problem(key)):
                problems.append(f"leaf {show(path)}: key {show(key)} {problem}")
                break
        else:
            if not path or stored in (".", "..") or len(stored) > _MAX_KEY_BYTES:
                problems.append(f"leaf {show(path)} has no name that a file could have")
            elif stored in taken:
                problems.append(
                    f"leaves {show(taken[stored])} and {show(path)} are both stored as {show(stored)}"
                )
            taken[stored] = path
            named[name_of(path)] = path
    known = set(named.values())
    for path in named.values():
        if any(path[:depth] in known for depth in range(1, len(path))):
            problems.append(f"leaf {show(path)} lies in another leaf")
    refuse(where, problems, "rename these keys")
    return named


def _problem(key: str) -> str | None:
    if not key:
        return "is empty"
    if "/" in key:
        return "contains '/', which joins the keys of a name"
    if "\0" in key:
        return "contains a NUL byte"
    try:
        key.encode()
    except UnicodeEncodeError:
        return "is not Unicode text"
    return None


def of_name(name: str) -> Path:
    """A path of dictionaries' keys."""
    return tuple(name.split("/"))


def _refuse_train_state(location: str, leaves: Mapping[Path, Stored]) -> None:
    top = {path[0] for path in leaves}
    telling = [key for key in _STATE_KEYS if key in top]
    if telling:
        raise CheckpointError(
            f"{location} holds more than parameters ({', '.join(telling)} at the top): set PARAMS_PATH to where they "
            f"are, one of {_candidates(leaves)}"
        )


def _candidates(leaves: Mapping[Path, Stored]) -> str:
    """Subtrees that may be parameters: the top level, and what a state has below it, without optimizers'."""
    found: dict[str, int] = {}
    for path, stored in leaves.items():
        for depth in (1, 2):
            if len(path) > depth:
                name = name_of(path[:depth])
                found[name] = found.get(name, 0) + int(np.prod(stored.shape, dtype=float))
    shown = sorted(found, key=lambda name: (name.count("/"), name.startswith("opt"), -found[name]))
    return ", ".join(repr(name) for name in shown[:12]) or "no path: the tree has no level"


def file_bytes(folder: Folder, name: str, limit: int) -> bytes:
    """A small file, whole. Raises CheckpointError where it is larger than `limit` bytes."""
    from merging.checkpoints.folder import Blob

    if name not in folder.files:
        raise CheckpointError(f"{os.fspath(folder.path / name)} is no file")
    size = folder.files[name].size
    if size > limit:
        raise CheckpointError(
            f"{os.fspath(folder.path / name)}: {size} bytes, wanted at most {limit}; do not trust this checkpoint"
        )
    return folder.read(Blob(size, name))
