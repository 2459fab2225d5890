"""Files that others write are read, files written are read by others, and hostile ones are refused.

Peers: the safetensors package (its numpy part; torch and transformers in the extra `peers`).
"""

import concurrent.futures
import contextlib
import errno
import json
import math
import os
import random
import struct
import threading

import hypothesis
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import strategies as st

from merging.checkpoints import huggingface, safetensors_header, storage
from merging.checkpoints.format import CheckpointError, LeafSpec
from merging.checkpoints.safetensors import Reader, Writer, plan_shards
from merging.checkpoints.storage import ByteSource

DTYPES = list(safetensors_header.DTYPES.values())
LARGE_SHARDS = 1 << 40
light = hypothesis.settings(max_examples=50, deadline=None, database=None)


def whole(shape):
    return tuple(slice(0, size) for size in shape)


def array_of(shape, dtype, seed=0):
    """Any bit pattern of the dtype, NaNs included."""
    dtype = np.dtype(dtype)
    rng = np.random.default_rng(seed)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    count = math.prod(shape) * dtype.itemsize
    return np.frombuffer(rng.bytes(count), dtype).reshape(shape)


def some_arrays():
    """Each dtype as a scalar, as an empty leaf and as a matrix of odd size."""
    return {
        f"{dtype.name}.{shape}": array_of(shape, dtype, seed)
        for seed, dtype in enumerate(DTYPES)
        for shape in [(), (3, 0), (3, 5)]
    }


def specs_of(arrays):
    return {name: LeafSpec(name=name, shape=a.shape, dtype=a.dtype) for name, a in arrays.items()}


def write_all(folder, arrays, **options):
    writer = Writer(folder, specs_of(arrays), **{"shard_bytes": LARGE_SHARDS, **options})
    for name, array in arrays.items():
        writer.write(name, whole(array.shape), array)
    writer.commit()
    return writer


def assert_same(found, wanted):
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    assert found.tobytes() == wanted.tobytes()


def assert_holds(reader, arrays):
    assert reader.specs() == specs_of(arrays)
    for name, array in arrays.items():
        assert_same(reader.read(name, whole(array.shape)), array)


@pytest.fixture
def opened():
    """Opens readers that are closed at the end of the test."""
    with contextlib.ExitStack() as stack:

        def open_reader(path):
            reader = Reader(path)
            stack.callback(reader.close)
            return reader

        yield open_reader


@pytest.fixture
def reads(monkeypatch):
    """The (offset, bytes) of every read of a file."""
    seen = []
    read_into = ByteSource.read_into

    def spy(source, offset, buffer):
        seen.append((offset, len(buffer)))
        read_into(source, offset, buffer)

    monkeypatch.setattr(ByteSource, "read_into", spy)
    return seen


# --- Against the safetensors package ------------------------------------------------------------


def test_reads_what_the_package_writes(tmp_path, opened):
    arrays = some_arrays()
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    reader = opened(tmp_path)
    assert reader.specs().keys() == arrays.keys()
    for name, array in arrays.items():
        assert_same(reader.read(name, whole(array.shape)), array)


@pytest.mark.parametrize("shard_bytes", [1, 100, LARGE_SHARDS])
def test_the_package_reads_what_is_written(tmp_path, opened, shard_bytes):
    arrays = some_arrays()
    write_all(tmp_path, arrays, shard_bytes=shard_bytes)
    found = {}
    for file in tmp_path.glob("*.safetensors"):
        found |= safetensors.numpy.load_file(file)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert_same(found[name], array)
    assert_holds(opened(tmp_path), arrays)


def test_an_empty_checkpoint(tmp_path, opened):
    write_all(tmp_path, {})
    assert safetensors.numpy.load_file(tmp_path / "model.safetensors") == {}
    assert opened(tmp_path).specs() == {}


def test_data_are_aligned(tmp_path):
    for count in range(1, 70):
        specs = [LeafSpec(name="x" * count, shape=(), dtype=np.dtype(np.int8))]
        assert len(safetensors_header.build_header(specs, {"format": "pt"})) % 64 == 0


def test_storage_order_is_by_offset(tmp_path, opened):
    header = {
        "a": {"dtype": "U8", "shape": [2], "data_offsets": [3, 5]},
        "b": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "c": {"dtype": "U8", "shape": [0], "data_offsets": [3, 3]},
    }
    make_file(tmp_path / "x.safetensors", header, bytes(range(5)))
    reader = opened(tmp_path / "x.safetensors")
    assert list(reader.specs()) == ["b", "c", "a"]
    assert reader.read("a", whole((2,))).tolist() == [3, 4]


