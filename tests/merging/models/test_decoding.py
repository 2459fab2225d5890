"""Decoding over the cache gives what the full forward gives, row by row, however it is batched, cut or sharded."""

from __future__ import annotations

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from merging.models.decoder import Decoder, logical_axes
from merging.models.decoding import Generated, Greedy, Sampling, beam_search, generate
from tests.merging.models import families

pytestmark = pytest.mark.slow  # programs for several meshes take minutes to compile

FAMILIES = list(families.CONFIGS)
LENGTHS = np.array([5, 9, 1], np.int32)
LONGEST = 9


@functools.cache
def small(family: str, scan_layers: bool = True, vocab_size: int = 40) -> tuple[Decoder, dict]:
    model = families.build(family, vocab_size=vocab_size)
    params = families.params_of(model)
    if scan_layers:
        return model, params
    return families.build(family, vocab_size=vocab_size, scan_layers=False), families.unstacked(
        params
    )


@functools.cache
def forward(model: Decoder):  # noqa: ANN201
    return jax.jit(lambda params, tokens, **given: model.apply({"params": params}, tokens, **given))


def greedy_by_full_forward(
    model: Decoder, params: dict, prompt: np.ndarray, count: int, *, bidirectional: bool = False
) -> list[int]:
    """Greedy tokens without a cache: the whole row anew for every token; what stands behind a token doesn't matter."""
    row = np.zeros((1, LONGEST + count), np.int32)
    row[0, : len(prompt)] = prompt
    prefix_mask = (np.arange(row.shape[1]) < len(prompt))[None] & bidirectional
    for end in range(len(prompt), len(prompt) + count):
        row[0, end] = forward(model)(params, row, prefix_mask=prefix_mask)[0, end - 1].argmax()
    return row[0, len(prompt) : len(prompt) + count].tolist()


# ---- the cache ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scan_layers", [True, False])
def test_greedy_tokens_are_those_of_the_full_forward(family: str, scan_layers: bool):
    model, params = small(family, scan_layers)
    prompts = families.tokens_of(model, (3, 9))
    found = generate(model, params, prompts, LENGTHS, max_new_tokens=12, eos_id=None)
    for row, length, tokens in zip(prompts, LENGTHS, found.tokens.tolist(), strict=True):
        assert tokens == greedy_by_full_forward(model, params, row[:length], 12)
    assert len({tuple(tokens) for tokens in found.tokens.tolist()}) == 3
    assert found.lengths.tolist() == [12] * 3


