"""Our decoders called as T5X calls its own: one model, another calling convention. None of this needs T5X."""

from __future__ import annotations

import functools
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.t5x.model import INDEX, KEYS, VALUES, DecoderForT5X
from merging.models.config import LlamaConfig, named
from merging.models.decoder import abstract_params, logical_axes
from merging.models.families import model_of
from tests.quick_cases import mostly_slow

LENGTHS = np.array([0, 2, 4])  # of prompts, without the start token
ROW = 7
SIZES = {
    "vocab_size": 29,
    "embed_dim": 8,
    "num_layers": 2,
    "num_heads": 4,
    "head_dim": 4,
    "mlp_dim": 16,
}
CONFIGS = {
    "palm, scanned": named("mini_xs", **SIZES, dropout_rate=0.5),
    "llama, unscanned": LlamaConfig(**SIZES, num_kv_heads=2, scan_layers=False),
}


class Called:
    """T5X's module of a configuration, with parameters, called as T5X calls it and compiled."""

    def __init__(self, config: Any):
        self.config, self.module, self.model = config, DecoderForT5X(config), model_of(config)
        ones = jnp.ones((2, ROW), jnp.float32)  # T5X gives numbers of any type
        init = functools.partial(self.module.init, enable_dropout=False)
        self.variables = jax.jit(init)(jax.random.key(0), ones, ones)
        self.params = {"params": self.variables["params"]}

    @functools.cached_property
    def logits(self):
        return jax.jit(functools.partial(self.module.apply, enable_dropout=False))

    @functools.cached_property
    def decode(self):
        arguments = {"enable_dropout": False, "decode": True, "mutable": ["cache"]}
        return jax.jit(functools.partial(self.module.apply, **arguments))

    @functools.cached_property
    def prefill(self):
        arguments = {"enable_dropout": False, "prefill": True, "mutable": ["cache"]}
        return jax.jit(functools.partial(self.module.apply, **arguments))


@pytest.fixture(scope="module", params=mostly_slow(CONFIGS, quick=["palm, scanned"]))
def called(request) -> Called:
    return Called(CONFIGS[request.param])


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """A start token 0 and then others, [3, ROW]."""
    tokens = np.random.default_rng(0).integers(1, 29, (3, ROW), np.int32)
    tokens[:, 0] = 0
    return tokens


def flat(tree):
    return flax.traverse_util.flatten_dict(tree, sep="/")


def test_parameters_are_the_models_own_and_their_axes_are_named(called):
    assert set(called.variables) == {"params", "params_axes"}
    own = abstract_params(called.model)
    found = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), called.params["params"])
    assert found == own
    axes = flat(called.variables["params_axes"])
    assert all(name.endswith("_axes") for name in axes)
    named_axes = {name.removesuffix("_axes"): each.names for name, each in axes.items()}
    assert named_axes == flat(logical_axes(called.model))


def test_logits_are_the_models(called, rows):
    packed = {
        "segment_ids": np.array([[1] * 4 + [2] * 2 + [0]] * 3, np.int32),
        "positions": np.array([[0, 1, 2, 3, 0, 1, 0]] * 3, np.int32),
    }
    inputs = np.array([[1] * 2 + [0] * 2 + [1, 0, 0]] * 3, np.int32)
    as_t5x = {f"decoder_{name}": each for name, each in packed.items()}
    logits = called.logits(called.params, rows, rows, decoder_causal_attention=inputs, **as_t5x)
    own = jax.jit(called.model.apply)(called.params, rows, prefix_mask=inputs > 0, **packed)
    np.testing.assert_allclose(logits, own, atol=1e-6)
    assert np.abs(logits - called.logits(called.params, rows, rows)).max() > 1e-3


@pytest.mark.parametrize("is_prefix_lm", [False, True])
def test_tokens_read_one_by_one_give_the_logits_of_the_whole_row(called, rows, is_prefix_lm):
    """The calls of T5X's predict_batch_with_aux: an empty cache, the prompts, then a token a row from each prompt's end."""
    params = called.params
    is_prompt = (np.arange(ROW) <= LENGTHS[:, None]).astype(np.int32)
    attention = is_prompt if is_prefix_lm else None
    whole = called.logits(params, rows, rows, decoder_causal_attention=attention)

    _, state = called.decode(params, np.ones_like(rows), np.ones_like(rows))
    assert not any(np.any(leaf) for leaf in state["cache"].values())
    _, state = called.prefill(
        params | state,
        decoder_input_tokens=rows * is_prompt,
        decoder_target_tokens=is_prompt,
        decoder_causal_attention=attention,
        prefill_lengths=jnp.asarray(LENGTHS),
    )
    np.testing.assert_array_equal(state["cache"][INDEX], LENGTHS)
    c = called.config
    for name in (KEYS, VALUES):
        wanted = (
            3,
            c.num_layers,
            c.num_kv_heads,
            c.head_dim,
            ROW,
        )  # the batch first, the length last
        assert state["cache"][name].shape == wanted
    for more in range(ROW - LENGTHS.max()):
        at = LENGTHS + more
        token = rows[np.arange(3), at][:, None]
        logits, state = called.decode(params | state, token, token)
        np.testing.assert_allclose(logits[:, 0], whole[np.arange(3), at], atol=2e-5)
        np.testing.assert_array_equal(state["cache"][INDEX], at + 1)


def test_decoding_from_nothing_reads_an_empty_cache(called, rows):
    whole = called.logits(called.params, rows, rows)
    _, state = called.decode(called.params, rows, rows)
    for at in range(3):
        token = rows[:, at : at + 1]
        logits, state = called.decode(called.params | state, token, token)
        np.testing.assert_allclose(logits[:, 0], whole[:, at], atol=2e-5)
    assert state["cache"][INDEX].shape == ()  # which T5X leaves alone when it copies rows


def test_dropout_is_on_where_it_is_asked_for(called, rows):
    rate = called.config.dropout_rate
    logits = jax.jit(functools.partial(called.module.apply, enable_dropout=True))
    one, other = (
        logits(called.params, rows, rows, rngs={"dropout": jax.random.key(seed)}) for seed in (1, 2)
    )
    assert np.allclose(one, other) == (rate == 0)