@pytest.mark.peers
def test_transformers_opens_a_written_folder(tmp_path, opened):
    transformers = pytest.importorskip("transformers", reason="extra peers")
    torch = pytest.importorskip("torch", reason="extra peers")
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=32,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    base, merged = tmp_path / "base", tmp_path / "merged"
    model.save_pretrained(base, max_shard_size="4KB")
    merged.mkdir()
    reader = opened(base)
    specs = {
        name: LeafSpec(name=name, shape=spec.shape, dtype=np.dtype(np.float32))
        for name, spec in reader.specs().items()
    }
    writer = Writer(
        merged,
        specs,
        shard_bytes=6000,
        carry_from=reader.folder,
        config_dtype="float32",
    )
    for name, spec in specs.items():
        array = reader.read(name, whole(spec.shape))
        writer.write(name, whole(spec.shape), array.astype(np.float32))
    writer.commit()
    assert len(writer.shards) > 1
    # Theirs counts bfloat16, ours the same elements in twice the bytes.
    theirs, total = (
        json.loads((folder / huggingface.INDEX_FILE).read_text())["metadata"]["total_size"]
        for folder in (base, merged)
    )
    assert total == 2 * theirs
    found = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    assert found.dtype == torch.float32
    wanted = model.state_dict()
    assert found.state_dict().keys() == wanted.keys()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, wanted[name].float()), name


# --- Slices -------------------------------------------------------------------------------------


@st.composite
def boxes(draw):
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    index = []
    for size in shape:
        start = draw(st.integers(0, size))
        index.append(slice(start, draw(st.integers(start, size))))
    return shape, tuple(index), draw(st.sampled_from(DTYPES))


@light
@hypothesis.given(boxes())
def test_slices_are_numpys(tmp_path_factory, case):
    shape, index, dtype = case
    folder = tmp_path_factory.mktemp("slices")
    array = array_of(shape, dtype)
    write_all(folder, {"before": array_of((3,), np.int8), "a": array})
    reader = Reader(folder)
    with contextlib.closing(reader):
        assert_same(reader.read("a", index), array[(*index, ...)])
        out = np.zeros(array[(*index, ...)].shape, dtype)
        assert reader.read("a", index, out=out) is out
        assert_same(out, array[(*index, ...)])


@pytest.mark.parametrize(
    ("index", "runs"),
    [
        ((slice(0, 4), slice(0, 5), slice(0, 6)), [(0, 120)]),
        ((slice(1, 3), slice(0, 5), slice(0, 6)), [(30, 60)]),
        ((slice(2, 3), slice(1, 3), slice(0, 6)), [(66, 12)]),
        ((slice(2, 3), slice(1, 2), slice(2, 5)), [(68, 3)]),
        ((slice(1, 3), slice(1, 3), slice(0, 6)), [(36, 12), (66, 12)]),
        (
            (slice(0, 2), slice(0, 2), slice(1, 3)),
            [(1, 2), (7, 2), (31, 2), (37, 2)],
        ),
        ((slice(0, 0), slice(0, 5), slice(0, 6)), []),
    ],
)
def test_only_the_bytes_of_the_box_are_read(tmp_path, opened, reads, index, runs):
    array = np.arange(120, dtype=np.int16).reshape(4, 5, 6)
    write_all(tmp_path, {"before": array_of((7,), np.int16), "a": array})
    size = os.path.getsize(tmp_path / "model.safetensors")
    reader = opened(tmp_path)
    header_bytes = sum(count for _, count in reads)
    assert header_bytes == size - array.nbytes - 14, "opening reads headers only"
    reads.clear()
    assert_same(reader.read("a", index), array[index])
    assert reads == [(size - array.nbytes + 2 * start, 2 * count) for start, count in runs]


def test_out_has_to_fit(tmp_path, opened):
    write_all(tmp_path, {"a": np.zeros((4, 4), np.float32)})
    reader = opened(tmp_path)
    for out in (
        np.zeros((4, 4)),
        np.zeros((4, 2), np.float32),
        np.zeros((4, 4), np.float32, order="F"),
    ):
        with pytest.raises(ValueError, match=r"a: out is .* wanted float32\[4, 4\], C-contiguous"):
            reader.read("a", whole((4, 4)), out=out)


def test_a_box_has_to_be_one_of_the_leaf(tmp_path, opened):
    write_all(tmp_path, {"a": np.zeros((4, 4), np.float32)})
    reader = opened(tmp_path)
    for index in (
        (slice(0, 4),),
        (slice(0, 5), slice(0, 4)),
        (slice(-1, 4), slice(0, 4)),
        (slice(0, 4, 2), slice(0, 4)),
    ):
        with pytest.raises(AssertionError, match=r"a: .* is no box of shape \(4, 4\)"):
            reader.read("a", index)
    with pytest.raises(AssertionError, match="has no leaf 'b'"):
        reader.read("b", ())


