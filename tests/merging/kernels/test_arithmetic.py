"""Sums of products and quotients have numpy's bits under jit; and without the care taken they would not."""

from __future__ import annotations

import fractions
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jaxtyping import Array

from merging.kernels.arithmetic import divide, float32, unfused

SHAPES = [
    (),
    (1,),
    (3, 0),
    (7, 5),
    (8,),
    (15,),
    (16,),
    (17,),
    (2, 3, 4),
    (1000,),
    (33, 257),
    (65536,),
]
DIVISORS = (1, 2, 3, 5, 6, 7, 9, 11, 16, 0.1, 0.3, 0.9, 1 / 3, 3e-4)


def _products_added(
    a: Array, b: Array, c: Array, scale: Array, *, keep=lambda product: product
) -> Array:
    """a + scale * b + b * c, from the left."""
    return (a + keep(scale * b)) + keep(b * c)


def _random(shape: tuple[int, ...], count: int) -> list[np.ndarray]:
    random = np.random.default_rng(len(shape) + 10 * int(np.prod(shape)))
    spread = [
        random.normal(0, 1, shape) * 2.0 ** random.integers(-9, 9, shape) for _ in range(count)
    ]
    return [np.asarray(x).astype(np.float32) for x in spread]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unfused_sums_of_products_equal_numpys(shape: tuple[int, ...]):
    a, b, c = _random(shape, 3)
    scale = np.float32(0.4)
    expected = _products_added(a, b, c, scale)
    unfused_sum = functools.partial(_products_added, keep=unfused)
    for run in (unfused_sum, jax.jit(unfused_sum)):
        np.testing.assert_array_equal(run(*map(jnp.asarray, (a, b, c, scale))), expected)
    constant = jax.jit(lambda a, b, c: unfused_sum(a, b, c, jnp.float32(0.4)))
    np.testing.assert_array_equal(constant(a, b, c), expected)


def test_without_it_they_differ():
    """The reason for `unfused`; if this fails, XLA no longer contracts and the select can go."""
    a, b, c = _random((65536,), 3)
    scale = np.float32(0.4)
    fused = np.asarray(jax.jit(_products_added)(a, b, c, scale))
    differing = (fused != _products_added(a, b, c, scale)).mean()
    assert 0.01 < differing < 0.5


def test_unfused_gives_its_argument():
    x = np.array([0.0, -0.0, 1.5, -np.inf, np.inf, np.nan, 1e-37, 3.4e38], np.float32)
    np.testing.assert_array_equal(jax.jit(unfused)(x), x)
    assert np.signbit(jax.jit(unfused)(x)[1])


@pytest.mark.parametrize("divisor", DIVISORS)
def test_divide_equals_numpys(divisor: float):
    """By a constant, by an argument, and after another division: each is a rewrite of XLA's of its own."""
    for shape in [(), (7, 5), (1000,)]:
        a, b = _random(shape, 2)
        number = np.float32(divisor)
        constant = jax.jit(lambda x: divide(x, divisor))  # noqa: B023
        np.testing.assert_array_equal(constant(a), a / number)
        np.testing.assert_array_equal(divide(jnp.asarray(a), divisor), a / number)
        np.testing.assert_array_equal(jax.jit(divide)(a, number), a / number)
        twice = jax.jit(lambda x, y, z: jnp.float32(0.7) * divide(x / y, z))
        np.testing.assert_array_equal(twice(a, b, number), np.float32(0.7) * (a / b / number))


def test_divide_rounds_once():
    """Against exact fractions, so that numpy is not the judge."""
    (x,) = _random((200,), 1)
    for number, quotient in zip(x, np.asarray(jax.jit(lambda x: divide(x, 3))(x)), strict=True):
        exact = fractions.Fraction(float(number)) / 3
        error = abs(fractions.Fraction(float(quotient)) - exact)
        assert 2 * error <= fractions.Fraction(float(np.spacing(abs(quotient))))


@pytest.mark.parametrize(
    "quotient",
    [
        lambda x, y, z: x / z.dtype.type(3),
        lambda x, y, z: x / z,
        lambda x, y, z: x / y / z,
    ],
    ids=["by a constant", "by a scalar", "after a division"],
)
def test_a_plain_division_differs(quotient: Callable[..., Array]):
    """The reason for `divide`; as for `unfused`."""
    arguments = *_random((65536,), 2), np.float32(3)
    found = np.asarray(jax.jit(quotient)(*arguments))
    assert 0.01 < (found != quotient(*arguments)).mean() < 0.5


@pytest.mark.parametrize("dtype", (ml_dtypes.bfloat16, np.float16))
def test_float32_is_exact_for_every_finite_16_bit_number(dtype: type):
    bits = np.arange(2**16, dtype=np.uint16)
    infinity = np.array(np.inf, dtype).view(np.uint16)
    every = bits[bits & 0x7FFF < infinity].view(dtype)
    if dtype is ml_dtypes.bfloat16:  # its subnormals are float32's, which XLA:CPU may flush
        every = every[abs(every.astype(np.float64)) >= 2.0**-126]
    converted = jax.jit(float32)(every)
    assert converted.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(converted, np.float64), every.astype(np.float64))
