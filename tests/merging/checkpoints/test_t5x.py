"""T5X: what it wrote is read bit by bit, and round trips through both its formats keep every bit."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from merging.checkpoints import FORMATS, boxes, memory, open_checkpoint, orbax, t5x
from merging.checkpoints.format import CheckpointError, Reader, Writer
from tests.merging.checkpoints.trees_common import (
    ARRAYS,
    copy,
    digests,
    made,
    memory_reader,
    nested,
    read_all,
    same,
)
from tests.quick_cases import mostly_slow

REAL = [
    "t5_legacy/checkpoint_4",
    "t5_legacy_bf16/checkpoint_4",
    "t5_orbax/checkpoint_4",
    "palm_adamw_ob/checkpoint_5",
    "mp_legacy/checkpoint_5",
]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def inline(array: Any) -> msgpack.ExtType:
    array = np.asarray(array)
    name = "bfloat16" if array.dtype == BFLOAT16 else array.dtype.name
    return msgpack.ExtType(1, msgpack.packb((array.shape, name, array.tobytes())))


def spec(place: str, array: np.ndarray, **changes: Any) -> dict[str, Any]:
    described = {
        "driver": "zarr",
        "dtype": array.dtype.name,
        "kvstore": {"driver": "file", "path": f"{place}/"},
        "metadata": {"chunks": list(array.shape), "compressor": None, "shape": list(array.shape)},
    }
    return described | changes


def write_file(
    folder: pathlib.Path, target: Any, *, version: Any = 3, step: Any = None
) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    state = {"step": inline(np.int32(1)) if step is None else step, "param_states": {}}
    tree = {"version": version, "optimizer": {"target": target, "state": state}}
    (folder / "checkpoint").write_bytes(msgpack.packb(tree))
    return folder


def write_zarr(folder: pathlib.Path, array: np.ndarray, **metadata: Any) -> None:
    dtype = "bfloat16" if array.dtype == BFLOAT16 else array.dtype.str
    store = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder}/"}}
    chunks = metadata.pop("chunks", list(array.shape))
    told = {"shape": list(array.shape), "chunks": chunks, "dtype": dtype, **metadata}
    ts.open({**store, "metadata": told}, create=True).result()[...] = array


# ---- what T5X wrote ------------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize("name", mostly_slow(REAL, quick=[REAL[0], REAL[2]]))
def test_every_array_of_real_checkpoints(real_data, name):
    expected = json.loads((real_data / "t5x/expected.json").read_text())[name]
    reader = open_checkpoint(real_data / "t5x" / name, params_path="")
    assert isinstance(reader, Reader)
    assert digests(reader) == expected
    # By default the parameters alone; the rest beside them.
    reader = open_checkpoint(real_data / "t5x" / name)
    params = {n.removeprefix("target/"): v for n, v in expected.items() if n.startswith("target/")}
    assert digests(reader) == params
    assert {f"target/{n}" for n in params} | reader.rest.keys() == expected.keys()
    reader.check_unchanged()


@pytest.mark.real
@pytest.mark.parametrize("name", mostly_slow(REAL, quick=["t5_legacy_bf16/checkpoint_4"]))
def test_real_checkpoints_go_round(tmp_path, real_data, name):
    """Orbax -> T5X -> T5X in Orbax -> Orbax, optimizer slots included."""
    expected = json.loads((real_data / "t5x/expected.json").read_text())[name]
    reader = open_checkpoint(real_data / "t5x" / name)
    chain = {
        "legacy": lambda out: FORMATS["t5x"](out, reader.specs(), like=reader, optimizer_state="base"),
        "gzip": lambda out: t5x.Writer(out, reader.specs(), like=reader, optimizer_state="base", gzip_level=1, chunk_bytes=99),
        "t5x_orbax": lambda out: FORMATS["t5x_orbax"](out, reader.specs(), like=reader, optimizer_state="base"),
        "orbax": lambda out: orbax.Writer(out, reader.specs(), like=reader, optimizer_state="base", chunk_bytes=1000),
    }  # fmt: skip
    for kind, writer in chain.items():
        copy(reader, writer(made(tmp_path / kind)), 1000)
        assert digests(open_checkpoint(tmp_path / kind, params_path="")) == expected, kind
        reader = open_checkpoint(tmp_path / kind)  # the next reads what this one wrote


@pytest.mark.real
def test_the_library_restores_what_is_written_as_t5x_does(tmp_path, real_data):
    original = real_data / "t5x/t5_orbax/checkpoint_4"
    reader = open_checkpoint(original)
    copy(
        reader,
        t5x.OrbaxWriter(made(tmp_path / "c"), reader.specs(), like=reader, optimizer_state="base"),
        1000,
    )
    with ocp.StandardCheckpointer() as checkpointer:
        want, got = (checkpointer.restore(p / "state") for p in (original, tmp_path / "c"))
    assert same(read_all(memory.Reader(got)), read_all(memory.Reader(want)))


# ---- forms that the format has -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "compressor", [None, {"id": "gzip", "level": 1}, {"id": "zstd", "level": 1}]
)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_arrays_beside_the_file(tmp_path, compressor, dtype):
    array = np.arange(120).astype(dtype).reshape(12, 10)
    write_zarr(tmp_path / "target.a.b", array, compressor=compressor, chunks=[5, 4])
    reader = open_checkpoint(write_file(tmp_path, {"a": {"b": spec("target.a.b", array)}}))
    assert same(read_all(reader), {"a/b": array})
    index = (slice(3, 7), slice(0, 10))
    assert reader.read("a/b", index).tobytes() == array[index].tobytes()


def test_the_path_of_an_old_tensorstore_and_the_bucket(tmp_path):
    array = np.ones((2, 3), np.float32)
    write_zarr(tmp_path / "target.a", array)
    old = spec("", array, kvstore={"driver": "gfile"}, path="target.a/")
    bucket = spec(
        "", array, kvstore={"driver": "gcs", "bucket": "t5x-dummy-bucket", "path": "target.a/"}
    )
    reader = open_checkpoint(
        write_file(tmp_path, {"x": old, "y": bucket, "z": "PLACEHOLDER://target.a"})
    )
    assert same(read_all(reader), dict.fromkeys("xyz", array))


def test_bfloat16_of_version_2(tmp_path):
    array = np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3)
    write_zarr(tmp_path / "target.a", array.view(np.uint16))
    described = spec("target.a", array.view(np.uint16))
    assert same(
        read_all(open_checkpoint(write_file(tmp_path, {"a": described}, version=2))), {"a": array}
    )
    unsigned = open_checkpoint(write_file(tmp_path, {"a": described}))
    assert unsigned.specs()["a"].dtype == np.uint16


def test_an_absent_chunk_is_the_fill_value_or_an_error(tmp_path):
    array = np.zeros((8, 4), np.float32)
    array[5] = 1
    for compressor in (None, {"id": "gzip", "level": 1}):
        write_zarr(
            tmp_path / f"target.{compressor is None}",
            array,
            chunks=[2, 4],
            compressor=compressor,
            fill_value=0,
        )
        assert len(list((tmp_path / f"target.{compressor is None}").glob("[0-9]*"))) == 1
    target = {"a": spec("target.True", array), "b": spec("target.False", array)}
    reader = open_checkpoint(write_file(tmp_path, target))
    assert same(read_all(reader), {"a": array, "b": array})
    (tmp_path / "target.True/2.0").unlink()  # what was there must stay
    with pytest.raises(CheckpointError, match="vanished"):
        reader.read("a", boxes.whole(array.shape))
    write_zarr(tmp_path / "target.c", array, chunks=[2, 4])
    write_file(tmp_path, {"c": spec("target.c", array)})
    assert same(read_all(open_checkpoint(tmp_path)), {"c": array})
    (tmp_path / "target.c/0.0").unlink()  # zeros, but nothing says that they may be absent
    with pytest.raises(CheckpointError, match="3 chunks are stored"):
        open_checkpoint(tmp_path)


def test_inline_arrays_and_scalars(tmp_path):
    parts = np.arange(24, dtype=np.float32)
    chunked = {
        "__msgpack_chunked_array__": True,
        "shape": {"0": 4, "1": 6},
        "chunks": {"0": inline(parts[:10]), "1": inline(parts[10:11]), "2": inline(parts[11:])},
    }
    target = {name: inline(array) for name, array in ARRAYS.items() if "/" not in name}
    target |= {"parts": chunked, "half": {"deep.er": inline(np.ones(3, np.float16))}, "empty": {}}
    reader = open_checkpoint(write_file(tmp_path, target, step=7))
    want = {n: a for n, a in ARRAYS.items() if "/" not in n}
    want |= {"parts": parts.reshape(4, 6), "half/deep.er": np.ones(3, np.float16)}
    assert same(read_all(reader), want)
    for index in boxes.row_boxes((4, 6), 5):
        np.testing.assert_array_equal(reader.read("parts", index), want["parts"][index])
    assert reader.structure.constants[("state", "step")] == 7
    assert reader.structure.constants[("target", "empty")] == {}


def test_a_slice_of_an_inline_array_reads_its_bytes_only(tmp_path, monkeypatch):
    array = np.arange(1 << 18, dtype=np.float32).reshape(1 << 12, 64)
    folder = write_file(tmp_path, {"a": inline(array)})
    read = []
    into = t5x.Folder.read_into
    monkeypatch.setattr(
        t5x.Folder,
        "read_into",
        lambda self, b, o, buffer: (read.append(len(buffer)), into(self, b, o, buffer)),
    )
    reader = open_checkpoint(folder)
    assert sum(read) < 400_000 < array.nbytes
    read.clear()
    index = (slice(100, 103), slice(0, 64))
    np.testing.assert_array_equal(reader.read("a", index), array[index])
    assert sum(read) == array[index].nbytes


# ---- writing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", [t5x.Writer, t5x.OrbaxWriter])
@pytest.mark.parametrize("chunk_bytes", [40, 1 << 20])
def test_what_is_written_is_read(tmp_path, writer, chunk_bytes):
    out = made(tmp_path / "checkpoint_7")
    made_writer = writer(out, memory_reader().specs(), step=7, chunk_bytes=chunk_bytes)
    assert isinstance(made_writer, Writer)
    copy(memory_reader(), made_writer)
    reader = open_checkpoint(out)
    assert same(read_all(reader), ARRAYS)
    assert list(reader.rest) == ["state/step"]
    assert reader.read_rest("state/step", ()) == 7


def test_msgpack_itself_reads_what_is_written(tmp_path):
    """By the library: version, tensorstore's descriptions, inline arrays; and tensorstore opens each by its description."""
    copy(memory_reader(), t5x.Writer(made(tmp_path / "c"), memory_reader().specs(), gzip_level=1))
    tree = msgpack.unpackb((tmp_path / "c/checkpoint").read_bytes(), strict_map_key=False)
    assert tree["version"] == 3 and tree["optimizer"]["state"]["param_states"] == {}
    target = tree["optimizer"]["target"]
    assert target["scalar"] == inline(ARRAYS["scalar"])
    described = target["decoder"]["layers_0"]["mlp"]["wi"]["kernel"]
    assert described["kvstore"]["path"] == "target.decoder.layers_0.mlp.wi.kernel/"
    store = {"driver": "file", "path": f"{tmp_path}/c/{described['kvstore']['path']}"}
    array = ts.open({**described, "kvstore": store}).result().read().result()
    np.testing.assert_array_equal(array, ARRAYS["decoder/layers_0/mlp/wi/kernel"])


