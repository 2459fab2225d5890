"""What the fuzz campaign found, small and by name; packed chunks that hold far more than they should; no pickle anywhere."""

from __future__ import annotations

import ast
import gzip
import json
import os
import pathlib
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import tensorstore as ts

from launch import show
from merging import manifest
from merging.checkpoints import (
    boxes,
    codecs,
    huggingface,
    memory,
    open_checkpoint,
    orbax,
    storage,
    t5x,
)
from merging.checkpoints.format import CheckpointError
from merging.models import huggingface as huggingface_models
from merging.models import model_file
from tests.campaigns import fuzz
from tests.campaigns.mutations import sealed, zstd_bomb
from tests.merging.checkpoints.trees_common import copy, memory_reader, read_all

REPOSITORY = pathlib.Path(__file__).parents[3]
SUBJECTS = {subject.name: subject for subject in fuzz.SUBJECTS}


def built(name: str, folder: pathlib.Path) -> pathlib.Path:
    """One of the campaign's checkpoints, whole."""
    folder.mkdir()
    SUBJECTS[name].build(folder)
    SUBJECTS[name].read(folder)
    return folder


def edited(path: pathlib.Path, change: Callable[[dict], object]) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


# ---- JSON that says something else than it should --------------------------------------------------------------------

NO_KEYS = {"key_metadata": "", "value_metadata": {"value_type": "np.ndarray"}}


@pytest.mark.parametrize(
    ("subject", "file", "change", "message"),
    [
        ("orbax zarr", "_METADATA", lambda t: t["tree_metadata"].update(x=NO_KEYS), "wanted its keys"),
        ("orbax zarr3", "flags/zarr.json", lambda t: t.update(codecs=[]), "not as zarr describes"),
        ("orbax zarr3", "flags/zarr.json", lambda t: t.update(codecs=["gzip"]), "codecs .* are not read"),
        ("orbax zarr", "flags/.zarray", lambda t: t.update(compressor={"id": []}), "compressor .* is not read"),
        ("orbax zarr", "flags/.zarray", lambda t: t.update(filters=[{}]), "filters .* are not read"),
        ("config.json, llama", "config.json", lambda t: t.update(model_type=[]), "model_type is"),
        ("config.json, llama", "config.json", lambda t: t.update(x="\ud800"), "not Unicode text"),
        ("config.json, gemma 3", "config.json", lambda t: t.update(num_hidden_layers=2**30), "wanted at most 10000"),
        ("config.json, gemma 3", "config.json", lambda t: t.update(layer_types=3), "layer_types is 3"),
        ("config.json, gemma 3", "config.json", lambda t: t.update(vocab_size=2**62), "vocab_size is"),
        ("model.json", "model.json", lambda t: t.update(family=[]), "family is"),
        ("model.json", "model.json", lambda t: t["sizes"].update(num_kv_heads=0), "num_kv_heads is 0"),
        ("model.json", "model.json", lambda t: t["sizes"].update(window=1.5), "window is 1.5, wanted int"),
        ("model.json", "model.json", lambda t: t["vocabulary"].update(files=3), "wanted names"),
        ("model.json", "model.json", lambda t: t["vocabulary"].update(files=[".."]), "'..' is not there"),
        ("manifest.json", "manifest.json", lambda t: t.update(identity=[]), "identity is .*, wanted an object"),
        ("manifest.json", "manifest.json", lambda t: t.update(checksums={"step": [{}]}), "checksums are"),
        ("manifest.json", "manifest.json", lambda t: t.update(inputs={"base": "x"}), "the manifest says 'x'"),
        ("manifest.json", "out.partial/unfinished.json", lambda t: t.update(seed=1), "seed was 1, is 0"),
    ],
)  # fmt: skip
def test_what_json_says(tmp_path, subject, file, change, message):
    folder = built(subject, tmp_path / "c")
    edited(folder / file, change)
    with pytest.raises(SUBJECTS[subject].errors, match=message):
        SUBJECTS[subject].read(folder)


