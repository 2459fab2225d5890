"""Optimizers against plain transcriptions in numpy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from merging.models.decoder import Decoder
from merging.training.batch import Batch
from merging.training.optimizer import WeightAveraging, adafactor, adamw, decays, freezing
from merging.training.step import init_state, train_step
from tests.merging.models import families

STACKED = {"layers": 0}
_TOKENS = np.random.default_rng(0).integers(0, 40, (4, 7), dtype=np.int32)  # of `families`
BATCH = Batch(_TOKENS[:, :-1], _TOKENS[:, 1:], np.ones((4, 6), np.float32))


def tree(seed: int):
    """A matrix, a stacked matrix whose layers differ in size, and a stacked scale."""
    rng = np.random.default_rng(seed)
    layers = rng.normal(size=(2, 3, 4)) * np.array([1.0, 100.0])[:, None, None]
    return {
        "embedding": rng.normal(size=(5, 4)).astype(np.float32),
        "layers": {
            "kernel": layers.astype(np.float32),
            "scale": rng.normal(size=(2, 3)).astype(np.float32),
        },
    }


def run(optimizer: optax.GradientTransformation, steps: int):
    params = tree(0)
    state = optimizer.init(params)
    update = functools.partial(optax.with_extra_args_support(optimizer).update, stacked=STACKED)
    for step in range(1, steps + 1):
        with jax.numpy_dtype_promotion("standard"):  # optax's AdamW raises floats to whole numbers
            updates, state = jax.jit(update)(tree(step), state, params)
        params = optax.apply_updates(params, updates)
    return params


def plain_adafactor(x, gradients, *, rate, axes, is_decayed):
    """PaLM's section 5, in float64; `axes` are those of one tensor."""
    x = x.astype(np.float64)
    moment = momentum = np.zeros_like(x)
    for k, g in enumerate(gradients, 1):
        g = g.astype(np.float64)
        beta = 1 - float(k) ** -0.8
        moment = beta * moment + (1 - beta) * (g**2 + 1e-30)
        update = g / np.sqrt(moment)
        update /= np.maximum(1, np.sqrt((update**2).mean(axes, keepdims=True)))
        scale = np.maximum(np.sqrt((x**2).mean(axes, keepdims=True)), 1e-3)
        momentum = 0.9 * momentum + 0.1 * rate(k) * scale * update
        x = x - momentum - (rate(k) ** 2 * x if is_decayed else 0)
    return x


def test_adafactor_is_palms_tensor_by_tensor():
    found = run(adafactor(lambda count: 0.05 / jnp.sqrt(count + 1.0)), 6)
    grads = [tree(step) for step in range(1, 7)]

    def rate(k: int) -> float:
        return 0.05 / np.sqrt(k)

    start = tree(0)
    wanted = {
        "embedding": plain_adafactor(
            start["embedding"],
            [g["embedding"] for g in grads],
            rate=rate,
            axes=(0, 1),
            is_decayed=True,
        ),
        "layers": {
            name: plain_adafactor(
                start["layers"][name],
                [g["layers"][name] for g in grads],
                rate=rate,
                axes=axes,
                is_decayed=name == "kernel",
            )
            for name, axes in (("kernel", (1, 2)), ("scale", (1,)))
        },
    }
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_a_stacked_layer_is_stepped_as_it_would_be_alone():
    stacked = run(adafactor(0.01), 3)["layers"]["kernel"]
    optimizer = adafactor(0.01)
    for layer in range(2):
        params = {"kernel": tree(0)["layers"]["kernel"][layer]}
        state = optimizer.init(params)
        for step in range(1, 4):
            gradient = {"kernel": tree(step)["layers"]["kernel"][layer]}
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(stacked[layer], params["kernel"], rtol=1e-6)


@pytest.mark.slow
def test_a_step_of_scanned_layers_is_that_of_unrolled_ones():
    """Without a word from the user, and through what goes around an optimizer."""

    def stepped(model: Decoder, params):
        # Updates are smooth in gradients by this epsilon, where their signs would be noise; and are clipped.
        palms = adafactor(0.1, epsilon=1e-6, clipping_threshold=0.1)
        optimizer = WeightAveraging().around(freezing(palms, ["token_embedder/*"]))
        step = functools.partial(train_step, model=model, optimizer=optimizer)
        state, _ = jax.jit(step)(init_state(params, optimizer), BATCH, np.int32(0))
        return state.params

    scanned = families.build("palm")
    start = families.params_of(scanned)
    factors = jnp.array([1.0, 2.0, 0.5])  # layers' sizes differ
    start["layers"] = jax.tree.map(
        lambda x: x * factors.reshape(-1, *[1] * (x.ndim - 1)), start["layers"]
    )
    found = families.unstacked(stepped(scanned, start))
    wanted = stepped(families.build("palm", scan_layers=False), families.unstacked(start))
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, a), b, before in zip(
        jax.tree.leaves_with_path(found),
        jax.tree.leaves(wanted),
        jax.tree.leaves(families.unstacked(start)),
        strict=True,
    ):
        moved = np.linalg.norm(b - before)
        assert np.linalg.norm(a - b) <= 1e-4 * moved, jax.tree_util.keystr(path)
        assert (moved == 0) == ("token_embedder" in jax.tree_util.keystr(path))


def test_without_momentum_and_decay_it_holds_one_moment_a_parameter():
    state = adafactor(0.01, b1=None, weight_decay_exponent=None).init(tree(0))
    size = sum(x.size for x in jax.tree.leaves(state) if np.ndim(x))
    assert size == sum(x.size for x in jax.tree.leaves(tree(0)))


def test_adamw_is_optax_and_spares_scales():
    assert decays(tree(0)) == {"embedding": True, "layers": {"kernel": True, "scale": False}}
    found = run(adamw(0.1, weight_decay=0.1), 3)
    without = run(adamw(0.1), 3)
    plain = run(optax.adamw(0.1, b1=0.9, b2=0.99, weight_decay=0.1), 3)
    np.testing.assert_array_equal(found["layers"]["kernel"], plain["layers"]["kernel"])
    np.testing.assert_array_equal(found["layers"]["scale"], without["layers"]["scale"])


@pytest.mark.parametrize("make", [adamw, adafactor])
def test_moments_of_bfloat16_parameters_are_float32(make):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree(0))
    state = make(0.01).init(params)
    first = [x for x in jax.tree.leaves(state) if np.ndim(x)]
    assert first and any(x.dtype == jnp.float32 for x in first)
