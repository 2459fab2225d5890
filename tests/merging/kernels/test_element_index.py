"""Flat indices as two words, against numpy's 64-bit integers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from merging.kernels.element_index import element_index, multiply

CASES = {  # name: (shape of the box, strides, offset)
    "scalar": ((), (), 0),
    "scalar far out": ((), (), 2**40 + 3),
    "one": ((1,), (1,), 5),
    "empty": ((3, 0), (0, 1), 0),
    "whole": ((7, 5), (5, 1), 0),
    "box": ((3, 4), (100, 1), 2 * 100 + 7),
    "stacked axis": ((3, 4, 5), (5, 0, 1), 0),
    "all of stride 0": ((3, 4), (0, 0), 11),
    "transposed": ((5, 7), (1, 5), 0),
    "axis of one with a wide stride": ((1, 9), (2**33, 1), 2**33),
    "offset just below 2^32": ((4, 4), (4, 1), 2**32 - 7),
    "offset of 2^32": ((4, 4), (4, 1), 2**32),
    "offset near 2^64": ((2, 3), (3, 1), 2**64 - 4),
    "stride of 2^32": ((5, 3), (2**32, 1), 1),
    "stride above 2^32": ((6, 3), (3 * 2**32 + 12345, 7), 2**32 - 3),
    "stride of 2^32 - 1": ((9, 2), (2**32 - 1, 1), 2**32 - 1),
    "stride of 2^16 + 1": ((70_000,), (2**16 + 1,), 0),
    "stride of all 64 bits": ((300,), (0xFEDC_BA98_7654_3211,), 0x0123_4567_89AB_CDEF),
    "66 layers of 8192 x 32768": ((3, 2, 3), (8192 * 32768, 32768, 1), 63 * 8192 * 32768 + 32766),
}


def _numpys(shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> np.ndarray:
    index = np.full(shape, offset, np.uint64)
    for axis, stride in enumerate(strides):
        steps = np.arange(shape[axis], dtype=np.uint64) * np.uint64(stride)  # modulo 2^64
        index += steps.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return index


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("jitted", (False, True), ids=("eager", "jitted"))
def test_equals_numpys(case: str, jitted: bool):
    shape, strides, offset = CASES[case]
    expected = _numpys(shape, strides, offset)
    words = jnp.uint32(offset & 0xFFFFFFFF), jnp.uint32(offset >> 32)
    for wide in (True, False):
        indexed = functools.partial(element_index, shape, strides, wide=wide)
        low, high = (jax.jit(indexed) if jitted else indexed)(words)
        assert low.dtype == jnp.uint32
        np.testing.assert_array_equal(low, (expected & 0xFFFFFFFF).astype(np.uint32))
        if wide:
            assert high.dtype == jnp.uint32
            np.testing.assert_array_equal(high, (expected >> 32).astype(np.uint32))
        else:
            assert high is None


def test_a_box_has_the_indices_of_its_tensor():
    whole = element_index((6, 5, 4), (20, 4, 1), (jnp.uint32(0), jnp.uint32(0)), wide=False).low
    np.testing.assert_array_equal(whole, np.arange(120).reshape(6, 5, 4))
    offset = jnp.uint32(2 * 20 + 1 * 4 + 3), jnp.uint32(0)
    box = element_index((3, 4, 1), (20, 4, 1), offset, wide=False).low
    np.testing.assert_array_equal(box, whole[2:5, 1:5, 3:4])


@pytest.mark.parametrize(
    "factor", (0, 1, 3, 2**16 - 1, 2**16, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**48 - 1, 2**64 - 1)
)
def test_products_equal_pythons(factor: int):
    x = np.random.default_rng(0).integers(0, 2**32, 1000, dtype=np.uint64)
    x = np.concatenate([x, np.array([0, 1, 2**16 - 1, 2**16, 2**31, 2**32 - 1], np.uint64)])
    exact = [int(number) * factor % 2**64 for number in x]
    low, high = multiply(jnp.asarray(x.astype(np.uint32)), factor, wide=True)
    np.testing.assert_array_equal(low, np.array([p % 2**32 for p in exact], np.uint32))
    np.testing.assert_array_equal(high, np.array([p >> 32 for p in exact], np.uint32))
    narrow, none = multiply(jnp.asarray(x.astype(np.uint32)), factor, wide=False)
    np.testing.assert_array_equal(narrow, low)
    assert none is None