def test_a_prefix_that_sees_itself_whole_is_continued_causally():
    model, params = small("palm")
    prompts = families.tokens_of(model, (3, 9))
    found = generate(
        model, params, prompts, LENGTHS, max_new_tokens=8, eos_id=None, bidirectional=True
    )
    causal = generate(model, params, prompts, LENGTHS, max_new_tokens=8, eos_id=None)
    assert found.tokens.tolist() != causal.tokens.tolist()
    for row, length, tokens in zip(prompts, LENGTHS, found.tokens.tolist(), strict=True):
        assert tokens == greedy_by_full_forward(model, params, row[:length], 8, bidirectional=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_several_tokens_at_once_extend_the_cache_as_one_by_one(family: str):
    model, params = small(family)
    tokens = families.tokens_of(model, (3, 16))
    whole = forward(model)(params, tokens)
    apply = jax.jit(functools.partial(model.apply, {"params": params}), static_argnames="method")
    lengths = jnp.array([4, 6, 2])
    _, cache = model.apply({"params": params}, tokens[:, :6], lengths, 16, method="prefill")
    for count in (3, 1, 5):
        more = jnp.stack([tokens[b, n : n + count] for b, n in enumerate(cache.lengths)])
        hidden, cache = apply(more, cache, method="extend")
        logits = apply(hidden, method="readout")
        for b, end in enumerate(cache.lengths):
            np.testing.assert_allclose(logits[b], whole[b, end - count : end], rtol=1e-4, atol=1e-4)
    assert cache.lengths.tolist() == [13, 15, 11]


def test_a_cache_too_small_for_the_prompt_is_told():
    model, params = small("palm")
    with pytest.raises(ValueError, match="a cache of 4 slots doesn't hold prompts of 5 tokens"):
        model.apply(
            {"params": params}, jnp.zeros((1, 5), jnp.int32), jnp.array([5]), 4, method="prefill"
        )


# ---- ends and rows -----------------------------------------------------------------------------------------------


def test_a_row_stops_at_its_end_and_the_others_go_on():
    model, params = small("palm")
    prompts = families.tokens_of(model, (3, 9))
    free = generate(model, params, prompts, LENGTHS, max_new_tokens=12, eos_id=None)
    eos_id = int(free.tokens[0, 3])
    found = generate(model, params, prompts, LENGTHS, max_new_tokens=12, eos_id=eos_id)
    for full, tokens, length in zip(
        free.tokens.tolist(), found.tokens.tolist(), found.lengths.tolist(), strict=True
    ):
        end = full.index(eos_id) + 1 if eos_id in full else 12
        assert length == end
        assert tokens == full[:end] + [0] * (12 - end)
    assert found.lengths.min() < found.lengths.max() < 12


def test_scores_are_log_probabilities_of_the_model():
    model, params = small("llama")
    prompts = families.tokens_of(model, (3, 9))
    found = generate(
        model,
        params,
        prompts,
        LENGTHS,
        max_new_tokens=6,
        eos_id=int(families.tokens_of(model, (1,))[0]),
        picker=Sampling(temperature=2.0, top_k=7),
        key=jax.random.key(3),
    )
    for row, start, tokens, length, score in zip(
        prompts, LENGTHS, found.tokens, found.lengths, found.scores, strict=True
    ):
        (wanted,) = log_probabilities(model, params, row[:start], [tokens[:length].tolist()])
        assert score == pytest.approx(wanted, rel=1e-4)


def log_probabilities(
    model: Decoder, params: dict, prompt: np.ndarray, continuations: list[list[int]]
) -> np.ndarray:
    """Of each continuation of a prompt, by one full forward."""
    rows = np.zeros((len(continuations), len(prompt) + max(map(len, continuations))), np.int32)
    rows[:, : len(prompt)] = prompt
    for row, tokens in zip(rows, continuations, strict=True):
        row[len(prompt) : len(prompt) + len(tokens)] = tokens
    logits = np.asarray(jax.nn.log_softmax(forward(model)(params, rows)))
    return np.array(
        [
            sum(logits[i, len(prompt) + n - 1, token] for n, token in enumerate(tokens))
            for i, tokens in enumerate(continuations)
        ]
    )


# ---- sampling ----------------------------------------------------------------------------------------------------


def test_a_row_draws_for_itself():
    """Its tokens don't depend on when the others end."""
    model, params = small("palm")
    prompts = families.tokens_of(model, (3, 9))
    draw = functools.partial(
        generate,
        model,
        params,
        prompts,
        LENGTHS,
        max_new_tokens=10,
        picker=Sampling(temperature=1.5),
        key=jax.random.key(0),
    )
    free = draw(eos_id=None)
    ended = draw(eos_id=int(free.tokens[0, 2]))
    for full, tokens, length in zip(free.tokens, ended.tokens, ended.lengths, strict=True):
        assert (full[:length] == tokens[:length]).all()
    assert (draw(eos_id=None).tokens == free.tokens).all()


LOGITS = np.log(np.array([[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]], np.float32))


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(), [[0, 1, 2, 3], [0, 1, 2, 3]]),
        (Sampling(top_k=2), [[0, 1], [2, 3]]),
        (Sampling(top_k=9), [[0, 1, 2, 3], [0, 1, 2, 3]]),
        (Sampling(top_p=0.45), [[0], [2, 3]]),
        (Sampling(top_p=0.7), [[0, 1], [2, 3]]),
        (Sampling(top_p=1.0), [[0, 1, 2, 3], [0, 1, 2, 3]]),
        (Sampling(top_k=3, top_p=0.8), [[0, 1], [1, 2, 3]]),
        (Sampling(temperature=0.1, top_p=0.9), [[0], [3]]),
    ],
)
def test_only_the_likeliest_are_drawn_from(sampling: Sampling, kept: list[list[int]]):
    limited = np.asarray(sampling.limited(jnp.asarray(LOGITS)))
    assert [np.flatnonzero(np.isfinite(row)).tolist() for row in limited] == kept
    tempered = LOGITS / np.float32(sampling.temperature)
    assert (limited[np.isfinite(limited)] == tempered[np.isfinite(limited)]).all()


def test_draws_have_the_tempered_probabilities():
    draws = 20_000
    keys = jax.random.split(jax.random.key(0), draws)
    logits = jnp.broadcast_to(LOGITS[0], (draws, 4))
    counts = np.bincount(Sampling(temperature=2.0)(logits, keys), minlength=4)
    wanted = np.sqrt(np.exp(LOGITS[0])) / np.sqrt(np.exp(LOGITS[0])).sum()
    deviation = np.sqrt(draws * wanted * (1 - wanted))
    assert (np.abs(counts - draws * wanted) < 5 * deviation).all()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"temperature": 0.0}, "temperature is 0.0: it must be positive"),
        ({"top_k": 0}, "top_k is 0: it must be at least 1"),
        ({"top_p": 1.5}, r"top_p is 1.5: it must be in \(0, 1\]"),
    ],
)
def test_mistakes_are_told(fields: dict, told: str):
    with pytest.raises(ValueError, match=told):
        Sampling(**fields)


