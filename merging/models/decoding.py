"""Text from a model: greedy, sampled or by beams, batched, over a key/value cache, in one compiled loop.

Prompts of unequal lengths are filled up at the right; a row stops at its `eos_id`, and the loop when all rows have. Rows
don't depend on one another: a sampled row draws from its own key. Everything is a pure function of arrays that may be
called inside a jit with shardings; the cache carries the logical names `decoder.CACHE_AXES`.

Left out: prompts shared between rows or beams, and a cache in pages.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from merging.models.decoder import Cache, Decoder

_NEVER = -jnp.inf  # log-probability of what can't be


class Generated(NamedTuple):
    """What was generated.

    Attributes:
      tokens: [B, N] int32 ([B, W, N] by beams, the best first), without the prompt; 0 behind the end.
      lengths: [B] ([B, W]) int32, tokens up to and including `eos_id`, or N.
      scores: [B] ([B, W]) float32, the sum of the tokens' log-probabilities under the model as it is, whatever they were
        drawn from; by beams divided by the length penalty.
    """

    tokens: Int[Array, "*rows N"]
    lengths: Int[Array, "*rows"]
    scores: Float[Array, "*rows"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Greedy:
    """Takes the likeliest token; of equal ones the first."""

    def __call__(self, logits: Float[Array, "B V"], keys: PRNGKeyArray) -> Int[Array, " B"]:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Draws a token.

    Attributes:
      temperature: divides the logits; positive.
      top_k: draws from the k likeliest tokens (and what equals the k-th); None from all.
      top_p: then from the fewest likeliest tokens whose probabilities sum to at least p (arXiv 1904.09751); None from all.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature is {self.temperature}: it must be positive; Greedy() is its limit at 0"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}: it must be at least 1, or None")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it must be in (0, 1], or None")

    def __call__(self, logits: Float[Array, "B V"], keys: PRNGKeyArray) -> Int[Array, " B"]:
        drawn = jax.vmap(jax.random.categorical)(keys, self.limited(logits))
        return drawn.astype(jnp.int32)

    def limited(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """The logits that are drawn from, those of tokens that can't be drawn at -inf."""
        logits = logits / self.temperature
        if self.top_k is not None:
            kth = jax.lax.top_k(logits, min(self.top_k, logits.shape[-1]))[0][:, -1:]
            logits = jnp.where(logits < kth, -jnp.inf, logits)
        if self.top_p is not None:
            falling = jnp.sort(logits, axis=-1, descending=True)
            probabilities = jax.nn.softmax(falling, axis=-1)
            before = jnp.cumsum(probabilities, axis=-1) - probabilities
            least = jnp.where(before < self.top_p, falling, jnp.inf).min(-1, keepdims=True)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return logits


@functools.partial(
    jax.jit, static_argnames=("model", "max_new_tokens", "eos_id", "picker", "bidirectional")
)
def generate(
    model: Decoder,
    params: Any,
    prompts: Int[Array, "B T"],
    prompt_lengths: Int[Array, " B"],
    *,
    max_new_tokens: int,
    eos_id: int | None,
    picker: Greedy | Sampling = Greedy(),  # noqa: B008 (frozen)
    key: PRNGKeyArray | None = None,
    bidirectional: bool = False,
) -> Generated:
    """Continues each prompt by up to N = max_new_tokens tokens.

    Args:
      model, params: the module, and its parameters without boxes.
      prompts: int32, filled up at the right with any tokens.
      prompt_lengths: 1 to T each.
      max_new_tokens: N, at least 1.
      eos_id: the token that ends a row; None never does.
      picker: how a token is chosen from logits.
      key: for Sampling; row b draws from this key and b alone.
      bidirectional: the prompt's tokens see one another in both directions (prefix-LM).
    """
    B, N = prompts.shape[0], max_new_tokens
    if isinstance(picker, Sampling) and key is None:
        raise ValueError("Sampling draws from a key: give one, e.g. jax.random.key(0)")
    row_keys = jax.random.split(jax.random.key(0) if key is None else key, B)

    def pick(logits: Array, state: _Rows) -> _Rows:
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(row_keys, state.step)
        token = jnp.where(state.done, 0, picker(logits, keys))
        gained = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
        return _Rows(
            step=state.step + 1,
            tokens=state.tokens.at[:, state.step].set(token),
            lengths=state.lengths + (~state.done).astype(jnp.int32),
            scores=state.scores + jnp.where(state.done, 0, gained),
            done=state.done | _ends(token, eos_id),
        )

    def go_on(carry: tuple[_Rows, Cache]) -> Bool[Array, ""]:
        state, _ = carry
        return (state.step < N) & ~state.done.all()

    def step(carry: tuple[_Rows, Cache]) -> tuple[_Rows, Cache]:
        state, cache = carry
        logits, cache = _step(model, params, state.tokens[:, state.step - 1], cache)
        return pick(logits, state), cache

    logits, cache = _prefill(model, params, prompts, prompt_lengths, N, bidirectional)
    empty = _Rows(
        step=jnp.int32(0),
        tokens=jnp.zeros((B, N), jnp.int32),
        lengths=jnp.zeros(B, jnp.int32),
        scores=jnp.zeros(B, jnp.float32),
        done=jnp.zeros(B, bool),
    )
    state, _ = jax.lax.while_loop(go_on, step, (pick(logits, empty), cache))
    return Generated(state.tokens, state.lengths, state.scores)


