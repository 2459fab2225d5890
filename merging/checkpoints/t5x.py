"""T5X checkpoints: a train state in msgpack with arrays beside it (legacy), or in Orbax's format (`OrbaxWriter`).

What it promises. Reading: what T5X wrote since 2020, float32 and bfloat16, arrays inline, in parts, and in zarr 2 under any
compressor; the parameters are what is under `target`, the rest (step, optimizer slots) is at hand for a writer that keeps it.
Writing: what T5X restores, by pieces, from several processes.

Format (legacy, "version 3"): `checkpoint` is msgpack, {"version": 3, "optimizer": {"target": parameters, "state": {"step",
"param_states"}}}. A leaf is an array in it, or tensorstore's description of an array in a folder beside it, named by
its keys joined by `.`. Version 2 stored bfloat16 as uint16. Files of T5X's first steps to Orbax hold strings
`PLACEHOLDER://name` in place of the description. Chunks may be absent where `.zarray` names a fill value.

Format (Orbax): a step's folder with the item `state`, the same tree. `Reader` reads both, and finds which it is.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from etils import epath

from merging.checkpoints import msgpack_file, orbax, zarr
from merging.checkpoints.boxes import Assembler, chunk_shape, whole
from merging.checkpoints.folder import Blob, Folder
from merging.checkpoints.format import CheckpointError, LeafSpec
from merging.checkpoints.msgpack_file import InlineArray
from merging.checkpoints.safetensors_header import show
from merging.checkpoints.storage import put_file
from merging.checkpoints.tree_writer import (
    CHUNK_BYTES,
    FolderStore,
    Leaf,
    Tree,
    TreeWriter,
    assembler,
    plan_tree,
    specs_of,
    sync_folder,
)
from merging.checkpoints.trees import Constant, Path, Stored, TreeReader, check_paths, name_of

FILE = "checkpoint"
TARGET = "target"

_VERSION = 3
_PLACEHOLDER = "PLACEHOLDER://"
_TENSORFLOW = b"model_checkpoint_path"  # begins the file of that name that TensorFlow writes
_ITEM = "state"
_STEP = f"{_ITEM}/step"
_MAX_FOLDER_BYTES = 255  # of a name, on most file systems

# What T5X's Adafactor keeps of a matrix's second moments. T5X gives these no axes of a mesh, and restores what has none
# from the msgpack file alone.
_FACTORS = ("v_row", "v_col")


class Reader(TreeReader):
    """A legacy T5X checkpoint (`checkpoint_<step>/checkpoint`), open for reading. Thread-safe.

    Args:
      path: the step's folder.
      params_path: default `target`.
      cache_bytes: of decoded chunks, as in `orbax.Reader`.

    Attributes:
      cache_bytes: the same, decided.

    Raises CheckpointError where a file isn't as the format says.
    """

    format = "t5x"

    def __init__(
        self,
        path: epath.PathLike,
        *,
        params_path: str | None = None,
        cache_bytes: int | None = None,
    ):
        folder = Folder(path)
        where = f"{folder.path / FILE}"
        if FILE not in folder.files:
            raise CheckpointError(f"{path} holds no file {FILE!r}: it is no T5X checkpoint")
        _refuse_tensorflow(folder)
        tree = msgpack_file.load(folder, FILE)
        if not isinstance(tree, dict):
            raise CheckpointError(f"{where} holds {show(tree)}, wanted a map")
        version, root = 3, tree
        if "optimizer" in tree and "version" in tree:
            version, root = tree["version"], tree["optimizer"]
            if version not in (1, 2, 3) or not isinstance(root, dict):
                raise CheckpointError(
                    f"{where}: version {show(version)} is not read; wanted 1 to 3"
                )
        self._context = zarr.Context()
        self._blobs = orbax.group({name: Blob(f.size, name) for name, f in folder.files.items()})
        self._opening, self._version = folder, version
        leaves: dict[Path, Stored] = {}
        constants: dict[Path, Constant] = {}
        self._collect(root, (), leaves, constants)
        check_paths(leaves, where)
        arrays = [leaf for leaf in leaves.values() if isinstance(leaf, zarr.Array)]
        wanted = 2 * max((array.cached_bytes for array in arrays), default=0)
        self.cache_bytes = self._context.cache_bytes = (
            wanted if cache_bytes is None else cache_bytes
        )
        shapes = [[name_of(p), list(s.shape), s.dtype.name] for p, s in leaves.items()]
        header = [repr(shapes).encode(), *(array.raw for array in arrays)]
        params_path = TARGET if params_path is None else params_path
        super().__init__(str(path), folder, header, leaves, constants, params_path)

    def _collect(
        self, tree: Any, path: Path, leaves: dict[Path, Stored], constants: dict[Path, Constant]
    ) -> None:
        """Leaves and what is no array below a node, in the order of the file."""
        if isinstance(tree, InlineArray):
            leaves[path] = tree
        elif isinstance(tree, dict) and {"driver", "kvstore", "metadata"} <= tree.keys():
            leaves[path] = self._open(self._described(tree, path), path, tree.get("dtype"))
        elif isinstance(tree, dict) and tree:
            for key, value in tree.items():
                self._collect(value, (*path, key), leaves, constants)
        elif isinstance(tree, str) and tree.startswith(_PLACEHOLDER):
            leaves[path] = self._open(tree.removeprefix(_PLACEHOLDER), path, None)
        elif isinstance(tree, (list, msgpack_file.Payload)):
            raise CheckpointError(f"{self._where(path)} is {show(tree)}, wanted an array or a map")
        else:
            constants[path] = tree

    def _described(self, spec: Mapping[str, Any], path: Path) -> str:
        """The folder that tensorstore's description names, which must lie beside the file."""
        store = spec["kvstore"]
        # Before tensorstore 0.1.14 the path stood beside the kvstore.
        named = store.get("path", spec.get("path")) if isinstance(store, dict) else None
        if spec["driver"] != "zarr" or not isinstance(named, str):
            raise CheckpointError(f"{self._where(path)} is {show(spec)}, wanted an array of zarr")
        return named.removesuffix("/")

    def _open(self, name: str, path: Path, dtype: Any) -> zarr.Array:
        # The names of the folder's own folders: no other path can be among them.
        if name not in self._blobs:
            raise CheckpointError(
                f"{self._where(path)} is stored in {show(name)}, which is no folder with files beside {FILE!r}; copy the "
                "checkpoint with all its folders"
            )
        options: dict[str, Any] = {
            "in_database": False,
            "may_lack_chunks": True,
            "context": self._context,
        }
        array = zarr.Array(self._opening, name, self._blobs[name], **options)
        if array.dtype == np.uint16 and (self._version < 3 or dtype == "bfloat16"):
            view = zarr.DTYPES["bfloat16"]
            array = zarr.Array(self._opening, name, self._blobs[name], **options, view=view)
        return array

    def _where(self, path: Path) -> str:
        return f"{self._opening.path / FILE}: leaf {show(name_of(path))}"


