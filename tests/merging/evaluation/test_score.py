"""The score of a row is the sum of its targets' log-probabilities under the model's own logits."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from merging import partitioning
from merging.evaluation.score import score
from merging.models.config import named
from merging.models.palm import Palm
from merging.partitioning import MeshShape
from merging.training.batch import Batch

B, T, V = 8, 12, 128
MODEL = Palm(named("mini_xs", vocab_size=V))


def batch() -> Batch:
    """Inputs that don't count, then targets, then padding; a prefix-LM."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, V, (B, T), dtype=np.int32)
    place = np.arange(T)[None]
    ends = rng.integers(6, T + 1, (B, 1))
    return Batch(
        tokens=tokens,
        targets=np.roll(tokens, -1, axis=1),
        weights=((place >= 4) & (place < ends)).astype(np.float32),
        prefix_mask=np.broadcast_to(place < 5, (B, T)),
    )


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


@pytest.mark.parametrize("chunks", [1, 4])
def test_it_is_the_sum_under_the_models_logits(params, chunks: int):
    rows = batch()
    logits = MODEL.apply({"params": params}, rows.tokens, prefix_mask=rows.prefix_mask)
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    chosen = np.take_along_axis(log_p, rows.targets[..., None], -1)[..., 0]
    found = score(MODEL, nn.unbox(params), rows, vocabulary_chunks=chunks)
    assert found.shape == (B,) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, (chosen * rows.weights).sum(-1), rtol=1e-5)


def test_a_mesh_scores_the_same(params):
    rows = batch()
    wanted = score(MODEL, nn.unbox(params), rows)
    mesh = MeshShape(data=2, fsdp=2, model=2).mesh()
    placed = jax.device_put(nn.unbox(params), partitioning.shardings(params, mesh))
    with partitioning.use(mesh):
        found = jax.jit(lambda params, rows: score(MODEL, params, rows))(
            placed, jax.device_put(rows, partitioning.batch_shardings(rows, mesh))
        )
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