@pytest.mark.parametrize(
    ("subject", "file"),
    [(s.name, f) for s in fuzz.SUBJECTS for f in s.files if f in ("_METADATA", "config.json", "model.json", "manifest.json")],
)  # fmt: skip
@pytest.mark.parametrize("depth", [40, 5000])
def test_what_is_nested_too_deeply(tmp_path, subject, file, depth):
    folder = built(subject, tmp_path / "c")
    next(folder.rglob(file)).write_text('{"a":' * depth + "1" + "}" * depth)
    with pytest.raises(SUBJECTS[subject].errors, match="nested too deeply"):
        SUBJECTS[subject].read(folder)


# ---- links, pipes and sizes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subject", "file"),
    [
        ("safetensors", "model.safetensors"),
        ("safetensors shards", "model.safetensors.index.json"),
        ("config.json, llama", "config.json"),
        ("model.json", "model.json"),
        ("manifest.json", "manifest.json"),
        ("t5x", "checkpoint"),
        ("orbax zarr", "_METADATA"),
    ],
)
@pytest.mark.parametrize("how", ["outside", "itself", "pipe", "folder", "huge"])
def test_what_is_no_file_of_the_folder(tmp_path, subject, file, how):
    folder = built(subject, tmp_path / "c")
    path = folder / file
    path.rename(tmp_path / "outside")
    if how == "outside":
        path.symlink_to(tmp_path / "outside")
    elif how == "itself":
        path.symlink_to(path.name)
        if file == "model.json":  # which may be absent
            assert model_file.read_if_there(folder) is None
            return
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, 1 << 40)
    with pytest.raises(SUBJECTS[subject].errors):
        SUBJECTS[subject].read(folder)


def test_a_link_to_the_files_that_go_along(tmp_path):
    folder = built("config.json, llama", tmp_path / "c")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="link out of the folder"):
        huggingface.carried_files(folder, None)
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(CheckpointError, match="or no regular file"):
        huggingface.carried_files(folder, None)


@pytest.mark.parametrize("is_named", [False, True])
def test_an_item_that_is_a_link(tmp_path, is_named):
    target = tmp_path / "elsewhere/state"
    target.parent.mkdir()
    built("orbax zarr", target)
    (tmp_path / "step").mkdir()
    (tmp_path / "step/state").symlink_to(target)
    with pytest.raises(CheckpointError, match="is a symbolic link"):
        open_checkpoint(tmp_path / "step", params_path="state" if is_named else "")


def test_a_snapshot_of_the_hub_is_links(tmp_path):
    folder = built("config.json, llama", tmp_path / "whole")
    snapshot = tmp_path / "model/snapshots/5f"
    snapshot.mkdir(parents=True)
    (tmp_path / "model/blobs").mkdir()
    (folder / "config.json").rename(tmp_path / "model/blobs/1")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    assert huggingface_models.read_config(snapshot).vocab_size == 64
    assert not storage.leads_out(snapshot / "config.json")


# ---- packed chunks ---------------------------------------------------------------------------------------------------