@functools.partial(
    jax.jit,
    static_argnames=(
        "model",
        "max_new_tokens",
        "eos_id",
        "width",
        "length_exponent",
        "bidirectional",
    ),
)
def beam_search(
    model: Decoder,
    params: Any,
    prompts: Int[Array, "B T"],
    prompt_lengths: Int[Array, " B"],
    *,
    max_new_tokens: int,
    eos_id: int,
    width: int = 4,
    length_exponent: float = 0.6,
    bidirectional: bool = False,
) -> Generated:
    """The W = width best continuations that were found, [B, W, ...], the best first; arguments as in `generate`.

    A continuation's score is its log-probability over ((5 + length) / 6)^length_exponent (arXiv 1609.08144, eq. 14). At
    each step the 2 W best candidates are kept, so that W remain when W of them end. Rows in which nothing ended within N
    tokens give what they have; ended continuations go before those that were cut.
    """
    B, T = prompts.shape
    N, W = max_new_tokens, width

    def penalised(log_probs: Array, length: Array) -> Array:
        return log_probs / ((5 + length.astype(jnp.float32)) / 6) ** length_exponent

    def advance(logits: Array, beams: _Beams) -> tuple[_Beams, Array]:
        """The next beams, and which of the old ones each alive one continues, [B, W]."""
        V = logits.shape[-1]
        log_probs = beams.log_probs[:, :, None] + jax.nn.log_softmax(logits).reshape(B, W, V)
        best, flat = jax.lax.top_k(log_probs.reshape(B, W * V), 2 * W)  # [B, 2 W]
        parent, token = flat // V, (flat % V).astype(jnp.int32)
        tokens = _taken(beams.tokens, parent).at[:, :, beams.step].set(token)
        ended = _ends(token, eos_id)
        length = beams.step + 1

        scores = jnp.concatenate(
            [beams.ended_scores, jnp.where(ended, penalised(best, length), _NEVER)], axis=1
        )
        ended_scores, kept = jax.lax.top_k(scores, W)
        alive, chosen = jax.lax.top_k(jnp.where(ended, _NEVER, best), W)
        beams = _Beams(
            step=length,
            tokens=_taken(tokens, chosen),
            log_probs=alive,
            ended_tokens=_taken(jnp.concatenate([beams.ended_tokens, tokens], axis=1), kept),
            ended_lengths=_taken(
                jnp.concatenate([beams.ended_lengths, jnp.full((B, 2 * W), length)], axis=1), kept
            ),
            ended_scores=ended_scores,
        )
        return beams, _taken(parent, chosen)

    def go_on(carry: tuple[_Beams, Array, Cache]) -> Bool[Array, ""]:
        beams, _, _ = carry
        # Log-probabilities only fall, and the greatest length gives the mildest penalty.
        hope = penalised(beams.log_probs[:, 0], jnp.int32(N if length_exponent > 0 else 1))
        return (beams.step < N) & (hope > beams.ended_scores[:, -1]).any()

    def step(carry: tuple[_Beams, Array, Cache]) -> tuple[_Beams, Array, Cache]:
        beams, parents, cache = carry
        rows = (jnp.arange(B)[:, None] * W + parents).reshape(B * W)
        cache = Cache(
            entries=jax.tree.map(lambda x: x[:, rows], cache.entries), lengths=cache.lengths
        )
        logits, cache = _step(model, params, beams.tokens[:, :, beams.step - 1].reshape(-1), cache)
        return *advance(logits, beams), cache

    logits, cache = _prefill(model, params, prompts, prompt_lengths, N, bidirectional)
    logits, cache = jnp.repeat(logits, W, axis=0), _repeated(cache, W)
    empty = _Beams(
        step=jnp.int32(0),
        tokens=jnp.zeros((B, W, N), jnp.int32),
        log_probs=jnp.full((B, W), _NEVER).at[:, 0].set(0.0),  # all beams are one at first
        ended_tokens=jnp.zeros((B, W, N), jnp.int32),
        ended_lengths=jnp.zeros((B, W), jnp.int32),
        ended_scores=jnp.full((B, W), _NEVER),
    )
    beams, _, _ = jax.lax.while_loop(go_on, step, (*advance(logits, empty), cache))
    return _best(beams, penalised(beams.log_probs, beams.step))