def test_many_threads_read_at_once(tmp_path, opened):
    array = np.arange(200_000, dtype=np.int32).reshape(200, 1000)
    write_all(tmp_path, {"a": array})
    reader = opened(tmp_path)
    wrong = []

    def read_rows(first):
        for row in range(first, 200, 4):
            index = (slice(row, row + 1), slice(10, 990))
            if not np.array_equal(reader.read("a", index), array[index]):
                wrong.append(row)

    threads = [threading.Thread(target=read_rows, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_object_storage_takes_the_same_path(tmp_path, opened, monkeypatch):
    """As far as can be without one: no descriptor, `read` for `preadv`, bytes to write."""
    arrays = some_arrays()
    monkeypatch.setattr(storage, "is_local", lambda path: False)
    write_all(tmp_path, arrays, shard_bytes=100)
    reader = opened(tmp_path)
    assert_holds(reader, arrays)
    threads = [threading.Thread(target=assert_holds, args=(reader, arrays)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    name = next(iter(arrays))
    os.truncate(tmp_path / reader.file_of(name), 70)
    with pytest.raises(CheckpointError, match=r"no bytes from \d+ on, wanted .* truncated"):
        for name, array in arrays.items():
            reader.read(name, whole(array.shape))


# --- Which files --------------------------------------------------------------------------------


def test_a_single_file_and_a_folder_with_one(tmp_path, opened):
    arrays = {"a": np.arange(3)}
    path = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file(arrays, path)
    assert_holds(opened(path), arrays)
    assert opened(path).folder is None
    reader = opened(tmp_path)
    assert_holds(reader, arrays)
    assert (os.fspath(reader.folder), reader.file_of("a")) == (os.fspath(tmp_path), path.name)


def test_model_safetensors_goes_before_others(tmp_path, opened):
    for name in ("model", "consolidated"):
        safetensors.numpy.save_file({name: np.ones(1)}, tmp_path / f"{name}.safetensors")
    assert list(opened(tmp_path).specs()) == ["model"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"found no file ending in \.safetensors; wanted model\.safetensors, or .*pickles"),
        (["a.safetensors", "b.safetensors"], r"found \['a\.safetensors', 'b\.safetensors'\]"),
    ],
)
def test_folders_that_do_not_say_which_file(tmp_path, files, message):
    for name in files:
        safetensors.numpy.save_file({"a": np.ones(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=message):
        Reader(tmp_path)


def test_no_such_path(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such file; check the path"):
        Reader(tmp_path / "nowhere")


def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        Reader(tmp_path)


def test_digest(tmp_path, opened):
    write_all(tmp_path, {"a": np.arange(3), "b": np.arange(4)}, shard_bytes=8)
    digest = opened(tmp_path).digest()
    assert digest == opened(tmp_path).digest()
    assert len(digest) == 64
    shard = tmp_path / "model-00002-of-00002.safetensors"
    found = os.stat(shard)
    os.utime(shard, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    assert opened(tmp_path).digest() != digest


# --- Hostile headers ----------------------------------------------------------------------------


def make_file(path, header, data=b""):
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def leaf(shape=(2,), begin=0, end=8, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


HOSTILE_HEADERS = {
    "overlap": (
        {"a": leaf(), "b": leaf(begin=4, end=12)},
        12,
        r"leaf 'b' begins at byte 4 of the data and overlaps leaf 'a', which ends at 8",
    ),
    "overlap inside": (
        {"a": leaf((4,), 0, 16), "b": leaf((1,), 4, 8)},
        16,
        "leaf 'b' begins at byte 4 of the data and overlaps leaf 'a', which ends at 16",
    ),
    "hole": (
        {"a": leaf(), "b": leaf(begin=12, end=20)},
        20,
        "bytes 8 to 12 of the data, between leaf 'a' and leaf 'b', belong to no leaf",
    ),
    "hole in front": (
        {"a": leaf(begin=4, end=12)},
        12,
        "bytes 0 to 4 of the data, between the header and leaf 'a', belong to no leaf",
    ),
    "bytes left over": ({"a": leaf()}, 9, "the last 1 bytes of the data belong to no leaf"),
    "data but no leaf": ({}, 1, "the last 1 bytes of the data belong to no leaf"),
    "truncated data": ({"a": leaf()}, 7, "truncated: 7 bytes of data, the header describes 8"),
    "wrong size": (
        {"a": leaf((3,))},
        8,
        r"leaf 'a': data_offsets \[0, 8\] hold 8 bytes, shape \[3\] of F32 takes 12",
    ),
    "half a byte": (
        {"a": leaf((3,), 0, 1, "F4")},
        1,
        r"hold 1 bytes, shape \[3\] of F4 takes 1\.5",
    ),
    "offsets turned round": ({"a": leaf(begin=8, end=0)}, 8, r"data_offsets is \[8, 0\], wanted"),
    "float offsets": ({"a": leaf(end=8.0)}, 8, r"data_offsets is \[0, 8\.0\], wanted"),
    "negative offsets": ({"a": leaf(begin=-8, end=0)}, 8, r"data_offsets is \[-8, 0\], wanted"),
    "bool offsets": (
        {"a": leaf((1,), False, True, "U8")},
        1,
        r"data_offsets is \[False, True\], wanted",
    ),
    "three offsets": (
        {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}},
        1,
        r"data_offsets is \[0, 1, 2\], wanted",
    ),
    "huge offsets": ({"a": leaf(begin=2**63, end=2**63 + 8)}, 8, "data_offsets is .*, wanted"),
    "offsets are text": (
        {"a": {"dtype": "U8", "shape": [1], "data_offsets": "01"}},
        1,
        "data_offsets is '01', wanted",
    ),
    "negative shape": ({"a": leaf((-2, -1))}, 8, r"leaf 'a': shape is \[-2, -1\], wanted"),
    "bool shape": ({"a": leaf((True, 2))}, 8, r"leaf 'a': shape is \[True, 2\], wanted"),
    "float shape": ({"a": leaf((2.0,))}, 8, r"leaf 'a': shape is \[2\.0\], wanted"),
    "no shape": ({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, 1, "leaf 'a': described by"),
    "shape is null": (
        {"a": {"dtype": "U8", "shape": None, "data_offsets": [0, 1]}},
        1,
        "shape is None",
    ),
    "shape overflows": ({"a": leaf((2**33, 2**33))}, 8, "leaf 'a': shape .* of F32 overflows"),
    "shape wraps round to 0": ({"a": leaf((2**32, 2**32), 0, 0)}, 0, "of F32 overflows"),
    "shape overflows beside 0": ({"a": leaf((0, 2**62, 2**62), 0, 0)}, 0, "of F32 overflows"),
    "dimension of 2^64": ({"a": leaf((2**64,))}, 8, "leaf 'a': shape is .*, wanted a list"),
    "a million dimensions": (
        {"a": leaf((2**62,) * 1_000_000)},
        8,
        "leaf 'a': 1000000 dimensions, wanted at most 32",
    ),
    "unknown dtype": ({"a": leaf(dtype="F31")}, 8, "leaf 'a': dtype is 'F31', wanted one of F64"),
    "dtype is a list": ({"a": leaf(dtype=["F32"])}, 8, r"leaf 'a': dtype is \['F32'\], wanted"),
    "quantised": (
        {"a": leaf((8,), dtype="F8_E4M3"), "b": leaf((4,), 8, 10, "F4")},
        10,
        "(?s)leaf 'a' is F8_E4M3.*leaf 'b' is F4.*dequantise the checkpoint first",
    ),
    "complex": ({"a": leaf((1,), dtype="C64")}, 8, "(?s)leaf 'a' is C64.*complex leaves"),
    "entry is a number": ({"a": 7}, 0, "leaf 'a': described by 7, wanted exactly dtype, shape"),
    "entry with more": ({"a": leaf() | {"scale": 2}}, 8, "leaf 'a': described by .*'scale': 2"),
    "metadata not text": (
        {"__metadata__": {"a": 1}},
        0,
        "__metadata__ is {'a': 1}, wanted strings by name",
    ),
    "metadata not an object": ({"__metadata__": "a"}, 0, "__metadata__ is 'a', wanted strings"),
    "half a character": (
        b'{"\\ud800": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        1,
        "name is not Unicode text",
    ),
    "duplicate names": (
        b'{"a": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}, "a": {}}',
        0,
        "'a' is given 2 times",
    ),
    "duplicate entries": (
        b'{"a": {"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
        1,
        "'dtype' is given 2 times",
    ),
    "duplicate metadata": (
        b'{"__metadata__": {"format":"pt","format":"np"}}',
        0,
        "'format' is given 2 times",
    ),
    "deep nesting": (b'{"a":' + b"[" * 200_000, 0, "header is nested too deeply"),
    "deep objects": (b'{"a":' * 200_000, 0, "header is nested too deeply"),
    "NaN": (
        b'{"a": {"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}',
        1,
        "NaN is no JSON number",
    ),
    "infinity by exponent": (
        b'{"a": {"dtype":"U8","shape":[1e999],"data_offsets":[0,1]}}',
        1,
        r"shape is \[inf\], wanted",
    ),
    "number of 5000 digits": (
        b'{"a": {"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}',
        1,
        "header is not JSON in UTF-8",
    ),
    "not UTF-8": (b'{"\xff": 1}', 0, "header is not JSON in UTF-8.*0xff"),
    "not JSON": (b'{"a" 1}', 0, "header is not JSON in UTF-8"),
    "text after the header": (b"{}x", 0, "header is not JSON in UTF-8: Extra data"),
    "zeros after the header": (b"{}\0\0", 0, "header is not JSON in UTF-8: Extra data"),
    "a list": (b"[]", 0, r"header begins with b'\[', wanted a JSON object"),
    "space in front": (b" {}", 0, "header begins with b' ', wanted"),
    "no header": (b"", 0, "header begins with b'', wanted"),
}


@pytest.mark.parametrize("case", HOSTILE_HEADERS)
def test_hostile_headers_are_refused(tmp_path, case):
    header, data_bytes, message = HOSTILE_HEADERS[case]
    path = tmp_path / "hostile.safetensors"
    make_file(path, header, bytes(data_bytes))
    with pytest.raises(CheckpointError, match=message) as error:
        Reader(path)
    assert str(error.value).startswith(os.fspath(path)), "the file is named first"
    assert len(str(error.value)) < 5000, "whatever the file holds, the message stays short"


def test_all_problems_of_a_file_are_told_at_once(tmp_path):
    make_file(
        tmp_path / "x.safetensors",
        {"a": leaf(dtype="F31"), "b": leaf((3,)), "c": leaf(), "__metadata__": 1},
    )
    with pytest.raises(CheckpointError, match="(?s)__metadata__.*leaf 'a'.*leaf 'b'") as error:
        Reader(tmp_path / "x.safetensors")
    assert "leaf 'c'" not in str(error.value)
    make_file(tmp_path / "x.safetensors", {f"leaf{i}": 0 for i in range(1000)})
    with pytest.raises(CheckpointError, match="(?s)leaf19.*and 980 more"):
        Reader(tmp_path / "x.safetensors")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001])
def test_a_header_over_the_limit_is_refused_before_it_is_read(tmp_path, reads, length):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(CheckpointError, match=f"claims a header of {length} bytes, the format"):
        Reader(path)
    assert reads == [(0, 8)]


def test_a_header_larger_than_the_file_is_refused_before_it_is_read(tmp_path, reads):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 99_999_999) + b"{}")
    with pytest.raises(CheckpointError, match="header of 99999999 bytes, but only 2 follow"):
        Reader(path)
    assert reads == [(0, 8)]


def test_files_cut_anywhere_are_refused(tmp_path):
    write_all(tmp_path, {"a": np.arange(3, dtype=np.int16)})
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="truncated"):
            Reader(tmp_path)


def test_padding_and_metadata_are_fine(tmp_path, opened):
    header = json.dumps({"__metadata__": {"format": "pt", "é": "ü"}, "ü": leaf()}).encode()
    make_file(tmp_path / "x.safetensors", header + b"   ", bytes(8))
    assert list(opened(tmp_path).specs()) == ["ü"]


@hypothesis.settings(light, max_examples=300)
@hypothesis.given(st.data())
def test_damaged_bytes_never_end_in_another_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "model.safetensors"
    safetensors.numpy.save_file({"a": np.arange(3, dtype=np.int8), "b.c": np.ones((2, 1))}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.sampled_from(b'\0 "09,-.e:[]{}\\\xff\x80aF'))
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError), contextlib.closing(Reader(path)) as reader:
        for name, spec in reader.specs().items():
            reader.read(name, whole(spec.shape))


# --- Hostile indices ----------------------------------------------------------------------------


def make_sharded(folder, shards, weight_map=None):
    """shards: {file: names}; each leaf is one float64."""
    for file, names in shards.items():
        safetensors.numpy.save_file({name: np.ones(1) for name in names}, folder / file)
    if weight_map is None:
        weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_come_in_the_order_of_their_names(tmp_path, opened):
    make_sharded(tmp_path, {"2.safetensors": ["a", "b"], "1.safetensors": ["z"]})
    reader = opened(tmp_path)
    assert list(reader.specs()) == ["z", "a", "b"]
    assert [reader.file_of(name) for name in "zab"] == ["1.safetensors"] + ["2.safetensors"] * 2


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "1.safetensors", "b": "2.safetensors"}, "shard '2.safetensors' is missing; .* 'b'"),
        ({"a": "1.safetensors", "b": "1.safetensors"}, "'b' should be in 1.*does not hold it"),
        ({"a": "../1.safetensors"}, "file is '../1.safetensors', wanted a plain name"),
        ({"a": "/etc/passwd"}, "file is '/etc/passwd', wanted a plain name"),
        ({"a": "sub/1.safetensors"}, "file is 'sub/1.safetensors', wanted a plain name"),
        ({"a": ".."}, r"file is '\.\.', wanted a plain name"),
        ({"a": ""}, "file is '', wanted a plain name"),
        ({"a": "1.safetensors\0.txt"}, r"file is '1\.safetensors\\x00\.txt', wanted a plain"),
        ({"a": 1}, "file is 1, wanted a plain name"),
        ({}, "weight_map is {}, wanted files by leaf"),
        ([], r"weight_map is \[\], wanted files by leaf"),
    ],
)
def test_hostile_indices_are_refused(tmp_path, weight_map, message):
    make_sharded(tmp_path, {"1.safetensors": ["a"]}, weight_map)
    with pytest.raises(CheckpointError, match=message):
        Reader(tmp_path)