@pytest.mark.parametrize("kind", ["t5x", "t5x_orbax"])
def test_processes_write_one_checkpoint(tmp_path, kind):
    out = made(tmp_path / "c")
    specs = memory_reader().specs()
    writers = [FORMATS[kind](out, specs, process_index=i, process_count=3) for i in range(3)]
    for writer in (writers[1], writers[2], writers[0]):
        copy(memory_reader(), writer)
    assert same(read_all(open_checkpoint(out)), ARRAYS)


def test_what_t5x_does_not_partition_is_in_its_file_whoever_writes_it(tmp_path):
    """Of Adafactor's state, which T5X restores so only; from Orbax, where every leaf is an array; by two processes."""
    slots = {"m": np.zeros(1), "v": np.zeros(1), "v_row": np.arange(5.0), "v_col": np.arange(3.0)}
    slots = {name: array.astype(np.float32) for name, array in slots.items()}
    slots |= {"bias/v": np.ones(4, np.float32)}
    state = {f"state/param_states/{name}": array for name, array in slots.items()}
    params = {"target/kernel": np.ones((5, 3), np.float32), "target/bias": np.ones(4, np.float32)}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "base", nested({**params, **state, "state/step": np.int32(3)}))
    base = open_checkpoint(tmp_path / "base", params_path="target")
    out, options = made(tmp_path / "c"), {"like": base, "optimizer_state": "base"}
    for i in (1, 0):
        copy(base, t5x.Writer(out, base.specs(), **options, process_index=i, process_count=2))
    written = msgpack.unpackb((out / "checkpoint").read_bytes())["optimizer"]["state"]
    assert written["step"] == inline(np.int32(3))
    for name in ("m", "v", "v_row", "v_col"):
        assert written["param_states"][name] == inline(slots[name])
    assert written["param_states"]["bias"]["v"]["metadata"]["shape"] == [4]
    found = open_checkpoint(out)
    assert all(
        same({n: found.read_rest(n, boxes.whole(a.shape))}, {n: a}) for n, a in state.items()
    )