class OrbaxReader(orbax.Reader):
    """A T5X checkpoint in Orbax's format: a step's folder, or its `state`. `params_path` is `target` by default."""

    format = "t5x_orbax"

    def __init__(
        self,
        path: epath.PathLike,
        *,
        params_path: str | None = None,
        cache_bytes: int | None = None,
    ):
        params_path = TARGET if params_path is None else params_path
        super().__init__(path, params_path=params_path, cache_bytes=cache_bytes)


def is_train_state(paths: Collection[Path]) -> bool:
    """Whether an Orbax tree is T5X's: `target` beside `state/step`, and nothing that T5X does not write."""
    top = {path[0] for path in paths}
    return (_ITEM, "step") in paths and {TARGET, _ITEM} <= top <= {TARGET, _ITEM, "flax_mutables"}


def _refuse_tensorflow(folder: Folder) -> None:
    start = bytearray(min(len(_TENSORFLOW), folder.files[FILE].size))
    folder.read_into(Blob(folder.files[FILE].size, FILE), 0, memoryview(start))
    if start == _TENSORFLOW:
        raise CheckpointError(
            f"{os.fspath(folder.path / FILE)} is TensorFlow's (Mesh TensorFlow's T5): convert it with T5X first"
        )


# --- Writing ------------------------------------------------------------------------------------


def _extra(like: TreeReader | None, step: int | None) -> dict[str, np.ndarray]:
    """The step, which T5X wants even where the rest of the state is dropped."""
    if step is None and like is not None and _STEP in like.rest:
        return {_STEP: like.read_rest(_STEP, whole(like.rest[_STEP].shape))}
    return {_STEP: np.asarray(step or 0, np.int32)}


def plan(
    specs: Mapping[str, LeafSpec],
    *,
    like: TreeReader | None = None,
    optimizer_state: str = "drop",
    extra: Mapping[str, LeafSpec] | None = None,
) -> Tree:
    """The tree that `Writer` writes; arguments and errors as of `plan_tree`."""
    tree = plan_tree(
        specs,
        like=like,
        optimizer_state=optimizer_state,
        params_path=TARGET,
        extra=_step_spec(like) if extra is None else extra,
    )
    _check_tree(tree)
    for leaf in tree.leaves.values():
        if len(leaf.stored.encode()) > _MAX_FOLDER_BYTES:
            raise ValueError(
                f"leaf {show(leaf.spec.name)} has a name of more than {_MAX_FOLDER_BYTES} bytes, too long for the folder that T5X"
                " stores it in: use FORMAT='t5x_orbax'"
            )
    return tree


def plan_orbax(
    specs: Mapping[str, LeafSpec], *, like: TreeReader | None = None, optimizer_state: str = "drop"
) -> Tree:
    """The tree that `OrbaxWriter` writes; arguments and errors as of `plan_tree`."""
    tree = orbax.plan(
        specs,
        like=like,
        optimizer_state=optimizer_state,
        params_path=TARGET,
        extra=_step_spec(like),
    )
    _check_tree(tree)
    return tree