def test_a_leaf_that_the_index_does_not_name(tmp_path):
    make_sharded(tmp_path, {"1.safetensors": ["a", "b"]}, {"a": "1.safetensors"})
    with pytest.raises(CheckpointError, match="'b' of 1.safetensors is not in the index"):
        Reader(tmp_path)


def test_a_leaf_in_two_shards(tmp_path):
    make_sharded(tmp_path, {"1.safetensors": ["a", "b"], "2.safetensors": ["b", "c"]})
    with pytest.raises(CheckpointError, match=r"2\.safetensors:(?s:.*)'b' is also in 1"):
        Reader(tmp_path)


def test_a_leaf_in_another_shard(tmp_path):
    make_sharded(
        tmp_path,
        {"1.safetensors": ["a"], "2.safetensors": ["b"]},
        {"a": "2.safetensors", "b": "1.safetensors"},
    )
    with pytest.raises(CheckpointError, match="(?s)'a' should be in 2.*but is in 1.*'b' should"):
        Reader(tmp_path)


def test_an_index_and_a_single_file(tmp_path):
    make_sharded(tmp_path, {"1.safetensors": ["a"]})
    safetensors.numpy.save_file({"b": np.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds model.safetensors and also an index"):
        Reader(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": {"a": "1", "a": "2"}}'])
def test_an_index_that_is_none(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="index.json"):
        Reader(tmp_path)


def test_links_out_of_the_folder_are_refused(tmp_path, opened):
    folder = tmp_path / "model"
    folder.mkdir()
    make_sharded(folder, {"1.safetensors": ["a"]})
    (folder / "1.safetensors").rename(folder / "real")
    (folder / "1.safetensors").symlink_to("real")
    assert list(opened(folder).specs()) == ["a"]
    (folder / "real").rename(tmp_path / "elsewhere")
    (folder / "1.safetensors").unlink()
    (folder / "1.safetensors").symlink_to("../elsewhere")
    with pytest.raises(CheckpointError, match=r"shard 1.safetensors is a link to .*elsewhere"):
        Reader(folder)


def test_the_hub_cache_is_a_folder_of_links(tmp_path, opened):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    make_sharded(snapshot, {"1.safetensors": ["a"]})
    (snapshot / "1.safetensors").rename(blobs / "0f0f")
    (snapshot / "1.safetensors").symlink_to("../../blobs/0f0f")
    assert list(opened(snapshot).specs()) == ["a"]


# --- Files that change --------------------------------------------------------------------------


@pytest.fixture
def changing(tmp_path, opened):
    write_all(tmp_path, {"a": np.arange(100)})
    return tmp_path / "model.safetensors", opened(tmp_path)


def touch(path, other):
    """As if written anew a nanosecond later."""
    os.utime(path, ns=(other.st_atime_ns, other.st_mtime_ns + 1))


def replace_at_the_same_time(path, other):
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(other.st_atime_ns, other.st_mtime_ns))
    copy.rename(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path, was: path.unlink(), "the file vanished since it was opened"),
        (
            lambda path, was: os.truncate(path, was.st_size - 1),
            "the file changed .*size .* was 928, is 92[79]",
        ),
        (
            lambda path, was: os.truncate(path, was.st_size + 1),
            "the file changed .*size .* was 928, is 92[79]",
        ),
        (touch, r"the file changed since it was opened: modification time \(ns\) was \d+, is"),
        (replace_at_the_same_time, "the file changed since it was opened: inode was"),
    ],
)
def test_files_that_change_are_noticed(changing, opened, monkeypatch, change, message):
    monkeypatch.setattr(storage, "SECONDS_BETWEEN_LOOKS", 0.0)
    path, reader = changing[0], opened(changing[0])
    reader.read("a", whole((100,)))
    change(path, os.stat(path))
    with pytest.raises(CheckpointError, match=f"leaf a: {path}: {message}"):
        reader.read("a", (slice(0, 1),))