def peak_of(work: Callable[[], object]) -> int:
    """Bytes that Python and numpy took at most."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def packed(folder: pathlib.Path, compressor: object, content: bytes) -> pathlib.Path:
    """A checkpoint of T5X of 1000 float32, whose only chunk is what is given."""
    folder.mkdir()
    reader = memory.Reader({"w": np.zeros(1000, np.float32)})
    copy(reader, t5x.Writer(folder, reader.specs()))
    (path,) = folder.glob("target.*")
    metadata = json.loads((path / ".zarray").read_text())
    (path / ".zarray").write_text(json.dumps(metadata | {"compressor": compressor}))
    (path / "0").write_bytes(content)
    return folder


ZEROS = bytes(4000)
LARGE = 64 << 20


@pytest.mark.parametrize(
    ("compressor", "content", "message"),
    [
        ({"id": "gzip", "level": 1}, gzip.compress(bytes(LARGE)), "unpacks to more than 4000 bytes"),
        ({"id": "gzip", "level": 1}, gzip.compress(ZEROS[1:]), "unpacks to 3999 bytes, wanted 4000"),
        ({"id": "gzip", "level": 1}, gzip.compress(ZEROS) + b"\0", "nothing behind them"),
        ({"id": "gzip", "level": 1}, gzip.compress(ZEROS)[:-1], "truncated or damaged"),
        ({"id": "gzip", "level": 1}, b"\x1f\x8b" + bytes(100), "is no gzip"),
        ({"id": "zlib", "level": 1}, gzip.compress(ZEROS), "is no zlib"),
        ({"id": "zstd", "level": 1}, zstd_bomb(1 << 35)[:1_000_000], "far more than the chunk has"),
        ({"id": "zstd", "level": 1}, zstd_bomb(LARGE), "far more than the chunk has"),
        ({"id": "zstd", "level": 1}, b"\x50\x2a\x4d\x18\0\0\0\0" * 1000, "far more than the chunk has"),
        ({"id": "zstd", "level": 1}, zstd_bomb(4000)[:-3], "is no zstd"),
        ({"id": "zstd", "level": 1}, bytes(50), "is no zstd: 0x00000000 begins no frame"),
        ({"id": "blosc", "cname": "lz4", "clevel": 1, "shuffle": 0}, b"\2\1\x13\4" + bytes([255] * 8 + [20, 0, 0, 0] * 2), "unpacks to 4294967295 bytes"),
        ({"id": "lzma"}, b"", "compressor 'lzma' is not read"),
        (None, ZEROS * 2, "has 8000 bytes"),
        ({"id": "gzip", "level": 1}, bytes(2_000_000), "takes 4000 unpacked"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_chunks_unpack_to(tmp_path, compressor, content, message):
    folder = packed(tmp_path / "c", compressor, content)

    def read() -> None:
        with pytest.raises(CheckpointError, match=message):
            read_all(open_checkpoint(folder))

    assert peak_of(read) < LARGE / 4


def test_a_boolean_that_is_none(tmp_path):
    """Of one packed by blosc, tensorstore says what it says of nothing else: that it can't do it."""
    store = {"driver": "file", "path": f"{tmp_path}/c/w/"}
    metadata = {"shape": [1], "chunks": [1], "dtype": "|b1", "compressor": {"id": "blosc"}}
    ts.open({"driver": "zarr", "kvstore": store, "metadata": metadata}, create=True).result()[
        ...
    ] = np.array([True])
    describe(tmp_path / "c")
    chunk = tmp_path / "c" / "w" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match=str(chunk)):
        read_all(open_checkpoint(tmp_path / "c"))


