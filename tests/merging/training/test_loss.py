"""The loss is the plain one on whole logits, in any number of chunks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from merging.training.loss import TokenScores, loss_sums, token_scores

B, T, D, V = 2, 5, 8, 24
SCALE = 0.3


def inputs():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    table = jnp.asarray(3 * rng.normal(size=(V, D)), jnp.float32)
    return hidden, table, jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)


def plain(hidden, table, targets) -> TokenScores:
    """By jax's own softmax in float32."""
    logits = SCALE * jnp.einsum("btd,vd->btv", hidden, table)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return TokenScores(chosen, jax.nn.logsumexp(logits, -1), jnp.argmax(logits, -1) == targets)


@pytest.mark.parametrize("chunks", [1, 2, 3, 8, 24])
def test_scores_and_gradients_are_those_of_whole_logits(chunks: int):
    hidden, table, targets = inputs()
    weights = jnp.linspace(0.0, 1.0, B * T).reshape(B, T)

    def loss(score, hidden, table):
        return loss_sums(score(hidden, table, targets), weights, z_loss=0.01).loss

    def chunked(hidden, table, targets):
        return token_scores(hidden, table, targets, logit_scale=SCALE, chunks=chunks)

    found = jax.value_and_grad(loss, argnums=(1, 2))(chunked, hidden, table)
    wanted = jax.value_and_grad(loss, argnums=(1, 2))(plain, hidden, table)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    for a, b in zip(chunked(hidden, table, targets), plain(hidden, table, targets), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunks", [1, 4])
def test_huge_logits_stay_finite(chunks: int):
    hidden, table, targets = inputs()
    found = token_scores(1e4 * hidden, table, targets, chunks=chunks)
    assert np.isfinite(found.log_z).all() and np.isfinite(found.log_probability).all()
    assert found.log_probability.dtype == jnp.float32


@pytest.mark.parametrize("chunks", [1, 4])
def test_a_target_outside_the_vocabulary_scores_minus_infinity_and_may_be_left_out(chunks: int):
    hidden, table, targets = inputs()
    targets = targets.at[0, 0].set(-1).at[1, 1].set(V)
    scores = token_scores(hidden, table, targets, chunks=chunks)
    assert np.isneginf(scores.log_probability).sum() == 2
    weights = jnp.ones((B, T)).at[0, 0].set(0.0).at[1, 1].set(0.0)
    sums = loss_sums(scores, weights, z_loss=0.0)
    assert np.isfinite(sums.loss) and sums.weight == B * T - 2


def test_sums_are_weighted_and_z_loss_is_apart():
    scores = TokenScores(
        jnp.array([[-1.0, -2.0]]), jnp.array([[3.0, 5.0]]), jnp.array([[False, True]])
    )
    sums = loss_sums(scores, jnp.array([[1.0, 0.5]]), z_loss=0.1)
    np.testing.assert_allclose(sums, (2.0 + 2.15, 2.0, 2.15, 0.5, 1.5), rtol=1e-6)


def test_chunks_that_do_not_divide_are_refused():
    hidden, table, targets = inputs()
    with pytest.raises(ValueError, match="7 chunks don't divide a vocabulary of 24"):
        token_scores(hidden, table, targets, chunks=7)