@pytest.mark.parametrize(
    "change", [lambda path, was: path.unlink(), touch, replace_at_the_same_time]
)
def test_changes_between_two_looks_are_noticed_before_a_commit(
    changing, opened, monkeypatch, change
):
    monkeypatch.setattr(storage, "SECONDS_BETWEEN_LOOKS", 1e9)
    path, reader = changing[0], opened(changing[0])
    reader.read("a", whole((100,)))
    reader.check_unchanged()
    change(path, os.stat(path))
    reader.read("a", (slice(0, 1),))
    with pytest.raises(CheckpointError, match=f"{path}: the file (vanished|changed) since"):
        reader.check_unchanged()


def test_a_shrinking_file_is_noticed_while_it_is_read(changing, monkeypatch):
    path, reader = changing
    monkeypatch.setattr(ByteSource, "_check_unchanged", lambda source: None)
    os.truncate(path, os.path.getsize(path) - 9)
    with pytest.raises(CheckpointError, match="leaf a: .*no bytes from .*truncated"):
        reader.read("a", whole((100,)))


def test_short_reads_go_on(changing, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:7]], at))
    assert_same(changing[1].read("a", whole((100,))), np.arange(100))


def test_errors_of_the_disk_name_the_file(changing, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match="Input/output error: .*model.safetensors"):
        changing[1].read("a", whole((100,)))