@pytest.mark.parametrize("named", ["gzip", "zlib", "bz2", "zstd", "blosc"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_packing_is_read(tmp_path, named, order):
    """As tensorstore writes it, compressible or not, chunks of several sizes."""
    rng = np.random.default_rng(0)
    for number, array in enumerate(
        (rng.standard_normal((300, 40)).astype(np.float32), np.repeat(np.arange(64.0), 200).reshape(64, 200))
    ):  # fmt: skip
        store = {"driver": "file", "path": f"{tmp_path}/c{number}/w/"}
        metadata = {
            "shape": array.shape,
            "chunks": [70, 33],
            "compressor": {"id": named},
            "order": order,
        }
        metadata["dtype"] = array.dtype.str
        ts.open({"driver": "zarr", "kvstore": store, "metadata": metadata}, create=True).result()[
            ...
        ] = array
        describe(tmp_path / f"c{number}")
        reader = open_checkpoint(tmp_path / f"c{number}")
        for index in [boxes.whole(array.shape), (slice(3, 60), slice(30, 40))]:
            assert reader.read("w", index).tobytes() == np.ascontiguousarray(array[index]).tobytes()


LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
BIG = {"name": "bytes", "configuration": {"endian": "big"}}
GZIP = {"name": "gzip", "configuration": {"level": 1}}
TURNED = {"name": "transpose", "configuration": {"order": [1, 0]}}
CRC = {"name": "crc32c"}


def sharded(*inside: dict, **options: object) -> dict:
    told = {"chunk_shape": [5, 4], "codecs": list(inside), "index_codecs": [LITTLE, CRC]}
    return {"name": "sharding_indexed", "configuration": told | options}


@pytest.mark.parametrize(
    "chain",
    [
        [LITTLE], [BIG], [LITTLE, CRC], [LITTLE, GZIP], [LITTLE, GZIP, CRC], [BIG, GZIP], [TURNED, LITTLE, GZIP],
        [LITTLE, {"name": "zstd", "configuration": {"level": 1}}, CRC],
        [sharded(LITTLE)], [sharded(LITTLE, GZIP, CRC)], [sharded(TURNED, LITTLE, index_location="start")],
    ],
)  # fmt: skip
def test_every_chain_of_zarr_3_is_read(tmp_path, chain):
    array = np.arange(600, dtype=np.float32).reshape(30, 20)
    metadata = {"shape": array.shape, "data_type": "float32", "codecs": chain, "fill_value": 0.0}
    metadata["chunk_grid"] = {"name": "regular", "configuration": {"chunk_shape": [10, 8]}}
    store = {"driver": "file", "path": f"{tmp_path}/w/"}
    ts.open({"driver": "zarr3", "kvstore": store, "metadata": metadata}, create=True).result()[
        ...
    ] = array
    describe(tmp_path)
    reader = open_checkpoint(tmp_path)
    for index in [boxes.whole(array.shape), (slice(3, 25), slice(5, 20))]:
        assert reader.read("w", index).tobytes() == array[index].tobytes()


def describe(folder: pathlib.Path) -> None:
    """As a checkpoint of Orbax with one array, w."""
    key = {"key": "w", "key_type": 2}
    entry = {"key_metadata": [key], "value_metadata": {"value_type": "np.ndarray"}}
    (folder / "_METADATA").write_text(json.dumps({"tree_metadata": {"w": entry}}))


def test_a_large_chunk_that_packs_well_is_read(tmp_path):
    """zstd at all its levels ends blocks early: what is told of them may not refuse a good chunk."""
    rng = np.random.default_rng(0)
    runs = [
        np.repeat(rng.integers(0, 9, 400).astype(np.uint8), rng.integers(1, 5000, 400))
        for _ in range(2)
    ]
    array = np.concatenate([runs[0], rng.integers(0, 255, 1 << 20).astype(np.uint8), runs[1]])
    for level in (1, 3, 12, 19):
        store = {"driver": "file", "path": f"{tmp_path}/{level}/"}
        metadata = {
            "shape": array.shape,
            "chunks": array.shape,
            "dtype": "|u1",
            "compressor": {"id": "zstd", "level": level},
        }
        ts.open({"driver": "zarr", "kvstore": store, "metadata": metadata}, create=True).result()[
            ...
        ] = array
        data = (tmp_path / f"{level}/0").read_bytes()
        codecs.check("zstd", lambda at, n, data=data: data[at : at + n], len(data), array.nbytes, "chunk")  # fmt: skip


def test_a_node_that_unpacks_to_too_much(tmp_path):
    copy(memory_reader(), orbax.Writer(tmp_path, memory_reader().specs()))
    path = tmp_path / "manifest.ocdbt"
    bomb = zstd_bomb(1 << 30)
    path.write_bytes(sealed(path.read_bytes()[:12] + b"\0\1" + bomb + bytes(4)))
    with pytest.raises(CheckpointError, match="may unpack to more than 268435456 bytes"):
        open_checkpoint(tmp_path)


# ---- no pickle -------------------------------------------------------------------------------------------------------

_PICKLES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "torch",
}


def test_nothing_is_unpickled():
    """No module that reads pickles is imported anywhere in the library, the tasks and the commands, and numpy is not asked to."""
    seen = 0
    for path in (
        p for part in ("merging", "launch", "tasks") for p in (REPOSITORY / part).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {name.split(".")[0] for name in names} & _PICKLES, (path, names)
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in (
                "load",
                "read_pickle",
                "fromfile",
            ):
                called = ast.unparse(node)
                assert (
                    not called.startswith(("np.load(", "numpy.load("))
                    or "allow_pickle=False" in called
                ), (path, called)
                assert "pickle" not in called.replace("allow_pickle=False", ""), (path, called)
            seen += 1
    assert seen > 10_000


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "model.pkl"])
def test_a_folder_of_pickles_is_refused(tmp_path, file):
    (tmp_path / file).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match="pickles such as .* are never loaded"):
        open_checkpoint(tmp_path)
    assert manifest.read(tmp_path) is None and model_file.read_if_there(tmp_path) is None
    with pytest.raises(CheckpointError):
        list(show.shown([str(tmp_path)]))
