"""Rotary positions, who may see whom, and attention over grouped queries: the arithmetic that all families share.

Letters: B batch, T queries, S keys, K key/value heads, G query heads that share one of them, h head width.
Probabilities are float32 whatever the activations' dtype. Keys may come in several blocks (what a cache holds, and the new
ones), so that a decoding step never copies the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class View(NamedTuple):
    """How a layer's queries are turned and what they see: computed once for all layers of one kind.

    Attributes:
      cos, sin: [B or 1, T, h / 2] float32, of the tokens' positions.
      mask: [B or 1, T, T], true where a query sees a key of its own row.
      past_mask: [B, T, S], true where it sees a key of the cache; None without one.
    """

    cos: Float[Array, "b T half"]
    sin: Float[Array, "b T half"]
    mask: Bool[Array, "b T T"]
    past_mask: Bool[Array, "B T S"] | None = None


class KeysValues(NamedTuple):
    """Rotated keys and values, [B, S, K, h] each (with all layers in one array, [L, B, S, K, h])."""

    keys: Float[Array, "*L B S K h"]
    values: Float[Array, "*L B S K h"]


def rotary(
    positions: Int[Array, "b T"], head_dim: int, base: float
) -> tuple[Float[Array, "b T half"], Float[Array, "b T half"]]:
    """Cosine and sine of position * base^(-2 i / h), float32 (arXiv 2104.09864)."""
    wavelengths = base ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[..., None] / wavelengths
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T n h"], view: View) -> Float[Array, "B T n h"]:
    """Turns the pairs (x_i, x_{i + h/2}) by their angles: halves, as llama and gemma store them, not neighbours."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = view.cos[:, :, None], view.sin[:, :, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def row_mask(
    length: int,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    shared_mask: Bool[Array, "B T"] | None = None,
    prefix_mask: Bool[Array, "B T"] | None = None,
    positions: Int[Array, "b T"] | None = None,
    window: int | None = None,
) -> Bool[Array, "b T T"]:
    """Who sees whom within a row: what stands before, and, inside the prefix, what stands behind.

    Args:
      length: T.
      segment_ids: packed sequences have different numbers and don't see one another; 0 is padding.
      shared_mask: true for tokens that every segment behind them sees: a prompt with several continuations.
      prefix_mask: true for the tokens that see one another in both directions (prefix-LM).
      positions: of each token in its sequence, which a window counts by; None counts along the row.
      window: a query sees itself and the window - 1 tokens before it.
    """
    query, key = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    mask = (key <= query)[None]
    if prefix_mask is not None:
        mask |= prefix_mask[:, :, None] & prefix_mask[:, None, :]
    if window is not None:
        places = jnp.arange(length)[None] if positions is None else positions
        mask &= jnp.abs(places[:, :, None] - places[:, None, :]) < window
    if segment_ids is not None:
        is_seen = segment_ids[:, :, None] == segment_ids[:, None, :]
        if shared_mask is not None:
            is_seen |= shared_mask[:, None, :]
        mask &= is_seen
    return mask


def past_mask(
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    cache_length: int,
    *,
    window: int | None = None,
) -> Bool[Array, "B T S"]:
    """Which slots of the cache a query sees: the filled ones, no further back than the window. Slot i is position i."""
    slot = jnp.arange(cache_length)
    mask = jnp.broadcast_to(slot < lengths[:, None, None], (*positions.shape, cache_length))
    if window is not None:
        mask &= positions[:, :, None] - slot < window
    return mask


def self_attention(
    query: Float[Array, "B T N h"],
    key: Float[Array, "B T K h"],
    value: Float[Array, "B T K h"],
    *,
    view: View,
    past: KeysValues | None,
    scale: float,
) -> tuple[Float[Array, "B T N h"], KeysValues]:
    """What the queries gather from their own row and, where given, from the cache; and what the cache shall hold of it."""
    axes = ("batch", "length", "heads", "kv")
    query = rotate(nn.with_logical_constraint(query, axes), view)
    new = KeysValues(rotate(key, view), value)
    blocks = [(new, view.mask)]
    if past is not None:
        blocks.insert(0, (past, view.past_mask))
    return nn.with_logical_constraint(attend(query, blocks, scale=scale), axes), new


def attend(
    query: Float[Array, "B T N h"],
    blocks: Sequence[tuple[KeysValues, Bool[Array, "b T S"]]],
    *,
    scale: float,
) -> Float[Array, "B T N h"]:
    """softmax(scale * query . keys) . values over the keys of all blocks, each with the mask of who sees it."""
    B, T, N, h = query.shape
    K = blocks[0][0].keys.shape[2]
    query = (query * jnp.asarray(scale, query.dtype)).reshape(B, T, K, N // K, h)
    logits = [
        jnp.where(
            mask[:, :, None, None],
            jnp.einsum("BTKGh,BSKh->BTKGS", query, keys, preferred_element_type=jnp.float32),
            jnp.finfo(jnp.float32).min,
        )
        for (keys, _), mask in blocks
    ]
    probabilities = jax.nn.softmax(jnp.concatenate(logits, axis=-1), axis=-1).astype(query.dtype)
    ends = [block.keys.shape[1] for block, _ in blocks][:-1]
    mixed = [
        jnp.einsum("BTKGS,BSKh->BTKGh", part, values)
        for part, ((_, values), _) in zip(
            jnp.split(probabilities, _cumulative(ends), axis=-1), blocks, strict=True
        )
    ]
    return sum(mixed[1:], mixed[0]).reshape(B, T, N, h)


def _cumulative(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[: i + 1]) for i in range(len(sizes))]
