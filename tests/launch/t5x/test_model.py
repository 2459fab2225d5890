"""Our decoders called as T5X calls its own: one model, another calling convention."""

from __future__ import annotations

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.t5x.model import INDEX, KEYS, DecoderForT5X
from merging.models.config import LlamaConfig, named
from merging.models.decoder import logical_axes
from merging.models.families import model_of

LENGTHS = np.array([0, 3, 6])  # of prompts, without the start token
ROW = 10
TINY = {"vocab_size": 29, "embed_dim": 8, "num_layers": 3, "num_heads": 2, "head_dim": 4, "mlp_dim": 16}
CONFIGS = {
    "scanned": named("mini_xs", **TINY),
    "unscanned": named("mini_xs", **TINY, scan_layers=False),
    "llama": LlamaConfig(**TINY, num_kv_heads=2, scan_layers=False),
}


@pytest.fixture(scope="module", params=CONFIGS)
def made(request):
    """(configuration, T5X's module, its variables)."""
    config = CONFIGS[request.param]
    module = DecoderForT5X(config)
    ones = jnp.ones((2, ROW), jnp.float32)  # T5X gives numbers of any type
    return config, module, module.init(jax.random.key(0), ones, ones, enable_dropout=False)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """A start token 0 and then others, [3, ROW]."""
    tokens = np.random.default_rng(0).integers(1, 29, (3, ROW), np.int32)
    tokens[:, 0] = 0
    return tokens


def flat(tree):
    return flax.traverse_util.flatten_dict(tree, sep="/")


def test_parameters_are_the_models_own_and_their_axes_are_named(made):
    config, _, variables = made
    model = model_of(config)
    assert set(variables) == {"params", "params_axes"}
    own = nn.unbox(model.init(jax.random.key(0), jnp.ones((2, ROW), jnp.int32))["params"])
    assert jax.tree.all(jax.tree.map(np.array_equal, own, variables["params"]))
    found = {name.removesuffix("_axes"): axes.names for name, axes in flat(variables["params_axes"]).items()}
    assert found == flat(logical_axes(model))


def test_logits_are_the_models(made, rows):
    config, module, variables = made
    model, params = model_of(config), {"params": variables["params"]}
    segments = np.array([[1] * 6 + [2] * 3 + [0]] * 3, np.int32)
    positions = np.array([[0, 1, 2, 3, 4, 5, 0, 1, 2, 0]] * 3, np.int32)
    inputs = np.array([[1] * 3 + [0] * 3 + [1] * 2 + [0] * 2] * 3, np.int32)
    logits = module.apply(
        params,
        rows,
        rows,
        decoder_segment_ids=segments,
        decoder_positions=positions,
        decoder_causal_attention=inputs,
        enable_dropout=False,
    )
    expected = model.apply(params, rows, segment_ids=segments, positions=positions, prefix_mask=inputs > 0)
    np.testing.assert_array_equal(logits, expected)
    causal = module.apply(params, rows, rows, enable_dropout=False)
    np.testing.assert_array_equal(causal, model.apply(params, rows))
    assert not np.allclose(causal, logits)


@pytest.mark.parametrize("is_prefix_lm", [False, True])
def test_tokens_read_one_by_one_give_the_logits_of_the_whole_row(made, rows, is_prefix_lm):
    _, module, variables = made
    params = {"params": variables["params"]}
    is_prompt = (np.arange(ROW) <= LENGTHS[:, None]).astype(np.int32)
    attention = is_prompt if is_prefix_lm else None
    whole = module.apply(params, rows, rows, decoder_causal_attention=attention, enable_dropout=False)

    # As T5X's predict_batch_with_aux does: an empty cache, the prompts, then a token a row, each from where its prompt ends.
    _, empty = module.apply(params, np.ones_like(rows), np.ones_like(rows), enable_dropout=False, decode=True, mutable=["cache"])
    assert empty["cache"][KEYS].shape[0] == 3 and empty["cache"][KEYS].shape[-1] == ROW
    assert not any(np.any(leaf) for leaf in empty["cache"].values())
    _, state = module.apply(
        params | empty,
        decoder_input_tokens=rows * is_prompt,
        decoder_target_tokens=is_prompt,
        decoder_causal_attention=attention,
        mutable=["cache"],
        enable_dropout=False,
        prefill=True,
        prefill_lengths=jnp.asarray(LENGTHS),
    )
    np.testing.assert_array_equal(state["cache"][INDEX], LENGTHS)
    step = jax.jit(lambda token, state: module.apply(params | state, token, token, enable_dropout=False, decode=True, max_decode_length=ROW, mutable=["cache"]))
    for more in range(ROW - LENGTHS.max()):
        at = LENGTHS + more
        logits, state = step(rows[np.arange(3), at][:, None], state)
        np.testing.assert_allclose(logits[:, 0], whole[np.arange(3), at], atol=2e-5)
        np.testing.assert_array_equal(state["cache"][INDEX], at + 1)


def test_decoding_from_nothing_reads_an_empty_cache(made, rows):
    _, module, variables = made
    params = {"params": variables["params"]}
    whole = module.apply(params, rows, rows, enable_dropout=False)
    _, state = module.apply(params, rows, rows, enable_dropout=False, decode=True, mutable=["cache"])
    for at in range(3):
        token = rows[:, at : at + 1]
        logits, state = module.apply(params | state, token, token, enable_dropout=False, decode=True, mutable=["cache"])
        np.testing.assert_allclose(logits[:, 0], whole[:, at], atol=2e-5)
    assert state["cache"][INDEX].shape == ()  # T5X then leaves it alone when it copies rows


def test_dropout_is_on_where_it_is_asked_for(rows):
    module = DecoderForT5X(named("mini_xs", **TINY, dropout_rate=0.5))
    variables = module.init(jax.random.key(0), rows, rows, enable_dropout=False)
    params = {"params": variables["params"]}
    one, two, without = (
        module.apply(params, rows, rows, enable_dropout=is_on, rngs={"dropout": jax.random.key(seed)})
        for seed, is_on in ((1, True), (2, True), (1, False))
    )
    assert not np.allclose(one, two)
    np.testing.assert_array_equal(without, module.apply(params, rows, rows, enable_dropout=False))
