"""The keep masks: the hash against Python integers, the share kept, and a campaign of a thousandth."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from merging.kernels import masks
from tests.campaigns import masks as campaign
from tests.oracle import masks as oracle

KEYS = [(0, 0, ""), (7, 3, "decoder/layers/7/mlp/wi/kernel"), (2**63, 1, "ein/Maß"), (-1, 0, "a")]
INDICES = np.array(
    [
        0,
        1,
        2,
        3,
        2**16,
        2**31 - 1,
        2**31,
        2**32 - 1,
        2**32,
        2**32 + 1,
        3 * 2**33 + 5,
        2**40 - 1,
        2**64 - 1,
    ],
    np.uint64,
)


def _split(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (indices & 0xFFFFFFFF).astype(np.uint32), (indices >> 32).astype(np.uint32)


@pytest.mark.parametrize("seed, expert, path", KEYS)
def test_keys_and_draws_equal_the_oracles(seed: int, expert: int, path: str):
    key = masks.tensor_key(seed=seed, expert=expert, path=path)
    words = oracle.key(seed, expert, path)
    assert key.dtype == np.uint32 and tuple(map(int, key)) == words

    random = np.random.default_rng(0).integers(0, 2**64, 300, dtype=np.uint64)
    indices = np.concatenate([INDICES, random, random >> np.uint64(32)])
    expected = np.array([oracle.draw(words, int(i)) for i in indices], np.uint32)
    low, high = _split(indices)
    for drawn in (  # operators alone, so numpy, eager and jitted give the same bits
        masks.hash32(key[:1], key[1:], low, high),
        masks.hash32(*map(jnp.asarray, (key[0], key[1], low, high))),
        jax.jit(masks.hash32)(key[0], key[1], low, high),
    ):
        assert drawn.dtype == np.uint32
        np.testing.assert_array_equal(drawn, expected)


def test_without_a_high_word_it_is_zero():
    key = masks.tensor_key(seed=0, expert=0, path="a")
    low = np.arange(1000, dtype=np.uint32)
    narrow, wide = masks.hash32(*key, low), masks.hash32(key[:1], key[1:], low, np.zeros_like(low))
    np.testing.assert_array_equal(narrow, wide)


def test_keys_differ():
    """Also where text put together without a separator would be the same."""
    names = [
        (s, e, p)
        for s in (0, 1, 11)
        for e in (0, 1, 10, 11)
        for p in ("", "0", "1", "a", "a/0", "a/00")
    ]
    keys = {tuple(masks.tensor_key(seed=s, expert=e, path=p)) for s, e, p in names}
    assert len(keys) == len(names)


@pytest.mark.parametrize(
    "keep", (1.0, np.nextafter(np.float32(1), np.float32(0)), 0.9, 0.5, 0.1, 1e-6, 2.0**-32, 1e-12)
)
def test_the_limit_keeps_that_share_of_all_draws(keep: float):
    limit = masks.keep_limit(jnp.float32(keep))
    assert limit.dtype == jnp.uint32
    assert int(limit) + 1 == max(int(float(np.float32(keep)) * 2**32), 1)
    edges = [0, int(limit), min(int(limit) + 1, 2**32 - 1), 2**32 - 1]
    for drawn in edges:
        assert (drawn <= int(limit)) == oracle.kept(drawn, keep)


@pytest.mark.parametrize("keep", (0.0001, 0.1, 0.5, 0.9, 1.0))
def test_kept_share(keep: float):
    count = 2**20
    key = masks.tensor_key(seed=1, expert=2, path="a")
    kept = masks.keep_mask(
        *map(jnp.asarray, key), jnp.arange(count, dtype=jnp.uint32), None, jnp.float32(keep)
    )
    deviation = np.sqrt(count * keep * (1 - keep))
    assert kept.dtype == jnp.bool_
    assert abs(int(kept.sum()) - count * keep) <= 4 * deviation


def test_under_one_key_no_draw_repeats():
    """Of 2^20 independent draws some 128 would."""
    key = masks.tensor_key(seed=0, expert=0, path="a")
    low = np.arange(2**20, dtype=np.uint32)
    for high in (0, 5):
        drawn = masks.hash32(key[:1], key[1:], low, np.full_like(low, high))
        assert len(np.unique(drawn)) == low.size


def test_a_mask_per_layer_is_each_layers_own():
    """Keys that broadcast over a stacked axis give what each layer's key gives."""
    keys = np.array([masks.tensor_key(seed=0, expert=0, path=f"layers/{i}/w") for i in range(3)])
    low = np.arange(20, dtype=np.uint32)
    keep = jnp.float32(0.5)
    stacked = masks.keep_mask(keys[:, :1], keys[:, 1:], low[None], None, keep)
    for layer, key in enumerate(keys):
        alone = masks.keep_mask(key[:1], key[1:], low, None, keep)
        np.testing.assert_array_equal(stacked[layer], alone)


# ---- the campaign (its command draws 2^30) -------------------------------------------------------------------------


@functools.cache
def _families() -> tuple[campaign.Family, ...]:
    return tuple(campaign.run(2**20, seeds=16))


def test_the_campaign_finds_nothing():
    failed = [family for family in _families() if not family.passes]
    assert not failed, [(family.name, family.worst) for family in failed]
    assert {len(family.scores) > 0 for family in _families()} == {True}


def test_the_scores_are_of_the_right_size():
    """A wrong variance would let bad masks pass: over a thousand scores, the mean square is 1."""
    squares = [score.z**2 for family in _families() for score in family.scores]
    assert 0.9 < np.mean(squares) < 1.2


def _one_round(key0: Array, key1: Array, low: Array, high: Array | None) -> Array:
    x = (low ^ key0) * np.uint32(0xED5AD4BB)
    return x ^ (x >> np.uint32(16)) ^ key1


def _two_bits_of_the_key(key0: Array, key1: Array, low: Array, high: Array | None) -> Array:
    """So that a quarter of all pairs of tensors share their draws."""
    return masks.hash32(key0 & np.uint32(0b11), np.uint32(0), low, high)


def _no_high_word(key0: Array, key1: Array, low: Array, high: Array | None) -> Array:
    return masks.hash32(key0, key1, low)


def _lowest_bit_is_stuck(key0: Array, key1: Array, low: Array, high: Array | None) -> Array:
    return masks.hash32(key0, key1, low, high) | np.uint32(1)


def _more_is_kept(key0: Array, key1: Array, low: Array, high: Array | None) -> Array:
    """By one in a hundred."""
    drawn = masks.hash32(key0, key1, low, high)
    return drawn - (drawn >> np.uint32(6))


@pytest.mark.parametrize(
    "bad, where",
    [
        (_one_round, "correlation: neighbours"),
        (_two_bits_of_the_key, "correlation: experts"),
        pytest.param(_no_high_word, "correlation: power-of-two lags", marks=pytest.mark.slow),
        pytest.param(_lowest_bit_is_stuck, "balance of output bits", marks=pytest.mark.slow),
        (_more_is_kept, "kept share: leaves"),
    ],
)
def test_the_campaign_finds_bad_masks(bad: campaign.Hash, where: str):
    found = [
        family.name for family in campaign.run(2**18, seeds=3, hash32=bad) if not family.passes
    ]
    assert where in found


@pytest.mark.parametrize("draws, seeds", [(2**15, 2), (2**20 + 1, 2), (2**20, 1)])
def test_the_campaign_refuses_numbers_it_cannot_use(draws: int, seeds: int):
    with pytest.raises(ValueError, match="give"):
        next(campaign.run(draws, seeds=seeds))