def test_nothing_is_read_after_close(changing):
    changing[1].close()
    changing[1].close()
    with pytest.raises(OSError, match="Bad file descriptor: .*model.safetensors"):
        changing[1].read("a", whole((100,)))


# --- Writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "shard_bytes", "plan"),
    [
        ([], 10, [[]]),
        ([4, 4, 4], 12, [[0, 1, 2]]),
        ([4, 4, 4], 11, [[0, 1], [2]]),
        ([4, 40, 4, 4], 10, [[0], [1], [2, 3]]),
        ([40, 40], 10, [[0], [1]]),
        ([10, 0, 0, 1], 10, [[0, 1, 2], [3]]),
        ([1, 1], 1, [[0], [1]]),
    ],
)
def test_plan_shards(sizes, shard_bytes, plan):
    specs = specs_of({str(i): np.zeros(size, np.int8) for i, size in enumerate(sizes)})
    assert plan_shards(specs, shard_bytes) == [[str(i) for i in shard] for shard in plan]


def test_plan_shards_wants_room():
    with pytest.raises(ValueError, match="shard_bytes is 0, wanted a positive number"):
        plan_shards({}, 0)


def test_index_is_that_of_transformers(tmp_path):
    arrays = {"b": np.ones(4), "a": np.ones(3), "c": np.ones(2)}
    write_all(tmp_path, arrays, shard_bytes=32)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 72},
        "weight_map": {
            "b": "model-00001-of-00003.safetensors",
            "a": "model-00002-of-00003.safetensors",
            "c": "model-00003-of-00003.safetensors",
        },
    }
    assert set(os.listdir(tmp_path)) == {*index["weight_map"].values(), huggingface.INDEX_FILE}
    (tmp_path / "one").mkdir()
    write_all(tmp_path / "one", arrays)
    assert os.listdir(tmp_path / "one") == ["model.safetensors"]


