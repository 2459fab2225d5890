"""Orbax: what the library writes is read bit by bit, what is written here is restored by the library."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training import train_state
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launch.pod.local import run_local
from merging.checkpoints import FORMATS, boxes, memory, open_checkpoint, orbax
from merging.checkpoints.format import CheckpointError, LeafSpec, Reader, Writer
from tests.merging.checkpoints.trees_common import ARRAYS, copy, made, nested, read_all, same

STORAGES = {
    "ocdbt": {},
    "zarr": {"use_ocdbt": False},
    "zarr3": {"use_ocdbt": False, "use_zarr3": True},
    "ocdbt_zarr3": {"use_zarr3": True},
}


def save(path: pathlib.Path, tree, **options) -> pathlib.Path:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(path, tree)
    return path


def source(arrays=ARRAYS) -> memory.Reader:
    return memory.Reader(arrays)


# ---- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
def test_what_the_library_writes_is_read(tmp_path, storage):
    reader = open_checkpoint(save(tmp_path / "c", nested(ARRAYS), **STORAGES[storage]))
    assert isinstance(reader, Reader)
    assert same(read_all(reader), ARRAYS)
    for name, array in ARRAYS.items():  # boxes, into a buffer of the caller's
        for index in boxes.row_boxes(array.shape, 11):
            out = np.empty(np.shape(array[index]), array.dtype)
            assert reader.read(name, index, out=out) is out
            assert out.tobytes() == array[index].tobytes()
    reader.check_unchanged()


@pytest.mark.parametrize("spec", [("a", "b"), ("b", "a"), (None, ("a", "b")), ("a", None), ()])
@pytest.mark.parametrize("storage", ["ocdbt", "zarr3"])
def test_any_sharding_is_read(tmp_path, spec, storage):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    want = np.arange(16 * 24, dtype=np.float32).reshape(16, 24)
    array = jax.device_put(want, NamedSharding(mesh, PartitionSpec(*spec)))
    reader = orbax.Reader(save(tmp_path / "c", {"w": array}, **STORAGES[storage]))
    assert same(read_all(reader), {"w": want})
    index = (slice(3, 9), slice(5, 17))
    np.testing.assert_array_equal(reader.read("w", index), want[index])


def test_two_processes_are_read(tmp_path):
    command = [sys.executable, "-m", "tests.merging.checkpoints.orbax_job", str(tmp_path)]
    run_local(command, processes=2, devices=4, timeout_s=120, echo=lambda _: None)
    want = {"w": np.arange(16 * 24, dtype=np.float32).reshape(16, 24), "step": np.int32(5)}
    for kind in ("ocdbt", "zarr"):
        assert same(read_all(open_checkpoint(tmp_path / kind, params_path="")), want), kind
    # And the same written here, by two writers in two processes.
    assert same(read_all(open_checkpoint(tmp_path / "ours")), ARRAYS)
    restored = ocp.StandardCheckpointer().restore(tmp_path / "ours")
    assert same(read_all(source(restored)), ARRAYS)


def state_of(tx) -> train_state.TrainState:
    params = {"dense": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}}
    return train_state.TrainState.create(apply_fn=None, params=params, tx=tx)


@pytest.mark.parametrize(
    "tx", [optax.adamw(1e-3), optax.chain(optax.clip(1.0), optax.sgd(1.0, 0.9))]
)
def test_train_states_of_flax_and_optax(tmp_path, tx):
    state = state_of(tx)
    with ocp.CheckpointManager(tmp_path / "m", item_names=("state",)) as manager:
        for step in (1, 12):
            manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state)))
    with pytest.raises(CheckpointError, match="folder of steps: 1, 12"):
        open_checkpoint(tmp_path / "m")
    with pytest.raises(CheckpointError, match="set PARAMS_PATH.*'params'"):
        open_checkpoint(tmp_path / "m/12")
    with pytest.raises(CheckpointError, match="no arrays at PARAMS_PATH 'weights'.*'params'"):
        open_checkpoint(tmp_path / "m/12", params_path="weights")
    reader = open_checkpoint(tmp_path / "m/12", params_path="params")
    params = {f"dense/{k}": np.asarray(v) for k, v in state.params["dense"].items()}
    assert same(read_all(reader), params)
    assert "step" in reader.rest and any(n.startswith("opt_state/") for n in reader.rest)

    # Dropped, the parameters stay where they were; kept, the library restores the very state.
    dropped = made(tmp_path / "dropped")
    copy(reader, orbax.Writer(dropped, reader.specs(), like=reader))
    assert list(open_checkpoint(dropped, params_path="").specs()) == [
        f"params/{n}" for n in reader.specs()
    ]
    kept = made(tmp_path / "kept")
    copy(reader, orbax.Writer(kept, reader.specs(), like=reader, optimizer_state="base"))
    restored = ocp.StandardCheckpointer().restore(kept, jax.tree.map(jnp.zeros_like, state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_step_with_several_items(tmp_path):
    with ocp.CheckpointManager(tmp_path / "m", item_names=("params", "ema")) as manager:
        items = {
            k: ocp.args.StandardSave({"w": jnp.full(3, v)})
            for k, v in (("params", 1.0), ("ema", 2.0))
        }
        manager.save(0, args=ocp.args.Composite(**items))
    with pytest.raises(CheckpointError, match="several items.*ema, params"):
        open_checkpoint(tmp_path / "m/0")
    reader = open_checkpoint(tmp_path / "m/0", params_path="ema")
    np.testing.assert_array_equal(reader.read("w", (slice(0, 3),)), np.full(3, 2, np.float32))


def test_lists_and_what_is_no_array_come_back(tmp_path):
    tree = {
        "blocks": [{"w": np.arange(3.0)}, None, {"w": np.arange(4.0)}, {}],
        "pair": (np.int32(1), np.ones(2, np.float32)),
        "a.b": {"c": np.zeros(2, np.float32)},
        "note": "words",
        "none": None,
        "empty": [],
    }
    reader = open_checkpoint(save(tmp_path / "c", tree))
    assert list(reader.specs()) == ["a.b/c", "blocks/0/w", "blocks/2/w", "pair/0", "pair/1"]
    out = made(tmp_path / "out")
    copy(reader, orbax.Writer(out, reader.specs(), like=reader))
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored, theirs = checkpointer.restore(out), checkpointer.restore(tmp_path / "c")
    assert jax.tree.structure(restored) == jax.tree.structure(theirs)
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("key", ["d/e", "", "x\0y"])
def test_keys_that_make_no_name_are_refused(tmp_path, key):
    path = save(tmp_path / "c", {"a": {"k": np.ones(2, np.float32)}})
    text = (path / "_METADATA").read_text()
    (path / "_METADATA").write_text(text.replace('"key": "k"', f'"key": {json.dumps(key)}'))
    with pytest.raises(CheckpointError, match="rename these keys"):
        open_checkpoint(path)


def test_two_paths_of_one_stored_name_are_refused(tmp_path):
    specs = source({"a.b": np.ones(1), "a/b": np.ones(1)}).specs()
    with pytest.raises(ValueError, match="both stored as 'a.b'"):
        orbax.Writer(tmp_path, specs)


def test_only_the_bytes_of_a_box_are_read(tmp_path, monkeypatch):
    array = np.arange(4096 * 64, dtype=np.float32).reshape(4096, 64)
    out = made(tmp_path / "out")
    copy(
        source({"w": array}),
        orbax.Writer(out, source({"w": array}).specs(), chunk_bytes=1 << 16),
        1 << 14,
    )
    reader = open_checkpoint(out)
    read = []
    into = type(reader._folder).read_into
    monkeypatch.setattr(
        type(reader._folder),
        "read_into",
        lambda self, blob, offset, buffer: (
            read.append(len(buffer)),
            into(self, blob, offset, buffer),
        ),
    )
    index = (slice(250, 260), slice(0, 64))  # over the edge of a chunk
    np.testing.assert_array_equal(reader.read("w", index), array[index])
    assert sum(read) == array[index].nbytes and len(read) == 2


def test_only_the_chunks_of_a_box_are_decoded(tmp_path):
    """Of compressed chunks: those that the box does not touch may be gone."""
    mesh = Mesh(np.array(jax.devices()), ("a",))
    array = jax.device_put(np.arange(64.0).reshape(8, 8), NamedSharding(mesh, PartitionSpec("a")))
    path = save(tmp_path / "c", {"w": array}, use_ocdbt=False)
    reader = open_checkpoint(path)
    for row in (0, 1, 2, 5, 6, 7):
        (path / f"w/{row}.0").unlink()
    index = (slice(3, 5), slice(0, 8))
    np.testing.assert_array_equal(reader.read("w", index), np.asarray(array)[3:5])
    with pytest.raises(CheckpointError, match="leaf w"):
        reader.read("w", boxes.whole((8, 8)))
    with pytest.raises(CheckpointError, match="vanished"):
        reader.check_unchanged()


# ---- what must not be believed -------------------------------------------------------------------------------------


@pytest.fixture
def plain(tmp_path) -> pathlib.Path:
    out = made(tmp_path / "plain")
    copy(source(), orbax.Writer(out, source().specs(), storage="zarr", chunk_bytes=64))
    return out


def edit(path: pathlib.Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [1 << 40, 1 << 40]}, "overflows"),
        ({"shape": [1 << 30, 1 << 20]}, "chunks are stored"),
        ({"chunks": [1 << 30, 1 << 20]}, "chunks are stored"),
        ({"chunks": [0, 5]}, "in chunks of"),
        ({"chunks": [3]}, "in chunks of"),
        ({"shape": [-1, 5]}, "no list of whole numbers"),
        ({"shape": "x"}, "no list of whole numbers"),
        ({"dtype": "<c8"}, "dtype '<c8' is not read"),
        ({"dtype": [["a", "<f4"]]}, "is not read"),
        ({"dtype": "<f8"}, "truncated or damaged"),
        (
            {"compressor": {"id": "zstd"}, "chunks": [1 << 40, 5], "shape": [12, 5]},
            "chunks are stored",
        ),
        ({"zarr_format": 4}, "wanted 2"),
    ],
)
def test_hostile_array_metadata(plain, changes, message):
    edit(plain / "decoder.layers_0.mlp.wi.kernel/.zarray", **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(plain)


def test_a_chunk_that_claims_more_than_packing_explains(plain):
    name = "decoder.norm.scale"
    edit(plain / name / ".zarray", compressor={"id": "gzip", "level": 1}, chunks=[1 << 40])
    with pytest.raises(CheckpointError, match="more than packing explains"):
        open_checkpoint(plain)


@pytest.mark.parametrize("name", ["..", "../x", "/etc", ".", "a\0b"])
@pytest.mark.parametrize("storage", ["zarr", "ocdbt"])
def test_no_name_leads_outside(tmp_path, name, storage):
    out = made(tmp_path / "in/out")
    arrays = {"k": np.ones(2, np.float32)}
    copy(source(arrays), orbax.Writer(out, source(arrays).specs(), storage=storage))
    shutil.copytree(out, tmp_path / "in/x", dirs_exist_ok=True)
    text = (out / "_METADATA").read_text()
    (out / "_METADATA").write_text(text.replace('"key": "k"', f'"key": {json.dumps(name)}'))
    with pytest.raises(CheckpointError):
        open_checkpoint(out)


def test_links_are_refused(plain):
    target = plain.parent / "elsewhere"
    (plain / "zeros").rename(target)
    (plain / "zeros").symlink_to(target)
    with pytest.raises(CheckpointError, match="zeros is a symbolic link"):
        open_checkpoint(plain)


def test_a_database_that_refers_to_a_missing_or_short_file(tmp_path):
    out = made(tmp_path / "out")
    array = np.arange(1 << 14, dtype=np.float32)
    copy(source({"w": array}), orbax.Writer(out, source({"w": array}).specs()), 1 << 14)
    reader = open_checkpoint(out)
    largest = max((out / "ocdbt.process_0/d").iterdir(), key=lambda p: p.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="leaf w: .* (changed|truncated)"):
        reader.read("w", (slice(0, 1 << 14),))
    with pytest.raises(CheckpointError, match="truncated|damaged"):
        open_checkpoint(out)
    largest.unlink()
    with pytest.raises(CheckpointError, match="no file of this folder"):
        open_checkpoint(out)


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"{", b'{"tree_metadata": 3}', b'{"tree_metadata": {"a": {}}}', b"\xff" * 50],
)
def test_metadata_that_is_none(plain, raw):
    (plain / "_METADATA").write_bytes(raw)
    with pytest.raises(CheckpointError, match="_METADATA"):
        open_checkpoint(plain)


# ---- writing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", orbax.STORAGES)
@pytest.mark.parametrize("chunk_bytes", [1, 48, 1 << 20])
def test_what_is_written_is_restored(tmp_path, storage, chunk_bytes):
    arrays = ARRAYS | {"nothing": np.zeros((0, 4), np.float32)}
    out = made(tmp_path / "out")
    writer = FORMATS["orbax"](out, source(arrays).specs(), storage=storage, chunk_bytes=chunk_bytes)
    assert isinstance(writer, Writer)
    copy(source(arrays), writer)
    assert same(read_all(open_checkpoint(out)), arrays)
    for checkpointer in (ocp.StandardCheckpointer(), ocp.PyTreeCheckpointer()):
        with checkpointer:
            restored = checkpointer.restore(out)
            assert same(read_all(source(restored)), arrays)
    with ocp.StandardCheckpointer() as checkpointer:
        mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
        sharded = NamedSharding(mesh, PartitionSpec("a"))
        target = {
            "decoder": {
                "layers_0": {
                    "mlp": {
                        "wi": {
                            "kernel": jax.ShapeDtypeStruct((12, 5), np.float32, sharding=sharded)
                        }
                    }
                }
            }
        }
        args = ocp.args.PyTreeRestore(
            target,
            partial_restore=True,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as partly:
            array = partly.restore(out, args=args)["decoder"]["layers_0"]["mlp"]["wi"]["kernel"]
        assert array.sharding == sharded
        np.testing.assert_array_equal(array, ARRAYS["decoder/layers_0/mlp/wi/kernel"])


def test_stacked_leaves_are_stored_by_layer(tmp_path):
    array = np.arange(8 * 3 * 4, dtype=np.float32).reshape(8, 3, 4)
    spec = LeafSpec(name="w", shape=array.shape, dtype=array.dtype, stacked=1)
    writer = orbax.Writer(made(tmp_path / "out"), {"w": spec}, chunk_bytes=64)
    for layer in (2, 0, 1):
        index = (slice(0, 8), slice(layer, layer + 1), slice(0, 4))
        writer.write("w", index, array[index])
    writer.commit()
    reader = open_checkpoint(tmp_path / "out")
    assert same(read_all(reader), {"w": array})


def test_nothing_is_there_before_the_commit(tmp_path):
    out = made(tmp_path / "out")
    writer = orbax.Writer(out, source().specs())
    name = "bytes"
    writer.write(name, boxes.whole(ARRAYS[name].shape), ARRAYS[name])
    with pytest.raises(CheckpointError):
        open_checkpoint(out)
    with pytest.raises(AssertionError, match="before these leaves were written whole.*cube"):
        writer.commit()
    writer.close()
    with pytest.raises(CheckpointError):
        open_checkpoint(out)


def test_what_orbax_can_not_hold_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="storage is 'hdf5'"):
        orbax.Writer(tmp_path, {}, storage="hdf5")
    with pytest.raises(ValueError, match="only checkpoints that are trees"):
        orbax.Writer(tmp_path, {}, optimizer_state="base")
    specs = {"x": LeafSpec(name="x", shape=(2,), dtype=np.dtype(ml_dtypes.float8_e4m3fn))}
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        orbax.Writer(tmp_path, specs)
    assert not list(tmp_path.iterdir())


def test_processes_share_the_leaves(tmp_path):
    specs = source().specs()
    shares = [
        orbax.Writer(tmp_path, specs, process_index=i, process_count=3).names_mine for i in range(3)
    ]
    assert sum(shares, []) == list(specs)
    assert all(shares)


def test_the_digest_tells_other_contents(tmp_path):
    digests = set()
    for i, arrays in enumerate((ARRAYS, ARRAYS | {"zeros": np.ones((9, 3), np.float32)})):
        out = made(tmp_path / str(i))
        copy(source(arrays), orbax.Writer(out, source(arrays).specs()))
        digests.add(open_checkpoint(out).digest())
        assert open_checkpoint(out).digest() in digests
    assert len(digests) == 2


@pytest.mark.real
def test_smollm2_goes_through_orbax(tmp_path, real_checkpoints):
    reader = open_checkpoint(real_checkpoints / "smollm2")
    out = made(tmp_path / "out")
    copy(reader, orbax.Writer(out, reader.specs()), 1 << 19)
    copied = open_checkpoint(out)
    assert copied.specs().keys() == reader.specs().keys()
    for name, spec in reader.specs().items():
        for index in boxes.row_boxes(spec.shape, 1 << 20):
            assert copied.read(name, index).tobytes() == reader.read(name, index).tobytes(), name
    reader.close()


def test_importing_the_formats_imports_no_library_of_theirs():
    code = "import sys, merging.checkpoints; sys.exit('orbax.checkpoint' in sys.modules or 'tensorstore' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pathlib.Path(__file__).parents[3])


def test_an_unfinished_save_is_told(tmp_path):
    made(tmp_path / "step.orbax-checkpoint-tmp/d")
    with pytest.raises(CheckpointError, match="never finished"):
        open_checkpoint(tmp_path / "step.orbax-checkpoint-tmp")
