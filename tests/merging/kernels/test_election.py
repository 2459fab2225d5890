"""Vote and disjoint mean, element by element against the definition in exact fractions."""

from __future__ import annotations

import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from merging.kernels.election import disjoint_sum, elect, ordered_sum, weighted

WEIGHTS = (0.5, 2.0, 1.0)  # products and sums with the values below are exact in float32
VALUES = (-2.0, -1.0, -0.0, 0.0, 1.0, 3.0)
CASES = np.array(list(itertools.product(VALUES, repeat=3)), np.float32).T  # [3 experts, 216]


def _definition(values: tuple[float, ...], weights: tuple[float, ...], zero_sign: int) -> Fraction:
    """The mean of the values whose sign is that of the weighted sum."""
    products = [Fraction(w) * Fraction(v) for w, v in zip(weights, values, strict=True)]
    elected = sum(products) or zero_sign
    agreeing = [i for i, product in enumerate(products) if product * elected > 0]
    if not agreeing:
        return Fraction(0)
    return sum(products[i] for i in agreeing) / sum(Fraction(weights[i]) for i in agreeing)


@pytest.mark.parametrize("jitted", (False, True), ids=("eager", "jitted"))
@pytest.mark.parametrize("zero_sign", (1, -1, 0))
@pytest.mark.parametrize("weights", (None, WEIGHTS), ids=("unweighted", "weighted"))
def test_disjoint_mean_is_the_definition(
    weights: tuple[float, ...] | None, zero_sign: int, jitted: bool
):
    def mean(vectors, weights, zero_sign):
        vote = elect(vectors, weights=weights)
        return disjoint_sum(vectors, vote, weights=weights, zero_sign=zero_sign, is_mean=True)

    vectors = list(map(jnp.asarray, CASES))
    found = (jax.jit(mean) if jitted else mean)(vectors, weights, jnp.float32(zero_sign))
    expected = [
        _definition(tuple(map(float, v)), weights or (1.0,) * 3, zero_sign) for v in CASES.T
    ]
    np.testing.assert_array_equal(found, np.array(list(map(float, expected)), np.float32))


def test_the_cases_hold_every_kind_of_vote():
    """Else the test above would show less than it says."""
    for weights in ((1.0,) * 3, WEIGHTS):
        votes = {np.sign(float(np.dot(weights, values))) for values in CASES.T}
        assert votes == {-1.0, 0.0, 1.0}
        cancelled = [v for v in CASES.T if np.dot(weights, v) == 0 and v.any()]
        assert len(cancelled) >= 5


def test_a_vote_of_zero_with_no_sign_elects_none():
    plus, minus = jnp.ones(3, jnp.float32), -jnp.ones(3, jnp.float32)
    vote = elect([plus, minus], weights=None)
    for zero_sign in (-1.0, 0.0, 1.0):
        mean = disjoint_sum(
            [plus, minus], vote, weights=None, zero_sign=jnp.float32(zero_sign), is_mean=True
        )
        np.testing.assert_array_equal(mean, np.full(3, zero_sign, np.float32))


def test_the_order_of_experts_is_the_order_of_the_sum():
    """In float32 1 is lost beside 2^25; added last it would not be, had the large ones gone first."""
    big, one = jnp.full(2, 2.0**25, jnp.float32), jnp.ones(2, jnp.float32)
    np.testing.assert_array_equal(ordered_sum([big, one, -big]), [0.0, 0.0])
    np.testing.assert_array_equal(ordered_sum([big, -big, one]), [1.0, 1.0])
    np.testing.assert_array_equal(jax.jit(ordered_sum)([big, one, -big]), [0.0, 0.0])
    np.testing.assert_array_equal(elect([big, one, -big], weights=None), [0.0, 0.0])


@pytest.mark.parametrize("experts", (1, 2, 16))
def test_the_vote_is_the_rounded_sum_of_rounded_products(experts: int):
    random = np.random.default_rng(experts)
    vectors = list(random.normal(0, 1, (experts, 4097)).astype(np.float32))
    weights = tuple(random.uniform(0.1, 2, experts).tolist())
    expected = np.float32(weights[0]) * vectors[0]
    for weight, vector in zip(weights[1:], vectors[1:], strict=True):
        expected = expected + np.float32(weight) * vector
    arrays = list(map(jnp.asarray, vectors))
    np.testing.assert_array_equal(elect(arrays, weights=weights), expected)
    jitted = jax.jit(lambda vectors, weights: elect(vectors, weights=weights))
    np.testing.assert_array_equal(jitted(arrays, weights), expected)


def test_weighted_by_none_is_as_it_is():
    vectors = [jnp.ones(2), jnp.zeros(2)]
    assert all(a is b for a, b in zip(weighted(vectors, None), vectors, strict=True))


def test_another_number_of_weights_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        weighted([jnp.ones(2), jnp.ones(2)], (1.0,))