@pytest.mark.parametrize("kind", ["t5x", "t5x_orbax"])
def test_a_closed_writer_leaves_no_checkpoint(tmp_path, kind):
    writer = FORMATS[kind](tmp_path, memory_reader().specs())
    writer.write("bytes", boxes.whole((25, 10)), ARRAYS["bytes"])
    writer.close()
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)


def test_a_state_that_is_not_of_t5x_is_not_kept(tmp_path):
    tree = nested({"params/w": np.ones(2, np.float32), "opt_state/w": np.ones(2, np.float32)})
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", tree)
    reader = open_checkpoint(tmp_path / "c", params_path="params")
    with pytest.raises(ValueError, match="opt_state/w.*OPTIMIZER_STATE='drop'"):
        t5x.Writer(made(tmp_path / "o"), reader.specs(), like=reader, optimizer_state="base")
    copy(reader, t5x.Writer(tmp_path / "o", reader.specs(), like=reader))
    assert same(read_all(open_checkpoint(tmp_path / "o")), {"w": np.ones(2, np.float32)})


# ---- what must not be believed -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["../x", "/etc", "..", "", "a/../../x", "target.a\0", "target.b", "."]
)
def test_no_description_leads_outside(tmp_path, path):
    array = np.ones((2, 3), np.float32)
    for place in (tmp_path / "x", tmp_path / "c/target.a"):
        write_zarr(place, array)
    write_file(tmp_path / "c", {"a": spec(path, array)})
    with pytest.raises(CheckpointError, match="which is no folder with files beside"):
        open_checkpoint(tmp_path / "c")


