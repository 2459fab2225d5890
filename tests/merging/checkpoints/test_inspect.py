"""Norms and differences against plain numpy on whole arrays, however they are cut."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from merging.checkpoints import inspect
from merging.checkpoints.boxes import row_boxes
from merging.checkpoints.memory import Reader

SHAPES = [(), (1,), (3, 0), (7,), (5, 11), (2, 3, 4, 5)]
FLOATS = [np.float32, ml_dtypes.bfloat16, np.float16, np.float64]


@pytest.fixture(autouse=True, params=[1, 6, 1 << 20], ids="blocks of {}".format)
def block_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Every test under blocks of a few elements, and of all."""
    monkeypatch.setattr(inspect, "BLOCK_ELEMENTS", request.param)


def random(shape: tuple[int, ...], dtype: type, seed: int = 0) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def contents_of(array: np.ndarray) -> inspect.Contents:
    (found,) = inspect.contents(Reader({"x": array}), ["x"])
    return found


def difference_of(first: np.ndarray, second: np.ndarray) -> inspect.Difference:
    (found,) = inspect.differences(Reader({"x": first}), Reader({"x": second}), ["x"])
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_cover_every_element_once_in_order(shape: tuple[int, ...]):
    array = np.arange(math.prod(shape)).reshape(shape)
    blocks = [array[(*box, ...)] for box in row_boxes(shape, inspect.BLOCK_ELEMENTS)]
    assert np.concatenate([b.ravel() for b in blocks] or [[]]).tolist() == array.ravel().tolist()
    assert all(block.flags.c_contiguous and block.size for block in blocks)


@pytest.mark.parametrize(("limit", "largest"), [(1, 1), (5, 5), (7, 5), (20, 20), (119, 60)])
def test_boxes_are_as_large_as_they_may(limit: int, largest: int):
    sizes = [math.prod(s.stop - s.start for s in box) for box in row_boxes((2, 3, 4, 5), limit)]
    assert max(sizes) == largest and sum(sizes) == 120


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_contents_are_those_of_float64(shape: tuple[int, ...], dtype: type):
    array = random(shape, dtype)
    exact = array.astype(np.float64).ravel()
    found = contents_of(array)
    assert found.name == "x"
    assert found.norm == pytest.approx(np.linalg.norm(exact), rel=1e-12)
    assert found.largest == np.abs(exact).max(initial=0.0)
    assert found.not_finite == 0


def test_integers_and_booleans_have_norms_too():
    assert contents_of(np.array([3, -4])).norm == 5.0
    assert contents_of(np.array([3, -4])).largest == 4.0
    assert contents_of(np.array([True, False, True])).norm == pytest.approx(math.sqrt(2))


def test_what_is_not_finite_is_counted_and_left_out():
    found = contents_of(np.array([[3, np.nan, -4], [np.inf, 0, -np.inf]], np.float16))
    assert (found.norm, found.largest, found.not_finite) == (5.0, 4.0, 3)


def test_squares_beyond_float64_are_infinite_and_do_not_warn():
    assert contents_of(np.array([1e200, 0.0])).norm == np.inf
    assert contents_of(np.array([3e38, 0.0], np.float32)).norm == pytest.approx(3e38, rel=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_differences_are_those_of_float64(shape: tuple[int, ...], dtype: type):
    first, second = random(shape, np.float32), random(shape, dtype, seed=1)
    second = np.where(random(shape, np.float32, seed=2) > 0, second, first.astype(dtype))
    a, b = first.astype(np.float64), second.astype(np.float64)
    found = difference_of(first, second)
    assert found.size == a.size
    assert found.different == np.count_nonzero(a != b)
    assert found.share == (found.different / a.size if a.size else 0.0)
    assert found.largest == np.abs(b - a).max(initial=0.0)
    assert found.norm == pytest.approx(np.linalg.norm((b - a).ravel()), rel=1e-12)
    assert found.not_finite == 0


def test_numbers_are_compared_not_their_bits():
    first = np.array([0.0, np.nan, np.inf, 1.0, 2.0], np.float32)
    second = np.array([-0.0, np.nan, np.inf, 1.0, 2.0], ml_dtypes.bfloat16)
    assert difference_of(first, second).different == 0


def test_what_is_not_finite_on_one_side_differs_and_is_left_out_of_the_norm():
    first = np.array([1.0, np.nan, np.inf, np.inf, 5.0], np.float32)
    second = np.array([np.nan, 1.0, -np.inf, 0.0, 8.0], np.float32)
    found = difference_of(first, second)
    assert (found.different, found.not_finite) == (5, 4)
    assert (found.largest, found.norm) == (3.0, 3.0)


def test_integers_that_float64_can_not_tell_apart_are_counted():
    first = np.array([2**53, 2**53, 7])
    second = np.array([2**53 + 1, 2**53, 9])
    found = difference_of(first, second)
    assert (found.different, found.largest) == (2, 2.0)
    assert difference_of(np.array([True, False]), np.array([True, True])).norm == 1.0


def test_structure_tells_what_can_not_be_compared():
    first = {
        "a": np.zeros(2, np.float32),
        "b": np.zeros(2, np.float32),
        "c": np.zeros(2),
        "d": np.zeros(2),
    }
    second = {
        "d": np.zeros(2, np.int32),
        "c": np.zeros(3),
        "e": np.zeros(1),
        "b": np.zeros(2, np.float32),
    }
    found = inspect.structure(Reader(first).specs(), Reader(second).specs())
    assert [spec.name for spec in found.only_first] == ["a"]
    assert [spec.name for spec in found.only_second] == ["e"]
    assert [(a.shape, b.shape) for a, b in found.reshaped] == [((2,), (3,))]
    assert [(a.dtype, b.dtype) for a, b in found.retyped] == [(np.float64, np.int32)]
    assert found.comparable == ["b", "d"]


def test_totals_are_those_of_all_elements():
    first = {"x": random((4, 5), np.float32), "y": random((7,), np.float32)}
    second = {"x": random((4, 5), np.float32, seed=1), "y": first["y"]}
    a, b = (np.concatenate([leaf.ravel() for leaf in each.values()]) for each in (first, second))
    total = inspect.total_contents(inspect.contents(Reader(first), first))
    assert total.norm == pytest.approx(np.linalg.norm(a.astype(np.float64)), rel=1e-12)
    assert total.largest == np.abs(a).max()
    change = inspect.total_difference(inspect.differences(Reader(first), Reader(second), first))
    assert (change.size, change.different) == (27, 20)
    assert change.norm == pytest.approx(np.linalg.norm(b.astype(np.float64) - a), rel=1e-12)
    assert inspect.total_contents([]).norm == inspect.total_difference([]).share == 0.0


def test_patterns_match_names_as_stored_and_as_paths():
    specs = Reader({"model.layers.3.mlp.up": np.zeros(1), "model.norm": np.zeros(1)}).specs()
    for pattern in ("*mlp*", "model.layers.3.*", "model/layers/[0-9]/mlp/up"):
        assert list(inspect.matching(specs, pattern, where="here")) == ["model.layers.3.mlp.up"]
    assert inspect.matching(specs, "*", where="here") == specs
    with pytest.raises(ValueError, match=r"here: no leaf is like 'mlp'; one is model\.layers"):
        inspect.matching(specs, "mlp", where="here")
    assert inspect.matching({}, "mlp", where="here") == {}