@light
@hypothesis.given(st.data())
def test_leaves_written_in_pieces(tmp_path_factory, data):
    shapes = data.draw(st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=5))
    arrays = {
        f"leaf{i}": array_of(tuple(shape), data.draw(st.sampled_from(DTYPES)), i)
        for i, shape in enumerate(shapes)
    }
    shard_bytes = data.draw(st.integers(1, 500))
    pieces = []
    for name, array in arrays.items():
        if not array.ndim or not array.size:
            pieces.append((name, whole(array.shape)))
            continue
        row = 0
        while row < len(array):
            stop = data.draw(st.integers(row + 1, len(array)))
            pieces.append((name, (slice(row, stop), *whole(array.shape[1:]))))
            row = stop
    folder = tmp_path_factory.mktemp("pieces")
    writer = Writer(folder, specs_of(arrays), shard_bytes=shard_bytes)
    for name, index in pieces:
        writer.write(name, index, np.array(arrays[name][(*index, ...)], order="F"))
    writer.commit()
    with contextlib.closing(Reader(folder)) as reader:
        assert_holds(reader, arrays)


def test_several_processes_write_shards(tmp_path, opened):
    arrays = {name: array_of((3,), np.float32, ord(name)) for name in "abcde"}
    options = {"shard_bytes": 24}
    with pytest.raises(AssertionError, match=r"shards \[1, 3\] of 3"):
        Writer(tmp_path, specs_of(arrays), shards_mine=[3, 1], **options)
    for mine, names in (([1], "cd"), ([2, 0], "abe")):
        writer = Writer(tmp_path, specs_of(arrays), shards_mine=mine, is_main=0 in mine, **options)
        assert writer.shards == [["a", "b"], ["c", "d"], ["e"]]
        assert writer.names_mine == list(names)
        for name in names:
            writer.write(name, whole((3,)), arrays[name])
        writer.commit()
        assert (tmp_path / huggingface.INDEX_FILE).exists() == (0 in mine)
    with pytest.raises(KeyError, match="c"):  # another process's
        writer.write("c", whole((3,)), arrays["c"])
    assert_holds(opened(tmp_path), arrays)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.fixture
def writer(tmp_path):
    specs = specs_of({"a": np.zeros((4, 3), np.float32), "e": np.zeros((0, 2)), "b": np.zeros(2)})
    writer = Writer(tmp_path, specs, shard_bytes=LARGE_SHARDS)
    yield writer
    writer.close()


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("shard_bytes", [1, 500, LARGE_SHARDS])
def test_any_order_from_several_threads_gives_the_same_files(
    tmp_path, monkeypatch, shard_bytes, local
):
    arrays = {
        "a": array_of((6, 5, 4), np.float32, 1),
        "e": array_of((3, 0), np.int8),
        "b": array_of((7,), np.int16, 2),
        "c": array_of((), np.float64, 3),
        "d": array_of((4, 9), ml_dtypes.bfloat16, 4),
    }
    pieces = [
        *(
            ("a", (slice(i, i + 2), slice(j, j + 1), slice(0, 4)))
            for i in (0, 2, 4)
            for j in range(5)
        ),
        *(("b", (slice(i, i + 1),)) for i in range(7)),
        ("c", ()),
        *(("d", (slice(i, i + 1), part)) for i in range(4) for part in (slice(0, 4), slice(4, 9))),
    ]
    wanted = tmp_path / "in_order"
    wanted.mkdir()
    write_all(wanted, arrays, shard_bytes=shard_bytes)
    if not local:
        monkeypatch.setattr(storage, "is_local", lambda path: False)
    for seed in range(3):
        random.Random(seed).shuffle(pieces)
        folder = tmp_path / str(seed)
        folder.mkdir()
        writer = Writer(folder, specs_of(arrays), shard_bytes=shard_bytes)
        together = threading.Barrier(4)

        def write_share(mine, writer=writer, together=together):
            together.wait()
            for name, index in mine:
                writer.write(name, index, arrays[name][(*index, ...)])

        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            for share in [threads.submit(write_share, pieces[i::4]) for i in range(4)]:
                share.result()
        writer.commit()
        assert sorted(os.listdir(folder)) == sorted(os.listdir(wanted))
        for path in wanted.iterdir():
            assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("index", [(slice(0, 5), slice(0, 3)), (slice(0, 4),)])
def test_boxes_outside_their_leaf_are_the_callers_fault(writer, index):
    shape = tuple(part.stop - part.start for part in index)
    with pytest.raises(AssertionError, match="a: .* is no box of shape"):
        writer.write("a", index, np.zeros(shape, np.float32))


def test_a_commit_too_early_is_the_callers_fault(writer, tmp_path, opened):
    array = array_of((4, 3), np.float32)
    too_early = r"commit with \d+ of \d+ bytes in .*model\.safetensors"
    with pytest.raises(AssertionError, match=too_early):
        writer.commit()
    writer.write("b", whole((2,)), np.ones(2))
    writer.write("a", (slice(2, 4), slice(0, 3)), array[2:])  # the last byte, but not the first
    with pytest.raises(AssertionError, match=too_early):
        writer.commit()
    writer.write("a", (slice(0, 2), slice(0, 3)), array[:2])
    writer.commit()
    assert_holds(opened(tmp_path), {"a": array, "e": np.zeros((0, 2)), "b": np.ones(2)})