def _step_spec(like: TreeReader | None) -> dict[str, LeafSpec]:
    """Of what `_extra` gives, from headers alone."""
    if like is not None and _STEP in like.rest:
        return {_STEP: like.rest[_STEP]}
    return {_STEP: LeafSpec(name=_STEP, shape=(), dtype=np.dtype(np.int32))}


def _check_tree(tree: Tree) -> None:
    """Raises ValueError unless what goes beside the parameters is T5X's."""
    names = [*tree.leaves, *map(name_of, tree.constants)]
    strange = [n for n in names if n.split("/")[0] not in (TARGET, _ITEM, "flax_mutables")]
    if strange:
        raise ValueError(
            f"T5X has no place for {show(strange)}, which no train state of T5X has: use OPTIMIZER_STATE='drop'"
        )


def is_inline(spec: LeafSpec) -> bool:
    """Whether a legacy checkpoint has a leaf in its msgpack file, which the main process writes."""
    keys = spec.name.split("/")
    return spec.size <= 1 or (keys[0] == _ITEM and keys[-1] in _FACTORS)


class Writer(TreeWriter):
    """A legacy T5X checkpoint being written; see `TreeWriter` for the arguments, and the module there for several processes.

    What T5X does not partition goes into the msgpack file, as T5X puts it: arrays of at most one element and the factors of
    Adafactor.

    Args:
      step: default the base's, or 0.
      gzip_level: T5X chooses 1. None, not compressed, is quicker to write, and is read by range.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        specs: Mapping[str, LeafSpec],
        *,
        like: TreeReader | None = None,
        optimizer_state: str = "drop",
        step: int | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        gzip_level: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
        is_resumed: bool = False,
    ):
        extra = _extra(like, step)
        tree = plan(specs, like=like, optimizer_state=optimizer_state, extra=specs_of(extra))
        super().__init__(
            folder,
            specs,
            tree,
            like=like,
            chunk_bytes=chunk_bytes,
            process_index=process_index,
            process_count=process_count,
            store=FolderStore(epath.Path(folder)),
            version=2,
            is_resumed=is_resumed,
            extra=extra,
        )
        self._gzip_level = gzip_level
        self._inline: dict[str, np.ndarray] = {}

    def _is_inline(self, spec: LeafSpec) -> bool:
        return is_inline(spec)

    def _begin(self, leaf: Leaf) -> Assembler:
        if self._is_inline(leaf.spec):
            array = self._inline[leaf.spec.name] = np.empty(leaf.spec.shape, leaf.spec.dtype)

            def keep(index: tuple[slice, ...], data: np.ndarray) -> None:
                array[(*index, ...)] = data

            return Assembler(leaf.spec, (1,) * len(leaf.spec.shape), keep)
        chunk = chunk_shape(leaf.spec, self._chunk_bytes)
        return assembler(
            self._store, leaf, chunk, version=self._version, gzip_level=self._gzip_level
        )

    def _made_last(self) -> list[epath.Path]:
        return [self._folder / FILE]

    def _finish(self) -> None:
        import msgpack

        tree: dict[str, Any] = {}
        for leaf in self._leaves.values():
            _put(tree, leaf.path, self._entry(leaf))
        for path, value in self.tree.constants.items():
            # Lists and tuples are maps in flax's state dicts.
            _put(tree, path, {} if value in ([], ()) else value)
        tree.setdefault(_ITEM, {}).setdefault("param_states", {})
        content = msgpack.packb({"version": _VERSION, "optimizer": tree})
        put_file(self._folder / FILE, content)
        sync_folder(self._folder)

    def _entry(self, leaf: Leaf) -> Any:
        import msgpack

        spec = leaf.spec
        if self._is_inline(spec):
            data = self._inline[spec.name].tobytes()
            return msgpack.ExtType(1, msgpack.packb((spec.shape, spec.dtype.name, data)))
        chunk = chunk_shape(spec, self._chunk_bytes)
        return {
            "driver": "zarr",
            "dtype": spec.dtype.name,
            "kvstore": {"driver": "file", "path": f"{leaf.stored}/"},
            "metadata": {
                "chunks": list(chunk),
                "compressor": zarr.compressor(self._gzip_level),
                "shape": list(spec.shape),
            },
        }


class OrbaxWriter(orbax.Writer):
    """A T5X checkpoint in Orbax's format being written: a step's folder with the item `state`. Arguments as in `Writer`."""

    def __init__(
        self,
        folder: epath.PathLike,
        specs: Mapping[str, LeafSpec],
        *,
        like: TreeReader | None = None,
        optimizer_state: str = "drop",
        step: int | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        process_index: int = 0,
        process_count: int = 1,
        is_resumed: bool = False,
    ):
        super().__init__(
            folder,
            specs,
            like=like,
            optimizer_state=optimizer_state,
            params_path=TARGET,
            chunk_bytes=chunk_bytes,
            item=_ITEM,
            process_index=process_index,
            process_count=process_count,
            is_resumed=is_resumed,
            extra=_extra(like, step),
        )
        _check_tree(self.tree)


def _put(tree: dict[str, Any], path: Path, value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(str(key), {})
    tree[str(path[-1])] = value
