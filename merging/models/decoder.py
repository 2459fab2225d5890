"""What all decoders share: tokens are embedded, go through blocks, are normed and read out.

A family (`palm.py`, `gated.py`) gives a block class, its norms and its readout; this file runs the blocks, scanned or one
by one, over whole rows, and over a key/value cache: `prefill` fills one, `extend` adds to it. Parameters carry logical
axis names, T5X's: embed, vocab, mlp, heads, kv, layers, and kv_heads where several heads share keys. Activations are
constrained by batch, length, embed, heads, kv, mlp, vocab under `flax.linen.logical_axis_rules`.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from merging.models.attention import KeysValues, View, past_mask, rotary, row_mask
from merging.models.config import DecoderConfig

CACHE_AXES = ("layers", "batch", "length", "kv_heads", "kv")


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens so far; slot i of a row holds its token i.

    Attributes:
      entries: [L, B, S, K, h] each, in the activations' dtype, L = number of layers whether scanned or not.
      lengths: [B] int32, filled slots of each row.
    """

    entries: KeysValues
    lengths: Int[Array, " B"]


class Decoder(nn.Module):
    """A decoder-only transformer; `Palm`, `Llama` and `Gemma3` are its families.

    With `variables = model.init(key, tokens)`, whose parameters are boxed with the names of their axes (`logical_axes`
    tells them, `flax.linen.unbox` takes the arrays out):

      logits = model.apply(variables, tokens)
      hidden = model.apply(variables, tokens, method="hidden"); logits = model.apply(variables, hidden, method="readout")
      hidden, cache = model.apply(variables, tokens, lengths, 1024, method="prefill")
      hidden, cache = model.apply(variables, next_tokens, cache, method="extend")
    """

    config: DecoderConfig

    def setup(self) -> None:
        count = self.config.num_layers
        self.token_embedder = self.make_embedder()
        self.layers = (
            self.make_block()
            if self.config.scan_layers
            else [self.make_block() for _ in range(count)]
        )
        self.final_norm = self.make_norm()
        self.dropout = nn.Dropout(self.config.dropout_rate)

    # ---- what a family gives -------------------------------------------------------------------------------------

    def make_embedder(self) -> nn.Module:
        """A module with `encode` (tokens -> activations) and `decode` (hidden states -> float32 logits)."""
        raise NotImplementedError

    def make_block(self) -> nn.Module:
        """A module of (x, view, past, deterministic) -> (x, KeysValues of x's tokens)."""
        raise NotImplementedError

    def make_norm(self) -> nn.Module:
        """The norm behind the last block."""
        raise NotImplementedError

    def kinds(self) -> list[tuple[float, int | None]]:
        """(rope base, window) of each kind of layer."""
        return [(self.config.rope_base, None)]

    def layer_kinds(self) -> list[int]:
        """The kind of each layer, an index into `kinds`."""
        return [0] * self.config.num_layers

    # ---- what a user calls ---------------------------------------------------------------------------------------

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        prefix_mask: Bool[Array, "B T"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B T V"]:
        """float32 logits of the token that follows each token.

        Args:
          tokens: int32; a token outside the vocabulary makes its row NaN.
          segment_ids: packed sequences have different numbers and don't see one another; 0 is padding.
          positions: of each token within its sequence; None counts along the row.
          prefix_mask: true for inputs, which see one another in both directions (prefix-LM); None is causal.
          deterministic: false turns dropout on, which takes the rng `dropout`.
        """
        hidden = self.hidden(
            tokens,
            segment_ids=segment_ids,
            positions=positions,
            prefix_mask=prefix_mask,
            deterministic=deterministic,
        )
        return self.readout(hidden)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        shared_mask: Bool[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        prefix_mask: Bool[Array, "B T"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B T d"]:
        """The normed states that `readout` reads; the arguments are those of `__call__`, and `shared_mask` as in `row_mask`."""
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None]
        views = [
            View(
                *rotary(positions, self.config.head_dim, base),
                row_mask(
                    tokens.shape[1],
                    segment_ids=segment_ids,
                    shared_mask=shared_mask,
                    prefix_mask=prefix_mask,
                    positions=positions,
                    window=window,
                ),
            )
            for base, window in self.kinds()
        ]
        hidden, _ = self._run(tokens, views, deterministic=deterministic)
        return hidden

    def readout(self, hidden: Float[Array, "*rows d"]) -> Float[Array, "*rows V"]:
        """float32 logits of hidden states of any leading shape: a chunk of a batch at a time, where V is large."""
        return self.token_embedder.decode(hidden)

    def readout_table(self) -> tuple[Float[Array, "V d"], float]:
        """(table, scale) of `readout`, whose logits are scale * hidden . table^T: for who takes the rows in chunks."""
        return self.token_embedder.table()

    def prefill(
        self,
        tokens: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        cache_length: int,
        *,
        bidirectional: bool = False,
    ) -> tuple[Float[Array, "B T d"], Cache]:
        """Hidden states of prompts, and the cache that holds them.

        Args:
          tokens: prompts, filled up at the right with any tokens.
          lengths: of each prompt, 1 to T.
          cache_length: slots of the cache, at least T.
          bidirectional: the prompt's tokens see one another in both directions (prefix-LM).

        Returns:
          Hidden states, of which those of row b are meant up to lengths[b], and the cache.
        """
        T = tokens.shape[1]
        if cache_length < T:
            raise ValueError(f"a cache of {cache_length} slots doesn't hold prompts of {T} tokens")
        inside = jnp.arange(T) < lengths[:, None]
        views = [
            View(
                *rotary(jnp.arange(T)[None], self.config.head_dim, base),
                row_mask(T, prefix_mask=inside if bidirectional else None, window=window),
            )
            for base, window in self.kinds()
        ]
        hidden, new = self._run(tokens, views, keep=True)
        room = [(0, 0), (0, 0), (0, cache_length - T), (0, 0), (0, 0)]
        entries = jax.tree.map(lambda x: _constrained(jnp.pad(x, room), CACHE_AXES), new)
        return hidden, Cache(entries=entries, lengths=lengths.astype(jnp.int32))

    def extend(
        self, tokens: Int[Array, "B T"], cache: Cache
    ) -> tuple[Float[Array, "B T d"], Cache]:
        """Hidden states of T more tokens a row, causal, and the cache that holds them too (T = 1 is a decoding step).

        Each row is continued where it ends. It must have T free slots: what is full is overwritten at its end.
        """
        T = tokens.shape[1]
        cache_length = cache.entries.keys.shape[2]
        positions = cache.lengths[:, None] + jnp.arange(T)
        views = [
            View(
                *rotary(positions, self.config.head_dim, base),
                row_mask(T, window=window),
                past_mask(positions, cache.lengths, cache_length, window=window),
            )
            for base, window in self.kinds()
        ]
        hidden, new = self._run(tokens, views, past=cache.entries, keep=True)
        entries = jax.tree.map(
            lambda old, x: _constrained(_written(old, x, cache.lengths), CACHE_AXES),
            cache.entries,
            new,
        )
        return hidden, Cache(entries=entries, lengths=cache.lengths + T)

    # ---- how it runs ---------------------------------------------------------------------------------------------

    def _run(
        self,
        tokens: Int[Array, "B T"],
        views: list[View],
        *,
        past: KeysValues | None = None,
        keep: bool = False,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T d"], KeysValues | None]:
        """Normed states, and the keys and values of all layers where asked for."""

        def layer(block: nn.Module, x: Array, inputs: tuple[Any, Any]) -> tuple[Array, Any]:
            view, past = inputs
            x, new = block(x, view, past, deterministic)
            return x, new if keep else None

        def scanned(block: nn.Module, x: Array, inputs: tuple[Any, Any]) -> tuple[Array, Any]:
            kind, past = inputs
            view = views[0]
            if len(views) > 1:
                view = jax.tree.map(lambda *each: jax.lax.select_n(kind, *each), *views)
            return layer(block, x, (view, past))

        x = self.dropout(self.token_embedder.encode(tokens), deterministic=deterministic)
        x = _constrained(x, ("batch", "length", "embed"))
        if self.config.scan_layers:
            scan = nn.scan(
                self._rematerialised(scanned),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=self.config.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            kinds = jnp.array(self.layer_kinds(), jnp.int32)
            x, new = scan(self.layers, x, (kinds, past))
        else:
            layer = self._rematerialised(layer)
            each = []
            for i, (block, kind) in enumerate(zip(self.layers, self.layer_kinds(), strict=True)):
                mine = None if past is None else jax.tree.map(lambda x, i=i: x[i], past)
                x, new = layer(block, x, (views[kind], mine))
                each.append(new)
            new = jax.tree.map(lambda *layers: jnp.stack(layers), *each) if keep else None
        return self.final_norm(x), new

    def _rematerialised(self, layer: Any) -> Any:
        if self.config.remat == "none":
            return layer
        policy = {
            "full": jax.checkpoint_policies.nothing_saveable,
            "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        }[self.config.remat]
        # Inside a scan nothing could be merged with its first computation anyway.
        return nn.remat(layer, policy=policy, prevent_cse=not self.config.scan_layers)


def logical_axes(model: Decoder) -> Any:
    """The tree of parameters, with a PartitionSpec of logical axis names in place of each array; nothing is allocated."""
    return nn.get_partition_spec(boxed_params(model))


def abstract_params(model: Decoder) -> Any:
    """The tree of parameters, with a ShapeDtypeStruct in place of each array; nothing is allocated."""
    return nn.unbox(boxed_params(model))


@functools.lru_cache(maxsize=32)  # tracing a model takes as long as reading a small one
def boxed_params(model: Decoder) -> Any:
    """The same, boxed with the names of their axes: what `partitioning.shardings` reads. Not to be changed."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def _written(
    old: Float[Array, "L B S K h"], new: Float[Array, "L B T K h"], lengths: Int[Array, " B"]
) -> Float[Array, "L B S K h"]:
    """`new` in the slots that follow each row's length."""

    def of_a_row(old: Array, new: Array, start: Array) -> Array:  # [L, S, K, h], [L, T, K, h]
        return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1)

    return jax.vmap(of_a_row, in_axes=(1, 1, 0), out_axes=1)(old, new, lengths)


def _constrained(x: Array, axes: tuple[str, ...]) -> Array:
    return nn.with_logical_constraint(x, axes)