def test_sampling_without_a_key_is_told():
    model, params = small("palm")
    with pytest.raises(ValueError, match="Sampling draws from a key"):
        generate(
            model,
            params,
            families.tokens_of(model, (3, 9)),
            LENGTHS,
            max_new_tokens=2,
            eos_id=None,
            picker=Sampling(),
        )


def test_of_equal_tokens_greedy_takes_the_first():
    keys = jax.random.split(jax.random.key(0), 2)
    assert Greedy()(jnp.array([[0.0, 2, 2, 1], [3, 3, 3, 3]]), keys).tolist() == [1, 0]


# ---- beams -------------------------------------------------------------------------------------------------------


def test_one_beam_is_greedy():
    model, params = small("llama")
    prompts = families.tokens_of(model, (3, 9))
    greedy = generate(model, params, prompts, LENGTHS, max_new_tokens=8, eos_id=39)
    beam = beam_search(
        model, params, prompts, LENGTHS, max_new_tokens=8, eos_id=39, width=1, length_exponent=0.0
    )
    assert 39 not in np.asarray(greedy.tokens)
    assert (beam.tokens[:, 0] == greedy.tokens).all()
    np.testing.assert_allclose(beam.scores[:, 0], greedy.scores, rtol=1e-5)


@pytest.mark.parametrize("length_exponent", [0.0, 0.6, 2.0])
def test_beams_wide_enough_find_the_best_of_all(length_exponent: float):
    """Against every continuation of up to 3 tokens of 5."""
    V, N, eos_id, width = 5, 3, 2, 64
    model, params = small("palm", vocab_size=V)
    prompts = families.tokens_of(model, (2, 4))
    found = beam_search(
        model,
        params,
        prompts,
        np.array([4, 2], np.int32),
        max_new_tokens=N,
        eos_id=eos_id,
        width=width,
        length_exponent=length_exponent,
    )
    for row, length, tokens, lengths, scores in zip(prompts, [4, 2], *found, strict=True):
        wanted = ranked(model, params, row[:length], N, eos_id, length_exponent)
        kept = len(wanted)
        assert np.isfinite(scores[:kept]).all() and kept < width
        for (score, ids), got, n, mine in zip(wanted, tokens, lengths, scores, strict=False):
            assert got[:n].tolist() == ids
            assert mine == pytest.approx(score, rel=1e-4)


def ranked(
    model: Decoder, params: dict, prompt: np.ndarray, N: int, eos_id: int, exponent: float
) -> list[tuple[float, list[int]]]:
    """(score, tokens) of all continuations that end within N tokens, the best first."""
    others = [token for token in range(model.config.vocab_size) if token != eos_id]
    ended = [[*start, eos_id] for n in range(N) for start in itertools.product(others, repeat=n)]
    scores = log_probabilities(model, params, prompt, ended)
    scores /= ((5 + np.array([len(ids) for ids in ended])) / 6) ** exponent
    return sorted(zip(scores.tolist(), ended, strict=True), reverse=True)


def test_where_nothing_ends_beams_give_what_they_have():
    model, params = small("palm")
    prompts = families.tokens_of(model, (3, 9))
    found = beam_search(model, params, prompts, LENGTHS, max_new_tokens=4, eos_id=1_000, width=3)
    assert found.tokens.shape == (3, 3, 4) and (found.lengths == 4).all()
    assert (np.diff(found.scores, axis=1) <= 0).all()
    greedy = generate(model, params, prompts, LENGTHS, max_new_tokens=4, eos_id=None)
    penalty = (9 / 6) ** 0.6
    assert (found.scores[:, 0] >= greedy.scores / penalty - 1e-5).all()


# ---- sharded -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
@pytest.mark.parametrize("decode", [generate, beam_search])
def test_sharded_rows_and_heads_give_the_same_tokens(shape: tuple[int, int], decode):  # noqa: ANN001
    """On 8 devices: rows over one axis, heads, hidden layers and vocabulary over the other."""
    model, params = small("palm")
    prompts = families.tokens_of(model, (8, 6))
    lengths = np.arange(1, 9, dtype=np.int32).clip(max=6)
    run = functools.partial(decode, model, max_new_tokens=5, eos_id=7)
    wanted: Generated = run(params, prompts, lengths)

    devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
    rules = (("batch", "data"), *((name, "model") for name in ("heads", "mlp", "vocab")))
    mesh = jax.sharding.Mesh(devices, ("data", "model"))
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        shardings = nn.logical_to_mesh_sharding(logical_axes(model), mesh, rules)
        by_row = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        found: Generated = run(
            jax.device_put(params, shardings),
            jax.device_put(prompts, by_row),
            jax.device_put(lengths, by_row),
        )
    assert (np.asarray(found.tokens) == np.asarray(wanted.tokens)).all()
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-4)
