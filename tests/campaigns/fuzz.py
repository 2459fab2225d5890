"""Fuzz campaign on everything that reads checkpoints: whatever is in a file, a clear error or the numbers that are there.

    python -m tests.campaigns.fuzz --inputs=10**6
    python -m tests.campaigns.fuzz --input=123 --seed=0      # one again, with its traceback

An input is a tiny checkpoint with one damaged file (`mutations.py`), or with a link, pipe or folder where a file should be.
It is opened, asked for its leaves, and some boxes of each are read. What is found:

  error    any other exception than those that the reader's contract names
  crash    the process died
  hang     more than CPU_SECONDS of processor time, or WALL_SECONDS
  memory   more than MEMORY_BYTES taken (data segment limited by the system; a library that can't allocate dies: crash)
  outside  a file outside of the checkpoint's folder opened, listed, written or read (Python's audit events; access times,
           which see what tensorstore does as well; and a byte pattern that only lies there)
  pickle   something unpickled

Inputs are numbered; each depends on (seed, number) alone. Processes that die are started again behind the input that killed
them. The command prints a table, the findings with the number of the first input of each kind, and exits with 1 if there are any.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import gzip
import json
import multiprocessing
import os
import pathlib
import pickle
import random
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from merging import manifest
from merging.checkpoints import (
    boxes,
    checksums,
    huggingface,
    memory,
    open_checkpoint,
    orbax,
    safetensors,
    t5x,
)
from merging.checkpoints.format import CheckpointError
from merging.models import huggingface as huggingface_models
from merging.models import model_file
from tests.campaigns import mutations
from tests.campaigns.mutations import MARK, Mutate

CPU_SECONDS = 5.0
WALL_SECONDS = 120.0  # other programs run on the machine too
MEMORY_BYTES = 256 << 20
_LEAVES_READ = 6
_BETWEEN_LIMITS = 100  # inputs after which the limit is set anew, above what libraries keep


# ---- what is damaged, and how it is read -----------------------------------------------------------------------------


class Subject(NamedTuple):
    """A tiny checkpoint.

    Attributes:
      weight: how often it is chosen, against the others.
      build: writes it into an empty folder.
      read: what must go well or end in one of `errors`.
      files: which of its files are damaged, by the end of their path, and how.
    """

    name: str
    weight: float
    build: Callable[[pathlib.Path], None]
    read: Callable[[pathlib.Path], None]
    files: Mapping[str, Mutate]
    errors: tuple[type[Exception], ...] = (CheckpointError,)


ARRAYS = {
    "decoder/layers_0/wi": np.arange(12, dtype=np.float32).reshape(4, 3),
    "decoder/scale": np.arange(5, dtype=np.float16),
    "step": np.array(3, np.int32),
    "flags": np.array([True, False]),
}


def read_checkpoint(folder: pathlib.Path, params_path: str | None = None) -> None:
    """All that a merge asks of a reader, and the boxes at the corners and in the middle of each leaf."""
    with contextlib.closing(open_checkpoint(folder, params_path=params_path)) as reader:
        specs = reader.specs()
        for name, spec in list(specs.items())[:_LEAVES_READ]:
            for index in _some_boxes(spec.shape):
                array = reader.read(name, index)
                assert array.shape == boxes.box_shape(spec, index) and array.dtype == spec.dtype
                assert array.size < 4 or bytes([MARK] * 4) not in array.tobytes(), (
                    "bytes from outside"
                )
        for name, spec in list(getattr(reader, "rest", {}).items())[:2]:
            reader.read_rest(name, next(_some_boxes(spec.shape), boxes.whole(spec.shape)))
        reader.digest()
        reader.check_unchanged()


def _some_boxes(shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Boxes of at most two elements along each of the last four axes: what a damaged header claims may be huge."""
    width = [2 if axis >= len(shape) - 4 else 1 for axis in range(len(shape))]
    for start in ("first", "middle", "last"):
        at = [
            {"first": 0, "middle": n // 2, "last": max(0, n - w)}[start]
            for n, w in zip(shape, width, strict=True)
        ]
        yield tuple(
            slice(min(a, n), min(a + w, n)) for a, w, n in zip(at, width, shape, strict=True)
        )


def _write(folder: pathlib.Path, arrays: Mapping[str, np.ndarray], writer: Any) -> None:
    for name in writer.names_mine:
        writer.write(name, boxes.whole(arrays[name].shape), arrays[name])
    writer.commit()


def _specs(arrays: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
    return memory.Reader(arrays).specs()


def _safetensors(shard_bytes: int) -> Callable[[pathlib.Path], None]:
    def build(folder: pathlib.Path) -> None:
        _write(folder, ARRAYS, safetensors.Writer(folder, _specs(ARRAYS), shard_bytes=shard_bytes))

    return build


def _trees(writer: Callable[..., Any], **options: Any) -> Callable[[pathlib.Path], None]:
    def build(folder: pathlib.Path) -> None:
        _write(folder, ARRAYS, writer(folder, _specs(ARRAYS), **options))

    return build


def _by_tensorstore(
    driver: str, metadata: Mapping[str, Any], *, database: Any = None
) -> Callable[[pathlib.Path], None]:
    """A tree whose arrays tensorstore wrote, as orbax-checkpoint has it do: compressed, or sharded, or in a database."""

    def build(folder: pathlib.Path) -> None:
        import tensorstore as ts

        _trees(orbax.Writer, storage="zarr3" if driver == "zarr3" else "zarr")(folder)
        store: dict[str, Any] = {"driver": "file", "path": f"{folder}/"}
        if database is not None:
            store = {
                "driver": "ocdbt",
                "base": store,
                "config": {"max_inline_value_bytes": 20, **database},
            }
        for name, array in ARRAYS.items():
            named = name.replace("/", ".")
            shutil.rmtree(folder / named)
            told: dict[str, Any] = {"shape": list(array.shape), **metadata}
            told |= (
                {"data_type": array.dtype.name} if driver == "zarr3" else {"dtype": array.dtype.str}
            )
            chunk = [max(1, n // 2 if driver == "zarr" else n) for n in array.shape]
            if driver == "zarr3":
                told["chunk_grid"] = {"name": "regular", "configuration": {"chunk_shape": chunk}}
                told["codecs"] = [_with_chunk(codec, chunk) for codec in told["codecs"]]
            else:
                told["chunks"] = chunk
            kvstore = {**store, "path": f"{store.get('path', '')}{named}/"}
            ts.open({"driver": driver, "kvstore": kvstore, "metadata": told}, create=True).result()[
                ...
            ] = array

    return build


def _with_chunk(codec: Mapping[str, Any], chunk: list[int]) -> dict[str, Any]:
    if codec["name"] != "sharding_indexed":
        return dict(codec)
    return {**codec, "configuration": {**codec["configuration"], "chunk_shape": chunk}}


_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_ZSTD = {"name": "zstd", "configuration": {"level": 3}}
_SHARDED = {
    "name": "sharding_indexed",
    "configuration": {"codecs": [_BYTES, _ZSTD], "index_codecs": [_BYTES, {"name": "crc32c"}]},
}


def _t5x(folder: pathlib.Path) -> None:
    arrays = {name: array for name, array in ARRAYS.items() if name != "step"}
    _write(folder, arrays, t5x.Writer(folder, _specs(arrays), step=3, gzip_level=1, chunk_bytes=24))


def _old_t5x(folder: pathlib.Path) -> None:
    """Arrays inside the file, some in parts, and as names of folders beside it."""
    _t5x(folder)
    data = (folder / t5x.FILE).read_bytes()
    tree = mutations.unpack(data)
    target = mutations.Map()
    for name, array in {
        "a": np.arange(6, dtype=np.float32),
        "b": np.ones((2, 2), np.float32),
    }.items():
        content = [list(array.shape), array.dtype.name, array.tobytes()]
        target.append([name, mutations.Extension(1, content)])
    part = [[3], "float32", bytes(12)]
    chunks = mutations.Map([str(i), mutations.Extension(1, list(part))] for i in range(2))
    target.append(
        [
            "parts",
            mutations.Map(
                [
                    ["__msgpack_chunked_array__", True],
                    ["shape", mutations.Map([["0", 6]])],
                    ["chunks", chunks],
                ]
            ),
        ]
    )
    target.append(["beside", "PLACEHOLDER://target.decoder.scale"])
    dict(tree)["optimizer"][0][1] = target
    (folder / t5x.FILE).write_bytes(mutations.pack(tree))


_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "hidden_act": "silu", "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
_GEMMA = {
    "model_type": "gemma3_text", "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 32, "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256,
    "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], "sliding_window_pattern": 2,
    "rope_local_base_freq": 1e4, "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip


def _config(values: Mapping[str, Any]) -> Callable[[pathlib.Path], None]:
    def build(folder: pathlib.Path) -> None:
        (folder / "config.json").write_text(json.dumps(values))
        (folder / "tokenizer.json").write_text("{}")

    return build


def _read_config(folder: pathlib.Path) -> None:
    """As the stages do: what goes along first, which also says the type of the weights; then the model."""
    for content in huggingface.carried_files(folder, "bfloat16").values():
        assert isinstance(content, bytes) or content.is_relative_to(folder)
    huggingface.read_config(epath.Path(folder))
    model_file.describe(folder)


def _model_file(folder: pathlib.Path) -> None:
    (folder / "config.json").write_text(json.dumps(_GEMMA))
    (folder / "vocabulary.txt").write_text("words")
    config = huggingface_models.read_config(folder)
    vocabulary = model_file.Vocabulary(
        name="words", digest="5f", files={"vocabulary.txt": folder / "vocabulary.txt"}
    )
    model_file.write(folder, config, {"layers": 0}, vocabulary)


def _read_model_file(folder: pathlib.Path) -> None:
    found = model_file.read_if_there(folder)
    if found is not None and found.vocabulary is not None:
        assert all(path.parent == folder for path in found.vocabulary.files.values())


_IDENTITY = {"stage": "merge", "seed": 0, "experts": ["a", "b"]}


def _manifest(folder: pathlib.Path) -> None:
    _safetensors(1 << 20)(folder)
    found = {
        n: {checksums.box_text(boxes.whole(a.shape)): checksums.checksum(a)}
        for n, a in ARRAYS.items()
    }
    told = {"stage": "merge", "identity": _IDENTITY, "identity_digest": manifest.digest(_IDENTITY)}
    told |= {"method": "Ties()", "inputs": {"base": {"path": "b", "digest": "5f"}}}
    manifest.write(folder, {**told, "environment": {"code": "5f"}, "checksums": found})
    shutil.copytree(folder, folder / "out.partial")
    (folder / "out.partial" / manifest.MARKER).write_text(json.dumps(_IDENTITY))


def _read_manifest(folder: pathlib.Path) -> None:
    """Is it done, what does it say, do the checksums hold, may it go on."""
    from launch import show

    manifest.is_done(folder, _IDENTITY)
    collections.deque(show.shown([str(folder)], is_verified=True), maxlen=0)
    staging = epath.Path(folder / "out.partial")
    then = manifest.unfinished(staging)
    if then is not None:
        manifest.refuse_other(staging, then, _IDENTITY)


# Faults, for the tests to see that they are found: --only=planted.
FAULTS = {
    b"error": lambda folder: {}["a key"],
    b"outside": lambda folder: (folder / "../outside/config.json").read_bytes(),
    b"list": lambda folder: os.listdir(folder / ".."),
    b"write": lambda folder: (folder / "new").write_bytes(b""),
    b"memory": lambda folder: bytearray(2 * MEMORY_BYTES),
    b"pickle": lambda folder: pickle.loads(b"cos\ngetcwd\n."),
    b"by tensorstore": lambda folder: _read_by_tensorstore(folder.parent / "outside"),
    b"crash": lambda folder: os.kill(os.getpid(), signal.SIGSEGV),
    b"hang": lambda folder: _turn_for_ever(),
}


def _turn_for_ever() -> None:
    while True:
        pass


def _read_by_tensorstore(folder: pathlib.Path) -> None:
    import tensorstore as ts

    ts.KvStore.open({"driver": "file", "path": f"{folder}/"}).result().read("data").result()


def _plant(rng: random.Random, data: bytes) -> bytes:
    return rng.choice([data, *FAULTS])


def _fall(folder: pathlib.Path) -> None:
    FAULTS.get((folder / "fault").read_bytes(), lambda folder: None)(folder)


_ANY = mutations.mutate_bytes
_JSON = mutations.mutate_json
_CHUNKS = {"0": _ANY, "0.0": _ANY, "/c/0": _ANY, "/c": _ANY, "c/0/0": _ANY}


def _chunk(rng: random.Random, data: bytes) -> bytes:
    """A compressed chunk: damaged, or one of far too many elements."""
    if rng.random() < 0.5:
        return mutations.mutate_bytes(rng, data)
    return rng.choice(_bombs())


@functools.cache
def _bombs() -> tuple[bytes, ...]:
    large = gzip.compress(bytes(300 << 20), 9, mtime=0)
    blosc = b"\x02\x01\x13\x04" + b"\xff\xff\xff\x7f" * 2 + b"\x14" + bytes(7)
    return (
        gzip.compress(bytes(1000), mtime=0),
        mutations.zstd_bomb(1000),
        mutations.zstd_bomb(1 << 30),
        gzip.compress(large, mtime=0),
        large,
        blosc,
    )


_PACKED = {
    "/0": _chunk,
    "/0.0": _chunk,
    "/1.0": _chunk,
    "/c/0/0": _chunk,
    "/c/0": _chunk,
    "/c": _chunk,
}

SUBJECTS = (
    Subject("planted", 0, lambda folder: (folder / "fault").touch(), _fall, {"fault": _plant}),
    Subject("safetensors", 12, _safetensors(1 << 20), read_checkpoint, {".safetensors": mutations.mutate_safetensors}),
    Subject(
        "safetensors shards", 8, _safetensors(16), read_checkpoint,
        {"index.json": _JSON, "1-of-00003.safetensors": mutations.mutate_safetensors},
    ),
    Subject("config.json, llama", 4, _config(_LLAMA), _read_config, {"config.json": _JSON}),
    Subject("config.json, gemma 3", 4, _config(_GEMMA), _read_config, {"config.json": _JSON}),
    Subject("model.json", 4, _model_file, _read_model_file, {"model.json": _JSON}),
    Subject(
        "manifest.json", 4, _manifest, _read_manifest, {"manifest.json": _JSON, "unfinished.json": _JSON},
        (CheckpointError, manifest.OutputError),
    ),
    Subject("t5x", 10, _t5x, read_checkpoint, {"checkpoint": mutations.mutate_msgpack, ".zarray": _JSON, **_PACKED}),
    Subject("t5x, inline", 10, _old_t5x, read_checkpoint, {"checkpoint": mutations.mutate_msgpack}),
    Subject("t5x orbax", 3, _trees(t5x.OrbaxWriter), read_checkpoint, {"_METADATA": _JSON}),
    Subject("orbax zarr", 10, _trees(orbax.Writer, storage="zarr", chunk_bytes=24), lambda f: read_checkpoint(f, ""), {"_METADATA": _JSON, ".zarray": _JSON, **_CHUNKS}),
    Subject("orbax zarr3", 4, _trees(orbax.Writer, storage="zarr3"), lambda f: read_checkpoint(f, ""), {"_METADATA": _JSON, "zarr.json": _JSON, **_CHUNKS}),
    Subject("orbax ocdbt", 4, _trees(orbax.Writer), lambda f: read_checkpoint(f, ""), {"_METADATA": _JSON, "manifest.ocdbt": mutations.mutate_ocdbt, "d/*": mutations.mutate_ocdbt}),
    Subject("orbax zarr, zstd", 4, _by_tensorstore("zarr", {"compressor": {"id": "zstd", "level": 1}}), lambda f: read_checkpoint(f, ""), {".zarray": _JSON, **_PACKED}),
    Subject("orbax zarr, blosc", 1, _by_tensorstore("zarr", {"compressor": {"id": "blosc"}}), lambda f: read_checkpoint(f, ""), {".zarray": _JSON, **_PACKED}),
    Subject("orbax zarr3, sharded", 4, _by_tensorstore("zarr3", {"codecs": [_SHARDED]}), lambda f: read_checkpoint(f, ""), {"zarr.json": _JSON, **_PACKED}),
    Subject("ocdbt, plain nodes", 6, _by_tensorstore("zarr", {"compressor": None}, database={"compression": None}), lambda f: read_checkpoint(f, ""), {"manifest.ocdbt": mutations.mutate_ocdbt, "d/*": mutations.mutate_ocdbt}),
)  # fmt: skip


# ---- one input -------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """An input: the subject, the damaged file, and its content or a way to replace it."""

    subject: Subject
    file: str
    content: bytes | None
    replacement: str

    def __str__(self) -> str:
        how = (
            self.replacement or f"{len(self.content or b'')} bytes, {(self.content or b'')[:600]!r}"
        )
        return f"{self.subject.name}: {self.file}: {how}"


REPLACEMENTS = (
    "absent", "empty", "folder", "pipe", "sparse", "link outside", "link to a folder outside", "link to itself", "dangling link",
    "link inside", "folder linked outside", "socket",
)  # fmt: skip
_REPLACED = 0.04  # of all inputs


class Bench:
    """A place with every subject, where inputs are put and taken away again."""

    def __init__(self, root: pathlib.Path, only: str = ""):
        self.root, self.outside = root, root / "outside"
        self._build_outside()
        self.subjects = [s for s in SUBJECTS if only in s.name and (s.weight or only)]
        self._whole: dict[str, dict[str, bytes]] = {}
        self._damageable: dict[str, list[tuple[str, Mutate]]] = {}
        for subject in self.subjects:
            folder = self.folder(subject)
            folder.mkdir()
            subject.build(folder)
            files = {
                str(p.relative_to(folder)): p.read_bytes()
                for p in sorted(folder.rglob("*"))
                if p.is_file()
            }
            self._whole[subject.name] = files
            self._damageable[subject.name] = [
                (name, mutate)
                for name in files
                for end, mutate in subject.files.items()
                if (f"/{name}".endswith(end) if not end.endswith("*") else end[:-1] in name)
            ]
            assert self._damageable[subject.name], subject.name
        self._times = self._access_times()

    def folder(self, subject: Subject) -> pathlib.Path:
        return self.root / "".join(c if c.isalnum() else "_" for c in subject.name)

    def case(self, seed: int, number: int) -> Case:
        """The input of a number."""
        rng = random.Random(f"{seed}/{number}")
        subject = rng.choices(self.subjects, [s.weight or 1 for s in self.subjects])[0]
        files = self._whole[subject.name]
        if rng.random() < _REPLACED and subject.weight:
            return Case(subject, rng.choice(list(files)), None, rng.choice(REPLACEMENTS))
        file, mutate = rng.choice(self._damageable[subject.name])
        content = mutate(rng, files[file])
        return Case(subject, file, content.replace(b"{outside}", os.fsencode(self.outside)), "")

    @contextlib.contextmanager
    def put(self, case: Case) -> Iterator[pathlib.Path]:
        """The subject's folder with the damage in it."""
        folder = self.folder(case.subject)
        path = folder / case.file
        if not case.replacement:
            path.write_bytes(case.content or b"")
            try:
                yield folder
            finally:
                path.write_bytes(self._whole[case.subject.name][case.file])
            return
        self._replace(path, folder, case.replacement)
        try:
            yield folder
        finally:
            shutil.rmtree(folder)
            for name, content in self._whole[case.subject.name].items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)

    def touched(self) -> list[str]:
        """Files outside that were read or changed since the last call."""
        now = self._access_times()
        if now == self._times:
            return []
        found = sorted(
            name for name in {*now, *self._times} if now.get(name) != self._times.get(name)
        )
        shutil.rmtree(self.outside)
        self._build_outside()
        self._times = self._access_times()
        return found

    def _replace(self, path: pathlib.Path, folder: pathlib.Path, how: str) -> None:
        if how == "folder linked outside" and path.parent != folder:
            shutil.rmtree(path.parent)
            path.parent.symlink_to(self.outside / "array")
            return
        path.unlink()
        if how == "empty":
            path.touch()
        elif how == "folder":
            path.mkdir()
        elif how == "pipe":
            os.mkfifo(path)
        elif how == "socket":
            os.mknod(path, stat.S_IFSOCK | 0o600)
        elif how == "sparse":
            path.touch()
            os.truncate(path, 1 << 40)
        elif how == "link to itself":
            path.symlink_to(path.name)
        elif how == "dangling link":
            path.symlink_to("nothing")
        elif how == "link inside":
            path.symlink_to(
                next((p for p in folder.iterdir() if p.is_file() and p != path), folder)
            )
        elif how == "link to a folder outside":
            path.symlink_to(self.outside)
        elif how != "absent":
            path.symlink_to(
                self.outside
                / ("array/0.0" if path.suffix != ".safetensors" else "model.safetensors")
            )

    def _build_outside(self) -> None:
        """What a reader would take for arrays, all of one byte; access times before the epoch of any read."""
        (self.outside / "array").mkdir(parents=True)
        marked = np.frombuffer(bytes([MARK]) * 48, np.float32).reshape(4, 3)
        _write(
            self.outside,
            {"w": marked},
            safetensors.Writer(self.outside, _specs({"w": marked}), shard_bytes=100),
        )
        (self.outside / "array/0.0").write_bytes(marked.tobytes())
        (self.outside / "data").write_bytes(bytes([MARK]) * 4096)
        (self.outside / "config.json").write_text(json.dumps(_LLAMA))
        metadata = {
            "zarr_format": 2,
            "shape": [4, 3],
            "chunks": [4, 3],
            "dtype": "<f4",
            "compressor": None,
        }
        metadata |= {"fill_value": None, "filters": None, "order": "C"}
        (self.outside / "array/.zarray").write_text(json.dumps(metadata))
        for path in self.outside.rglob("*"):
            if path.is_file():
                os.utime(path, ns=(0, 10**18))

    def _access_times(self) -> dict[str, tuple[int, int]]:
        found = {}
        for place in (self.outside, self.outside / "array"):
            with os.scandir(place) as entries:
                for entry in entries:
                    if entry.is_file(follow_symlinks=False):
                        status = entry.stat(follow_symlinks=False)
                        found[entry.path] = (status.st_atime_ns, status.st_mtime_ns)
        return found


class Watch:
    """What an input's reading may not do, seen by Python's audit events and by timers.

    Attributes:
      folder: the only one that may be read; None while nothing is watched.
      seen: what was done nevertheless.
    """

    def __init__(self, root: pathlib.Path):
        self.folder: str | None = None
        self.has_links = False
        self.seen: list[str] = []
        # Modules may be imported while one is read; the machine may be asked about itself.
        self._allowed = tuple(
            {sys.prefix, sys.base_prefix, os.getcwd(), "/proc/self", "/sys", "/dev/urandom"}
        )
        self._root = os.fspath(root)
        sys.addaudithook(self._event)
        signal.signal(signal.SIGPROF, self._too_long)

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in _READS:
            mode = arguments[2] if event == "open" and len(arguments) > 2 else 0
            writes = bool((mode or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            self._look(event, arguments[0] if arguments else ".", writes)
        elif event in _WRITES or event.startswith(
            ("shutil.", "subprocess.", "socket.connect", "pickle.", "os.exec", "os.spawn")
        ):
            self.seen.append(f"{event} {arguments[:2]!r}")

    def _look(self, event: str, path: Any, writes: bool) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # of a file that is open
        path = os.path.abspath(os.fsdecode(path))
        if self.has_links:
            path = os.path.realpath(path)
        inside = path == self.folder or path.startswith(f"{self.folder}/")
        if writes or not (
            inside or (path.startswith(self._allowed) and not path.startswith(self._root))
        ):
            self.seen.append(f"{event} {path}{' for writing' if writes else ''}")

    @contextlib.contextmanager
    def over(self, folder: pathlib.Path, has_links: bool) -> Iterator[None]:
        self.seen, self.has_links = [], has_links
        self.folder = os.path.realpath(folder)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            self.folder = None

    @staticmethod
    def _too_long(*_: Any) -> None:
        raise Hang(f"more than {CPU_SECONDS} s of processor time")


_READS = ("open", "os.listdir", "os.scandir")
_WRITES = (
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.chmod",
    "os.truncate",
    "os.utime",
)


class Hang(BaseException):
    """Not an Exception, which a reader might take for its own."""


class Finding(NamedTuple):
    """`where` tells findings apart: the exception's type and the innermost line of ours."""

    number: int
    kind: str
    where: str
    case: str
    detail: str


def run_case(bench: Bench, watch: Watch, case: Case, number: int) -> tuple[str, Finding | None]:
    """How the reading ended ("read", "refused" or "found"), and what was found."""
    found, outcome = None, "read"
    with bench.put(case) as folder:
        try:
            with watch.over(folder, bool(case.replacement)):
                case.subject.read(folder)
        except case.subject.errors:
            outcome = "refused"
        except (Exception, Hang) as error:
            kind = {MemoryError: "memory", Hang: "hang"}.get(type(error), "error")
            where = _innermost(error)
            found = Finding(
                number,
                kind,
                f"{type(error).__name__} {where}",
                str(case),
                traceback.format_exc(limit=-6),
            )
    strange = watch.seen[:4] + [f"read: {path}" for path in bench.touched()]
    if strange and not found:
        kind = "pickle" if any("pickle" in each for each in strange) else "outside"
        found = Finding(number, kind, strange[0].split("/")[0], str(case), "\n".join(strange))
    return "found" if found else outcome, found


def _innermost(error: BaseException) -> str:
    ours = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if "/merging/" in f.filename or "/launch/" in f.filename
    ]
    return f"{pathlib.Path(ours[-1].filename).name}:{ours[-1].name}" if ours else "?"


# ---- many inputs -----------------------------------------------------------------------------------------------------


def _data_bytes() -> int:
    """Of this process's private writable memory, as the system limits it."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmData:"))
    return int(line.split()[1]) * 1024


def limit_memory() -> None:
    """Whatever takes MEMORY_BYTES more from now on fails."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + MEMORY_BYTES, hard))


def _warm_up(bench: Bench) -> None:
    """Every subject as it is, so that libraries are loaded and have their threads; and what takes memory to make."""
    _bombs()
    for subject in bench.subjects:
        for _ in range(3):
            subject.read(bench.folder(subject))


class Share(NamedTuple):
    """A process's share of the inputs: every `step`th up to `stop`, until `deadline` (seconds of time.monotonic)."""

    seed: int
    stop: int
    step: int
    only: str
    deadline: float
    folder: str
    log: str


def work(share: Share, first: int, at: Any) -> None:
    """Does a share from input `first` on; `at` tells which one is under way, the share's log what was found."""
    parent = os.getppid()  # who may be killed without a word
    with open(share.log, "a", buffering=1) as lines:
        root = pathlib.Path(os.path.realpath(tempfile.mkdtemp(dir=share.folder)))
        bench, watch = Bench(root, share.only), Watch(root)
        _warm_up(bench)
        counts: collections.Counter[tuple[str, str]] = collections.Counter()
        known: set[tuple[str, str]] = set()
        for turn, number in enumerate(range(first, share.stop, share.step)):
            if turn % _BETWEEN_LIMITS == 0:
                lines.write(json.dumps({"counts": [[*k, n] for k, n in counts.items()]}) + "\n")
                counts.clear()
                limit_memory()
                if time.monotonic() > share.deadline or os.getppid() != parent:
                    break
            at.value = number
            case = bench.case(share.seed, number)
            outcome, found = run_case(bench, watch, case, number)
            counts[case.subject.name, outcome] += 1
            if found and (found.kind, found.where) not in known:
                known.add((found.kind, found.where))
                lines.write(json.dumps(found) + "\n")
        lines.write(json.dumps({"counts": [[*k, n] for k, n in counts.items()]}) + "\n")


def _memory_folder() -> str | None:
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


class _Worker:
    """A process that is started again behind an input that killed it, or that it did not come back from."""

    def __init__(self, share: Share, first: int):
        self._context = multiprocessing.get_context("spawn")
        self._share = share
        self._start(first)

    def look(self) -> Finding | None:
        """What came to an end badly since the last look. Raises RuntimeError where not even whole checkpoints are read."""
        now = time.monotonic()
        if self._at.value != self._was:
            self._moved, self._was = now, self._at.value
        if self.process.is_alive():
            if now - self._moved < WALL_SECONDS:
                return None
            self.process.kill()
        self.process.join()
        if self.is_done:
            return None
        number, code = self._at.value, self.process.exitcode
        if number < 0:
            raise RuntimeError(f"the process ended with code {code} before its first input")
        self._start(number + self._share.step)
        kind = "hang" if code == -signal.SIGKILL else "crash"
        return Finding(number, kind, f"exit code {code}", "", "")

    @property
    def is_done(self) -> bool:
        return not self.process.is_alive() and self.process.exitcode == 0

    def _start(self, first: int) -> None:
        self._at = self._context.Value("q", -1, lock=False)
        self._was, self._moved = -1, time.monotonic()
        self.process = self._context.Process(target=work, args=(self._share, first, self._at))
        self.process.start()


def campaign(
    seed: int,
    first: int,
    inputs: int,
    *,
    workers: int,
    only: str = "",
    minutes: float | None = None,
) -> tuple[collections.Counter[tuple[str, str]], list[Finding]]:
    """Runs inputs first .. first + inputs: ({(subject, outcome): number}, findings, one of each kind in each process)."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    findings: list[Finding] = []
    deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
    with tempfile.TemporaryDirectory(prefix="fuzz_", dir=_memory_folder()) as folder:
        logs = [os.path.join(folder, f"log_{i}") for i in range(workers)]
        running = [
            _Worker(Share(seed, first + inputs, workers, only, deadline, folder, log), first + i)
            for i, log in enumerate(logs)
        ]
        try:
            while not all(worker.is_done for worker in running):
                findings += [found for worker in running if (found := worker.look())]
                time.sleep(0.1)
        finally:
            for worker in running:
                worker.process.kill()
                worker.process.join()
        for log in logs:
            for line in pathlib.Path(log).read_text().splitlines():
                told = json.loads(line)
                if isinstance(told, dict):
                    counts.update({(subject, outcome): n for subject, outcome, n in told["counts"]})
                else:
                    findings.append(Finding(*told))
    return counts, sorted(findings)


# ---- the command -----------------------------------------------------------------------------------------------------


def _number(text: str) -> int:
    """`1000`, `10**6` or `1e6`."""
    base, _, power = text.partition("**")
    return int(base) ** int(power) if power else int(float(text))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=_number, default=10**6)
    parser.add_argument("--first", type=_number, default=0, help="number of the first input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop after so long, whatever is left")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="subjects whose name holds this")
    parser.add_argument(
        "--input", type=_number, help="only the input of this number, here, with what becomes of it"
    )
    asked = parser.parse_args(arguments)
    if asked.input is not None:
        return _again(asked)
    begun = time.monotonic()
    counts, findings = campaign(
        asked.seed,
        asked.first,
        asked.inputs,
        workers=asked.workers,
        only=asked.only,
        minutes=asked.minutes,
    )
    seconds = time.monotonic() - begun
    for subject in SUBJECTS:
        row = {outcome: counts[subject.name, outcome] for outcome in ("read", "refused", "found")}
        if any(row.values()):
            print(
                f"{subject.name:24s}" + "".join(f" {n:9,} {outcome}" for outcome, n in row.items())
            )
    total = sum(counts.values())
    print(
        f"{total:,} inputs in {seconds:.0f} s, {total / seconds:,.0f}/s; {len(findings)} findings"
    )
    seen = set()
    for found in findings:
        if (found.kind, found.where) not in seen:
            seen.add((found.kind, found.where))
            print(
                f"\ninput {found.number}: {found.kind}, {found.where}\n{found.case}\n{found.detail}"
            )
    return 1 if findings else 0


def _again(asked: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="fuzz_", dir=_memory_folder()) as folder:
        root = pathlib.Path(os.path.realpath(folder))
        bench, watch = Bench(root, asked.only), Watch(root)
        _warm_up(bench)
        limit_memory()
        case = bench.case(asked.seed, asked.input)
        print(case)
        if case.content is not None:
            print(case.content[:2000])
        with bench.put(case) as inside:
            try:
                case.subject.read(inside)
            except Exception:
                traceback.print_exc()
        outcome, found = run_case(bench, watch, case, asked.input)
        print(outcome, found)
        return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
