"""Choices packed behind one prompt score as each would alone, under the model's own logits."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from merging import partitioning
from merging.evaluation.rows import choice_rows, stacked
from merging.evaluation.score import Choices, score
from merging.models.config import Gemma3Config, named
from merging.models.families import model_of
from merging.partitioning import MeshShape

V = 128
PALM = named("mini_xs", vocab_size=V)
GEMMA3 = Gemma3Config(
    vocab_size=V,
    embed_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    layer_kinds=("local", "global"),
    window=4,  # which ends within a choice, counted by positions
    query_scale=8**-0.5,
)


def examples() -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """Prompts of 1 to 9 tokens with 1 to 4 choices of 1 to 6."""
    rng = np.random.default_rng(0)
    return [
        (rng.integers(1, V, p), [rng.integers(1, V, rng.integers(1, 7)) for _ in range(c)])
        for p, c in ((1, 2), (5, 1), (7, 4), (9, 3), (4, 2), (2, 3), (8, 2), (6, 4))
    ]


def batch(row_length: int = 64) -> tuple[Choices, np.ndarray]:
    """The examples' rows, and the number of each target's choice, -1 where there is none."""
    rows, slot = [], 0
    for prompt, choices in examples():
        rows += choice_rows(prompt, choices, first_slot=slot, row_length=row_length)
        slot += len(choices)
    T, N = (max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True))
    arrays = {
        name: stacked([getattr(row, name) for row in rows], rows=len(rows), length=length)
        for name, length in (
            ("tokens", T),
            ("segment_ids", T),
            ("positions", T),
            ("reads", N),
            ("targets", N),
        )
    }
    slots = stacked([row.slots + 1 for row in rows], rows=len(rows), length=N) - 1
    return Choices(**arrays), slots


def summed(found: np.ndarray, slots: np.ndarray) -> np.ndarray:
    is_meant = slots >= 0
    return np.bincount(slots[is_meant], weights=np.asarray(found)[is_meant])


def alone(model, params, *, bidirectional: bool) -> np.ndarray:
    """Each choice's log-probability from logits of a row of its own, whose end is padding that nothing before it sees."""

    @jax.jit
    def log_probs(tokens, in_prompt):
        prefix = in_prompt if bidirectional else None
        return jax.nn.log_softmax(model.apply({"params": params}, tokens, prefix_mask=prefix))

    tokens, in_prompt, choices = [], [], []
    for prompt, each in examples():
        for choice in each:
            tokens.append(np.concatenate([prompt, choice]))
            in_prompt.append(np.arange(16) < len(prompt))
            choices.append((len(prompt), choice))
    tokens = stacked(tokens, rows=len(tokens), length=16)
    found = np.asarray(log_probs(tokens, np.array(in_prompt)))
    return np.array(
        [
            row[start - 1 + np.arange(len(choice)), choice].sum()
            for row, (start, choice) in zip(found, choices, strict=True)
        ]
    )


@pytest.fixture(scope="module", params=["palm", "gemma3"])
def model_and_params(request):
    model = model_of({"palm": PALM, "gemma3": GEMMA3}[request.param])
    return model, model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


@pytest.mark.parametrize(("bidirectional", "chunks", "row_length"), [(True, 1, 64), (False, 4, 12)])
def test_choices_score_as_alone(
    model_and_params, bidirectional: bool, chunks: int, row_length: int
):
    model, boxed = model_and_params
    params = nn.unbox(boxed)
    rows, slots = batch(row_length)
    step = functools.partial(score, model, bidirectional=bidirectional, vocabulary_chunks=chunks)
    found, _ = jax.jit(step)(params, rows)
    wanted = alone(model, params, bidirectional=bidirectional)
    np.testing.assert_allclose(summed(found, slots), wanted, atol=2e-5)


def test_a_mesh_scores_the_same():
    model = model_of(PALM)
    boxed = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rows, slots = batch()
    step = functools.partial(score, model)
    params = nn.unbox(boxed)
    wanted = summed(jax.jit(step)(params, rows)[0], slots)
    mesh = MeshShape(data=2, fsdp=2, model=2).mesh()
    with partitioning.use(mesh):
        placed = jax.device_put(params, partitioning.shardings(boxed, mesh))
        rows = jax.device_put(rows, partitioning.batch_shardings(rows, mesh))
        found, _ = jax.jit(step)(placed, rows)
    np.testing.assert_allclose(summed(found, slots), wanted, atol=2e-5)