def ext(shape: Any, dtype: Any, data: bytes) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, data)))


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (ext([1 << 40, 1 << 40], "float32", b"1234"), "4 bytes for"),
        (ext([-1], "float32", b""), "an array of shape"),
        (ext([1], "object", b"12345678"), "dtype 'object' is not read"),
        (ext([1], "float32", b"123"), "3 bytes for"),
        (ext("x", "float32", b"1234"), "an array of shape"),
        (msgpack.ExtType(1, b"\x93"), "bytes wanted"),
        (msgpack.ExtType(2, msgpack.packb((1.0, 2.0))), "complex"),
        (msgpack.ExtType(9, b"x"), "wanted an array"),
        ({"__msgpack_chunked_array__": True}, "without shape and chunks"),
        (
            {
                "__msgpack_chunked_array__": True,
                "shape": {"0": 9},
                "chunks": {"0": inline(np.ones(4))},
            },
            "are not those",
        ),
        (
            {
                "__msgpack_chunked_array__": True,
                "shape": {"0": 4},
                "chunks": {"1": inline(np.ones(4))},
            },
            "lacks part",
        ),
        ([1, 2], "wanted an array or a map"),
        (b"bytes", "wanted an array or a map"),
        ({"a/b": inline(np.ones(1))}, "contains '/'"),
        ({"driver": "zarr3", "kvstore": {}, "metadata": {}}, "wanted an array of zarr"),
    ],
)
def test_hostile_leaves(tmp_path, leaf, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_file(tmp_path, {"a": leaf}))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "bytes wanted"),
        (b"\x93\x01\x02\x03", "wanted a map"),
        (b"\xdf\xff\xff\xff\xff", "bytes wanted"),
        (b"\xdd\xff\xff\xff\xff" + b"\xc0" * 100, "bytes wanted"),
        (b"\xdb\xff\xff\xff\xff", "a string of 4294967295 bytes"),
        (b"\xc6\xff\xff\xff\xff", "4294967295 bytes claimed"),
        (b"\x91" * 1000, "deeper than"),
        (b"\x81\x01\x02", "wanted a string"),
        (b"\x82\xa1a\x01\xa1a\x02", "given twice"),
        (b"\xc1", "begins no item"),
        (b"\x80\x80", "behind the end"),
        (b"\xa1\xff", "not UTF-8"),
        (b'model_checkpoint_path: "x"', "TensorFlow's"),
        (msgpack.packb({"version": 9, "optimizer": {}}), "version 9"),
    ],
)
def test_hostile_files(tmp_path, raw, message):
    (tmp_path / "checkpoint").write_bytes(raw)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_folders_of_steps_are_listed(tmp_path):
    for step in (10, 9, 100):
        write_file(tmp_path / f"checkpoint_{step}", {"a": inline(np.ones(1))})
    with pytest.raises(CheckpointError, match="checkpoint_9, checkpoint_10, checkpoint_100"):
        open_checkpoint(tmp_path)
