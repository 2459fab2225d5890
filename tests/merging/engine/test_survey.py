"""The survey's parts: packed bits and their counts, sampled brackets, exact sums, votes that prove a majority."""

from __future__ import annotations

import math

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from merging.checkpoints.format import LeafSpec
from merging.engine.packed import (
    IN_A_WORD,
    count,
    counted_bit,
    found_bit,
    has_alarm,
    pack,
    with_any_found,
)
from merging.engine.pieces import Piece, piece_at, pieces_of, tensors_of
from merging.engine.survey import Votes, exact_sum, l1_ratios
from merging.kernels.magnitude import (
    CODES,
    Search,
    code_to_magnitude,
    magnitude_to_code,
    propose_from_sample,
)
from merging.paths import Stacked


def codes_of(x: np.ndarray | np.float32) -> np.ndarray:
    """Magnitude codes, uint32."""
    return np.asarray(magnitude_to_code(jnp.asarray(x)))


@pytest.mark.parametrize("counted", [2, 10, 12, 13, 30])
@pytest.mark.parametrize("size", [1, 255, 256, 1003])
def test_packed_bits_are_counted_and_found(size: int, counted: int):
    rng = np.random.default_rng(size)
    bits, inside = rng.random((counted, size)) < 0.5, rng.random((counted - 2, size)) < 0.02
    alarm = np.zeros(size, bool)
    words = [np.asarray(word) for word in pack(list(bits), list(inside), alarm=jnp.asarray(alarm))]
    assert len(words) == -(-counted // IN_A_WORD)
    assert count(words, counted).tolist() == bits.sum(axis=1).tolist()
    chosen = with_any_found(words)
    np.testing.assert_array_equal(chosen, np.flatnonzero(inside.any(axis=0)))
    for i, row in enumerate(inside):
        flags = words[i // IN_A_WORD][chosen] & found_bit(i) != 0
        np.testing.assert_array_equal(chosen[flags], np.flatnonzero(row))
    for i, row in enumerate(bits):
        flags = words[i // IN_A_WORD] & counted_bit(i) != 0
        np.testing.assert_array_equal(flags, row)
    assert not has_alarm(words)
    alarm[-1] = True
    assert has_alarm([np.asarray(word) for word in pack(list(bits), alarm=jnp.asarray(alarm))])


def test_exact_sum_is_exact():
    rng = np.random.default_rng(0)
    values = (rng.normal(size=5000) * 10.0 ** rng.integers(-30, 30, 5000)).astype(np.float32)
    codes = codes_of(values)
    assert exact_sum(codes) * 2.0**-149 == pytest.approx(
        math.fsum(np.abs(values.astype(np.float64))), rel=1e-15
    )
    assert exact_sum(codes[::-1]) == exact_sum(codes)
    np.testing.assert_array_equal(l1_ratios([[6, 3], [1, 0]]), np.float32([2, 0]))


@pytest.mark.parametrize(
    ("votes", "exact", "want"),
    [
        (Votes(5, 3), True, 1),
        (Votes(3, 3), True, -1),
        (Votes(9, 1, certain_positive=8, certain_negative=1, uncertain=6), False, 1),
        (Votes(9, 1, certain_positive=8, certain_negative=1, uncertain=7), False, None),
        (Votes(1, 9, certain_positive=0, certain_negative=5, uncertain=4), False, -1),
    ],
)
def test_majority_is_claimed_only_when_proven(votes: Votes, exact: bool, want: int | None):
    assert votes.majority(guess_was_exact=exact) == want


# ---- thresholds ----------------------------------------------------------------------------------------------------

FLOATS = st.lists(
    st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False),
    min_size=1,
    max_size=300,
)


@hypothesis.given(values=FLOATS, density=st.floats(0.001, 1), edges=st.integers(0, 5))
@hypothesis.settings(max_examples=60, deadline=None)
def test_search_finds_the_kth_largest(values: list[float], density: float, edges: int):
    """By bins (edges = 0) and by a few edges a pass, with a bracket from a part of the data."""
    x = np.abs(np.array(values, np.float32))
    codes = codes_of(x).astype(np.int64)
    rank = int(density * x.size)
    search = Search(rank, x.size)
    if rank:
        search.propose(*propose_from_sample([codes[::2].astype(np.uint32)], density))
    while not search.is_done:
        if edges:
            at = search.edges(edges)
            search.narrow(at, [int((codes >= edge).sum()) for edge in at])
        else:
            bracket = search.bracket()
            inside = codes[(codes >= bracket.low) & (codes < bracket.high)]
            bins = np.bincount((inside - bracket.low) >> bracket.shift, minlength=bracket.bins)
            search.narrow_by_bins(bracket, int((codes >= bracket.high).sum()), bins)
    if rank == 0:
        assert search.threshold == np.inf and search.kept == 0
    else:
        assert search.threshold == np.sort(x)[::-1][rank - 1]
        assert search.kept == (x >= search.threshold).sum()


def test_counts_beyond_32_bits_find_a_threshold():
    """2^40 entries, 3/4 of them at 1.0 and the rest at 2.0: known from their counts alone."""
    size = 1 << 40
    one, two = (int(codes_of(np.float32(v))) for v in (1.0, 2.0))

    def at_least(code: int) -> int:
        return size if code <= one else size // 4 if code <= two else 0

    for density, want in ((0.2, 2.0), (0.25, 2.0), (0.26, 1.0), (1.0, 1.0)):
        search = Search(int(density * size), size)
        while not search.is_done:
            edges = search.edges(4)
            search.narrow(edges, [at_least(edge) for edge in edges])
        assert search.threshold == want
        assert search.kept == at_least(int(codes_of(np.float32(want))))


def test_codes_are_in_the_order_of_magnitudes():
    values = np.array([0, 1e-45, 1.17549435e-38, 1.0, 3.4e38], np.float32)
    codes = codes_of(-values)
    assert (
        codes[0] == codes[1] == 0
        and codes[2] == 1
        and np.all(np.diff(codes[1:].astype(np.int64)) > 0)
    )
    assert code_to_magnitude(CODES) == np.inf
    np.testing.assert_array_equal([code_to_magnitude(int(c)) for c in codes[2:]], values[2:])


def test_sampled_bracket_holds_the_threshold_of_the_whole():
    rng = np.random.default_rng(0)
    data = np.abs(rng.normal(size=(4096, 256)) * rng.lognormal(size=(4096, 1))).astype(np.float32)
    codes = codes_of(data)
    for density in (0.05, 0.2, 0.9):
        low, high, guess = propose_from_sample(list(codes[::4]), density)
        exact = np.sort(codes, axis=None)[::-1][int(density * codes.size) - 1]
        assert low <= exact < high and low <= guess < high
        share = ((codes >= low) & (codes < high)).mean()
        assert share < 0.15, "the bracket is so wide that it saves nothing"


# ---- pieces --------------------------------------------------------------------------------------------------------


@hypothesis.given(
    shape=st.lists(st.integers(1, 9), min_size=0, max_size=4),
    limit=st.integers(1, 60),
    axis=st.none() | st.integers(0, 3),
)
@hypothesis.settings(max_examples=80, deadline=None)
def test_pieces_cover_a_leaf_once_in_order(shape: list[int], limit: int, axis: int | None):
    axis = None if axis is None or axis >= len(shape) else axis
    leaf = LeafSpec(name="layers/w", shape=tuple(shape), dtype=np.dtype(np.float32), stacked=axis)
    values = np.arange(leaf.size).reshape(leaf.shape)
    for tensor in tensors_of(leaf, Stacked({"layers": axis} if axis is not None else None)):
        whole = values if axis is None else np.take(values, tensor.layer, axis)
        found = list(pieces_of(tensor, limit))
        assert all(piece.size <= max(limit, 1) for piece in found)
        start = 0
        for piece in found:
            assert piece.start == start
            np.testing.assert_array_equal(
                values[piece.index].ravel(), whole.ravel()[start : start + piece.size]
            )
            start += piece.size
        assert start == tensor.size
        middle = piece_at(tensor, tensor.size // 2, limit)
        assert isinstance(middle, Piece) and middle.start <= tensor.size // 2
        np.testing.assert_array_equal(
            values[middle.index].ravel(), whole.ravel()[middle.start : middle.start + middle.size]
        )
