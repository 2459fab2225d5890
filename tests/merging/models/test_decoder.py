"""What holds for every family: scanned or not, packed or not, recomputed or not, the same numbers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from merging.models import decoder
from tests.merging.models import families

FAMILIES = list(families.CONFIGS)


@functools.partial(jax.jit, static_argnums=0)
def apply(model: decoder.Decoder, params: dict, tokens: np.ndarray, given: dict) -> jax.Array:
    """Tokens are an argument, so that other tokens need no other program."""
    return model.apply({"params": params}, tokens, **given)


def logits_of(model: decoder.Decoder, params: dict, tokens: np.ndarray, **given) -> np.ndarray:
    return np.asarray(apply(model, params, tokens, given))


@pytest.mark.parametrize("family", FAMILIES)
def test_scanned_equals_unrolled(family: str):
    scanned = families.build(family)
    unrolled = families.build(family, scan_layers=False)
    params = families.params_of(scanned)
    tokens = families.tokens_of(scanned, (2, 9))
    found = logits_of(unrolled, families.unstacked(params), tokens)
    np.testing.assert_allclose(found, logits_of(scanned, params, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_recomputing_changes_no_gradient(scan_layers: bool):
    def gradient(remat: str) -> dict:
        model = families.build("palm", scan_layers=scan_layers, remat=remat, num_layers=2)
        return jax.jit(
            jax.grad(lambda p: jax.nn.logsumexp(model.apply({"params": p}, tokens), axis=-1).sum())
        )(params)

    model = families.build("palm", scan_layers=scan_layers, num_layers=2)
    params, tokens = families.params_of(model), families.tokens_of(model, (2, 6))
    wanted = gradient("none")
    for remat in ("dots", "full"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
            gradient(remat),
            wanted,
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("with_prefix", [True, False])
def test_packed_sequences_never_see_one_another(family: str, with_prefix: bool):
    """One is changed, in every way: the others' logits keep their bits."""
    model = families.build(family)
    params = families.params_of(model)
    lengths = (5, 3, 6, 2)  # and padding
    segment_ids = np.repeat([1, 2, 3, 4, 0], [*lengths, 4])[None]
    positions = np.concatenate([*map(np.arange, lengths), np.arange(4)])[None]
    prefix_mask = (positions < 2) & (segment_ids > 0) if with_prefix else None
    tokens = families.tokens_of(model, (1, 20))

    def packed(tokens: np.ndarray) -> np.ndarray:
        return logits_of(
            model,
            params,
            tokens,
            segment_ids=segment_ids,
            positions=positions,
            prefix_mask=prefix_mask,
        )[0]

    before = packed(tokens)
    for changed in range(5):
        mine = segment_ids[0] == changed
        other = np.where(mine, (tokens + 7) % model.config.vocab_size, tokens)
        after = packed(other)
        assert (before[~mine] == after[~mine]).all()
        assert (before[mine] != after[mine]).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_have_the_logits_they_have_alone(family: str):
    model = families.build(family)
    params = families.params_of(model)
    one, two = families.tokens_of(model, (1, 7)), families.tokens_of(model, (1, 5), seed=2)
    packed = logits_of(
        model,
        params,
        np.concatenate([one, two], axis=1),
        segment_ids=np.repeat([1, 2], [7, 5])[None],
        positions=np.concatenate([np.arange(7), np.arange(5)])[None],
    )
    alone = [logits_of(model, params, each) for each in (one, two)]
    np.testing.assert_allclose(packed, np.concatenate(alone, axis=1), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_token_sees_what_follows(family: str):
    model = families.build(family)
    params = families.params_of(model)
    tokens = families.tokens_of(model, (1, 10))
    changed = tokens.copy()
    changed[0, 6] = (changed[0, 6] + 1) % model.config.vocab_size
    before, after = logits_of(model, params, tokens)[0], logits_of(model, params, changed)[0]
    assert (before[:6] == after[:6]).all() and (before[6] != after[6]).any()


@pytest.mark.parametrize("family", ["palm", "llama"])
def test_a_prefix_sees_itself_whole_and_nothing_behind_it(family: str):
    model = families.build(family)
    params = families.params_of(model)
    tokens, prefix_mask = families.tokens_of(model, (1, 10)), (np.arange(10) < 4)[None]
    before = logits_of(model, params, tokens, prefix_mask=prefix_mask)[0]
    for position in (3, 4):
        changed = tokens.copy()
        changed[0, position] = (changed[0, position] + 1) % model.config.vocab_size
        after = logits_of(model, params, changed, prefix_mask=prefix_mask)[0]
        first = 0 if position < 4 else position  # the first token whose logits change
        assert (before[:first] == after[:first]).all()
        assert (before[first:] != after[first:]).any(-1).all()


def test_a_local_layer_sees_its_window_and_no_more():
    layers = {"num_layers": 1, "layer_kinds": ("local",), "window": 4}
    model = families.build("gemma3", **layers)
    params = families.params_of(model)
    tokens = families.tokens_of(model, (1, 10))
    changed = tokens.copy()
    changed[0, 2] = (changed[0, 2] + 1) % model.config.vocab_size
    differs = (logits_of(model, params, tokens) != logits_of(model, params, changed)).any(-1)[0]
    assert differs.tolist() == [2 <= i < 6 for i in range(10)]


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_takes_a_key(family: str):
    model = families.build(family, dropout_rate=0.3)
    params = families.params_of(model)
    tokens = families.tokens_of(model, (1, 4))

    def drawn(seed: int) -> jax.Array:
        return model.apply(
            {"params": params},
            tokens,
            deterministic=False,
            rngs={"dropout": jax.random.key(seed)},
        )

    draw = jax.jit(drawn)
    assert (draw(0) == draw(0)).all()
    assert (draw(0) != draw(1)).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_near_and_logits_are_float32(family: str):
    exact, rounded = families.build(family), families.build(family, dtype="bfloat16")
    params = families.params_of(exact)
    tokens = families.tokens_of(exact, (2, 8))
    wanted, found = logits_of(exact, params, tokens), logits_of(rounded, params, tokens)
    assert found.dtype == np.float32
    assert np.abs(found - wanted).mean() < 0.05 * np.abs(wanted).mean()
    stored = families.build(family, dtype="bfloat16", param_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(decoder.abstract_params(stored))} == {
        jnp.dtype(jnp.bfloat16)
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_the_readout_can_be_taken_chunk_by_chunk(family: str):
    model = families.build(family)
    variables = {"params": families.params_of(model)}
    tokens = families.tokens_of(model, (2, 6))
    hidden = model.apply(variables, tokens, method="hidden")
    rows = [model.apply(variables, row, method="readout") for row in hidden.reshape(12, -1)]
    np.testing.assert_allclose(
        np.stack(rows).reshape(2, 6, -1), model.apply(variables, tokens), rtol=1e-5, atol=1e-5
    )


def test_a_token_outside_the_vocabulary_gives_nan():
    model = families.build("palm")
    tokens = families.tokens_of(model, (1, 3))
    tokens[0, 2] = model.config.vocab_size
    logits = logits_of(model, families.params_of(model), tokens)
    assert np.isnan(logits[0, 2]).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scan_layers", [True, False])
def test_every_axis_has_a_name(family: str, scan_layers: bool):
    model = families.build(family, scan_layers=scan_layers)
    names = decoder.logical_axes(model)
    shapes = decoder.abstract_params(model)
    known = {"embed", "vocab", "mlp", "heads", "kv_heads", "kv", "layers"}

    def check(leaf: jax.ShapeDtypeStruct, axes: jax.sharding.PartitionSpec) -> None:
        assert len(axes) == len(leaf.shape) and set(axes) <= known and None not in axes

    jax.tree.map(check, shapes, names)
    stacked = [axes for axes in jax.tree.leaves(names["layers"] if scan_layers else {})]
    assert all(axes[0] == "layers" for axes in stacked)