class _Rows(NamedTuple):
    """Rows under way: `step` tokens were picked in each."""

    step: Int[Array, ""]
    tokens: Int[Array, "B N"]
    lengths: Int[Array, " B"]
    scores: Float[Array, " B"]
    done: Bool[Array, " B"]


class _Beams(NamedTuple):
    """Beams under way, the likeliest first, and those that ended, by their scores."""

    step: Int[Array, ""]
    tokens: Int[Array, "B W N"]
    log_probs: Float[Array, "B W"]
    ended_tokens: Int[Array, "B W N"]
    ended_lengths: Int[Array, "B W"]
    ended_scores: Float[Array, "B W"]


def _best(beams: _Beams, alive_scores: Float[Array, "B W"]) -> Generated:
    """The ended beams, then those that were cut."""
    B, W, _ = beams.tokens.shape
    rank = jnp.concatenate([beams.ended_scores > _NEVER, jnp.zeros((B, W), bool)], axis=1)
    scores = jnp.concatenate([beams.ended_scores, alive_scores], axis=1)
    order = jnp.lexsort((-scores, ~rank), axis=-1)[:, :W]
    lengths = jnp.concatenate([beams.ended_lengths, jnp.full((B, W), beams.step)], axis=1)
    tokens = jnp.concatenate([beams.ended_tokens, beams.tokens], axis=1)
    return Generated(_taken(tokens, order), _taken(lengths, order), _taken(scores, order))


def _prefill(
    model: Decoder,
    params: Any,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    more: int,
    bidirectional: bool,
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits behind each prompt, and a cache with room for `more` tokens."""
    hidden, cache = model.apply(
        {"params": params},
        prompts,
        lengths,
        prompts.shape[1] + more,
        bidirectional=bidirectional,
        method="prefill",
    )
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    return model.apply({"params": params}, last, method="readout")[:, 0], cache


def _step(
    model: Decoder, params: Any, tokens: Int[Array, " B"], cache: Cache
) -> tuple[Float[Array, "B V"], Cache]:
    hidden, cache = model.apply({"params": params}, tokens[:, None], cache, method="extend")
    return model.apply({"params": params}, hidden, method="readout")[:, 0], cache


def _repeated(cache: Cache, times: int) -> Cache:
    """Each row `times` times, one behind the other."""
    return Cache(
        entries=jax.tree.map(lambda x: jnp.repeat(x, times, axis=1), cache.entries),
        lengths=jnp.repeat(cache.lengths, times),
    )


def _ends(token: Int[Array, "*rows"], eos_id: int | None) -> Bool[Array, "*rows"]:
    return jnp.zeros(token.shape, bool) if eos_id is None else token == eos_id


def _taken(x: Array, index: Int[Array, "B n"]) -> Array:
    """x[b, index[b, i]], [B, n, ...]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)
