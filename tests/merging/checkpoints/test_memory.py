"""A checkpoint in memory keeps the contract of `format.py`."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from merging.checkpoints.memory import Reader, Writer


def whole(shape):
    return tuple(slice(0, size) for size in shape)


ARRAYS = {
    "z/matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
    "scalar": np.array(2.5, ml_dtypes.bfloat16),
    "empty": np.zeros((3, 0), np.float16),
    "steps": np.arange(5),
}


def test_specs_keep_order_shape_and_dtype():
    specs = Reader(ARRAYS, stacked={"z/matrix": 1}).specs()
    assert list(specs) == list(ARRAYS)
    assert [(s.shape, s.dtype) for s in specs.values()] == [
        (a.shape, a.dtype) for a in ARRAYS.values()
    ]
    assert specs["z/matrix"].stacked == 1
    assert specs["scalar"].stacked is None
    assert not specs["steps"].is_merged


def test_nested_mappings_are_joined():
    reader = Reader({"a": {"b": {"c": np.ones(2)}, "d": np.zeros(3)}, "e": np.ones(())})
    assert list(reader.specs()) == ["a/b/c", "a/d", "e"]


@pytest.mark.parametrize("name", ARRAYS)
def test_read_is_a_copy(name):
    reader = Reader(ARRAYS)
    box = reader.read(name, whole(ARRAYS[name].shape))
    np.testing.assert_array_equal(box, ARRAYS[name])
    assert box.dtype == ARRAYS[name].dtype
    assert not np.shares_memory(box, ARRAYS[name])


def test_read_a_box_into_out():
    out = np.empty((2, 2), np.float32)
    index = (slice(1, 3), slice(2, 4))
    assert Reader(ARRAYS).read("z/matrix", index, out=out) is out
    np.testing.assert_array_equal(out, ARRAYS["z/matrix"][1:3, 2:4])
    with pytest.raises(ValueError, match=r"z/matrix: out is float64\[2, 2\], wanted float32"):
        Reader(ARRAYS).read("z/matrix", index, out=np.empty((2, 2)))


def test_jax_arrays_come_as_numpy():
    reader = Reader({"a": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)})
    box = reader.read("a", (slice(0, 2), slice(1, 3)))
    assert isinstance(box, np.ndarray)
    assert box.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(box.astype(np.float32), [[1, 2], [4, 5]])


def test_digest_tells_shapes_names_and_dtypes_apart():
    digests = {
        Reader({name: np.zeros(shape, dtype)}).digest()
        for name, shape, dtype in [
            ("a", (2, 3), np.float32),
            ("b", (2, 3), np.float32),
            ("a", (3, 2), np.float32),
            ("a", (2, 3), np.int32),
        ]
    }
    assert len(digests) == 4
    assert Reader({"a": np.ones(2)}).digest() == Reader({"a": np.zeros(2)}).digest()


def test_round_trip():
    reader = Reader(ARRAYS)
    writer = Writer(reader.specs())
    for name, array in ARRAYS.items():
        if array.ndim == 2 and array.size:
            for row in range(array.shape[0]):
                index = (slice(row, row + 1), slice(0, array.shape[1]))
                writer.write(name, index, array[index])
        else:
            writer.write(name, whole(array.shape), array)
    assert not writer.arrays, "nothing is visible before commit"
    writer.commit()
    assert list(writer.arrays) == list(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(writer.arrays[name], array)


def test_writer_refuses_what_does_not_fit():
    writer = Writer(Reader(ARRAYS).specs())
    with pytest.raises(ValueError, match=r"steps: got float32\[5\], wanted int64\[5\]"):
        writer.write("steps", whole((5,)), np.zeros(5, np.float32))
    writer.write("steps", (slice(0, 2),), np.zeros(2, np.int64))
    with pytest.raises(AssertionError, match="elements missing.*'steps': 3"):
        writer.commit()
    writer.close()
    assert not writer.arrays