def test_boxes_of_another_type_or_shape(writer):
    with pytest.raises(ValueError, match=r"a: got float64\[4, 3\], wanted float32\[4, 3\]"):
        writer.write("a", whole((4, 3)), np.zeros((4, 3)))
    with pytest.raises(ValueError, match=r"a: got float32\[12\], wanted float32\[4, 3\]"):
        writer.write("a", whole((4, 3)), np.zeros(12, np.float32))


def test_empty_leaves_may_be_left_out(tmp_path, opened):
    arrays = {"a": np.zeros((0, 2)), "b": np.ones(2), "c": np.zeros(0), "d": np.zeros((3, 0))}
    writer = Writer(tmp_path, specs_of(arrays), shard_bytes=1)
    writer.write("b", whole((2,)), arrays["b"])
    writer.write("d", whole((3, 0)), arrays["d"])
    writer.commit()
    assert_holds(opened(tmp_path), arrays)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (LeafSpec(name="a", shape=(), dtype=np.dtype(np.complex64)), "leaf a is complex64"),
        (
            LeafSpec(name="a", shape=(), dtype=np.dtype(ml_dtypes.float8_e4m3fn)),
            "leaf a is float8_e4m3fn, which is not written to safetensors; wanted one of float64",
        ),
        (LeafSpec(name="__metadata__", shape=(), dtype=np.dtype(np.int8)), "can't be named"),
        (LeafSpec(name="\ud800", shape=(), dtype=np.dtype(np.int8)), "can't be named"),
    ],
)
def test_leaves_that_the_format_can_not_hold(tmp_path, spec, message):
    with pytest.raises(ValueError, match=message):
        Writer(tmp_path, {spec.name: spec}, shard_bytes=LARGE_SHARDS)
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_is_named(writer, tmp_path):
    (tmp_path / "model.safetensors").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device: .*model.safetensors") as error:
        writer.write("a", whole((4, 3)), np.zeros((4, 3), np.float32))
    assert error.value.errno == errno.ENOSPC


def test_a_failing_sync_surfaces(writer, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    writer.write("a", whole((4, 3)), np.zeros((4, 3), np.float32))
    writer.write("b", whole((2,)), np.zeros(2))
    for _ in range(2):  # what it lost is not on disk the second time either
        with pytest.raises(OSError, match="Input/output error: .*model.safetensors"):
            writer.commit()


# --- What goes along ----------------------------------------------------------------------------

CARRIED = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "qwen.tiktoken",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "preprocessor_config.json",
}
LEFT = {
    "README.md",
    "LICENSE",
    "modeling_odd.py",
    "chat_template.py",
    "pytorch_model.bin",
    "other.safetensors",
}


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    for name in CARRIED | LEFT:
        (folder / name).write_text(json.dumps({"file": name}))
    (folder / "tokenizer_old.json").mkdir()
    return folder


def carry(tmp_path, base, **options):
    out = tmp_path / "out"
    out.mkdir()
    write_all(out, {"a": np.ones(1)}, carry_from=base, **options)
    return out


def test_config_and_tokenizer_go_along(tmp_path, base):
    out = carry(tmp_path, base)
    assert set(os.listdir(out)) == CARRIED | {"model.safetensors"}
    for name in CARRIED:
        assert (out / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"torch_dtype": "bfloat16", "x": 1}, {"torch_dtype": "float32", "x": 1}),
        ({"dtype": "bfloat16"}, {"dtype": "float32"}),
        ({"x": "ü"}, {"x": "ü", "torch_dtype": "float32"}),
        (
            {
                "dtype": "bfloat16",
                "text_config": {"dtype": "bfloat16"},
                "vision_config": {"layers": 1},
                "quantization_config": {"dtype": "int8"},
            },
            {
                "dtype": "float32",
                "text_config": {"dtype": "float32"},
                "vision_config": {"layers": 1},
                "quantization_config": {"dtype": "int8"},
            },
        ),
    ],
)
def test_the_config_says_the_new_dtype(tmp_path, base, config, wanted):
    (base / "config.json").write_text(json.dumps(config))
    out = carry(tmp_path, base, config_dtype="float32")
    found = json.loads((out / "config.json").read_text())
    assert found == wanted
    assert list(found) == list(wanted), "the order stays"


def test_a_config_that_is_none_is_refused_before_anything_is_written(tmp_path, base):
    (base / "config.json").write_text("dtype: bfloat16")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(CheckpointError, match="config.json begins with b'd', wanted a JSON object"):
        Writer(out, {}, shard_bytes=1, carry_from=base, config_dtype="float32")
    assert not os.listdir(out)


def test_links_out_of_the_base_are_not_carried(tmp_path, base):
    (tmp_path / "secret").write_text("secret")
    (base / "vocab.txt").symlink_to("../secret")
    with pytest.raises(CheckpointError, match="vocab.txt is a link out of the folder"):
        Writer(tmp_path, {}, shard_bytes=1, carry_from=base)
