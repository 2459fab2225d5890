"""Our decoders as the module of T5X's `models.DecoderOnlyModel`: the same layers and parameters, called T5X's way.

The parameters under T5X are the model's own, leaf by leaf, under `target`: a checkpoint goes from one to the other by its
format alone, and scanned to unscanned by the layouts `stacked` and `unstacked`.

Decoding takes three calls, as T5X's decoders have them: a first makes an empty cache; a second, with `prefill`, fills it
with all of a prompt but its last token; each further one reads a token a row and adds it.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.partitioning import AxisMetadata
from jaxtyping import Array, Float, Int

from merging import partitioning
from merging.models.attention import KeysValues
from merging.models.config import DecoderConfig
from merging.models.decoder import Cache
from merging.models.families import model_of

KEYS, VALUES, INDEX = "cached_key", "cached_value", "cache_index"


class DecoderForT5X(nn.Module):
    """A decoder of any family; the collection `params` is that of `model_of(config)`.

    The collection `params_axes` holds the axes' names of each parameter, and `cache`, all layers in one array:

      cached_key, cached_value  [B, L, K, h, S], the batch first and the length last
      cache_index               [] before a prompt is read, [B] behind it: filled slots, at which the next token goes

    T5X copies and picks rows of a cache along its first axis, or along the second where a module says `scan_layers`: this one
    never does, since rows come first, scanned or not.
    """

    config: DecoderConfig

    def setup(self) -> None:
        self.decoder = model_of(self.config)
        nn.share_scope(self, self.decoder)  # no name of its own in the paths of parameters

    @nn.nowrap
    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The variables, parameters without boxes, and beside them the names of their axes as T5X reads them."""
        variables = dict(super().init(rngs, *args, **kwargs))
        boxed = variables["params"]
        variables["params"] = nn.unbox(boxed)
        variables["params_axes"] = _axes(boxed)
        return variables

    def __call__(
        self,
        decoder_input_tokens: Int[Array, "B T"],
        decoder_target_tokens: Int[Array, "B T"],
        decoder_segment_ids: Int[Array, "B T"] | None = None,
        decoder_positions: Int[Array, "B T"] | None = None,
        decoder_causal_attention: Int[Array, "B T"] | None = None,
        *,
        enable_dropout: bool = True,
        decode: bool = False,
        max_decode_length: int | None = None,
        prefill: bool = False,
        prefill_lengths: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B T V"]:
        """float32 logits of the token that follows each token; arguments as T5X gives them.

        Args:
          decoder_input_tokens: what is read, from the start token 0 on; any number type.
          decoder_target_tokens: not read: padding stands behind everything that could see it.
          decoder_segment_ids, decoder_positions: of packed rows.
          decoder_causal_attention: positive where tokens see one another in both directions (prefix-LM); None is causal.
          enable_dropout: takes the rng `dropout`, where the configuration has a rate.
          decode: one more token a row, from and to the cache; without a cache, makes one of as many slots as there are tokens.
          max_decode_length: not read: the cache has its length.
          prefill: reads prompts into the cache.
          prefill_lengths: of the prompts, without the start token.
        """
        tokens = decoder_input_tokens.astype(jnp.int32)
        if prefill:
            is_prefix_lm = decoder_causal_attention is not None
            return self._prefill(tokens, prefill_lengths, bidirectional=is_prefix_lm)
        if decode and self.has_variable("cache", KEYS):
            return self._extend(tokens)
        if decode:
            self._make_cache(*tokens.shape)
        return self.decoder(
            tokens,
            segment_ids=decoder_segment_ids,
            positions=decoder_positions,
            prefix_mask=None if decoder_causal_attention is None else decoder_causal_attention > 0,
            deterministic=not enable_dropout,
        )

    def _make_cache(self, rows: int, length: int) -> None:
        config = self.config
        shape = (rows, config.num_layers, config.num_kv_heads, config.head_dim, length)
        for name in (KEYS, VALUES):
            self.put_variable("cache", name, jnp.zeros(shape, config.activation_dtype))
        self.put_variable("cache", INDEX, jnp.int32(0))

    def _prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], *, bidirectional: bool
    ) -> Float[Array, "B T V"]:
        # The start token is not among the lengths. The last token is read once more by the first step of decoding, into
        # the same slot: T5X takes the first logits from there.
        hidden, cache = self.decoder.prefill(
            tokens, lengths + 1, tokens.shape[1], bidirectional=bidirectional
        )
        self._put(cache.entries, lengths)
        return self.decoder.readout(hidden)

    def _extend(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        index = self.get_variable("cache", INDEX)
        entries = KeysValues(
            *(_layers_first(self.get_variable("cache", name)) for name in (KEYS, VALUES))
        )
        lengths = jnp.broadcast_to(index, tokens.shape[:1])
        hidden, cache = self.decoder.extend(tokens, Cache(entries=entries, lengths=lengths))
        self._put(cache.entries, index + tokens.shape[1])
        return self.decoder.readout(hidden)

    def _put(self, entries: KeysValues, index: Int[Array, "*B"]) -> None:
        self.put_variable("cache", KEYS, _rows_first(entries.keys))
        self.put_variable("cache", VALUES, _rows_first(entries.values))
        self.put_variable("cache", INDEX, index.astype(jnp.int32))


def _rows_first(entries: Float[Array, "L B S K h"]) -> Float[Array, "B L K h S"]:
    return jnp.transpose(entries, (1, 0, 3, 4, 2))


def _layers_first(entries: Float[Array, "B L K h S"]) -> Float[Array, "L B S K h"]:
    return jnp.transpose(entries, (1, 0, 4, 2, 3))


def _axes(boxed: Any) -> dict[str, Any]:
    """`<name>_axes` with the names of the axes for each boxed parameter `<name>`."""
    return {
        **{k: _axes(v) for k, v in boxed.items() if not partitioning.is_box(v)},
        **{
            f"{k}_axes": AxisMetadata(names=jax.sharding.PartitionSpec(*v.names))
            for k, v in boxed.items()
            if partitioning.is_box(v)
        },
    }
