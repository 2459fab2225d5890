"""The scoring step: what rank classification and losses need of a model."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from merging.evaluation.rows import PROMPT
from merging.models.decoder import Decoder
from merging.training.loss import token_scores


@flax.struct.dataclass
class Choices:
    """Rows of prompts with their choices, see `evaluation.rows`.

    Attributes:
      tokens, segment_ids, positions: [B, T] int32.
      reads: [B, N] int32, where in its row each target's distribution is read; any where nobody asks.
      targets: [B, N] int32.
    """

    tokens: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    reads: Int[Array, "B N"]
    targets: Int[Array, "B N"]


def score(
    model: Decoder,
    params: Any,
    rows: Choices,
    *,
    bidirectional: bool = False,
    vocabulary_chunks: int = 1,
) -> tuple[Float[Array, "B N"], Bool[Array, "B N"]]:
    """log p of each target, float32, in nats; and whether no token is likelier.

    Args:
      bidirectional: the prompt's tokens see one another in both directions (prefix-LM).
      vocabulary_chunks: see `loss.token_scores`.
    """
    in_prompt = rows.segment_ids == PROMPT
    variables = {"params": params}
    hidden = model.apply(
        variables,
        rows.tokens,
        segment_ids=rows.segment_ids,
        shared_mask=in_prompt,
        positions=rows.positions,
        prefix_mask=in_prompt if bidirectional else None,
        method="hidden",
    )
    # Only what is asked for is read out: a prompt's tokens, most of a row, are not.
    read = jnp.take_along_axis(hidden, rows.reads[:, :, None], axis=1)
    table, scale = model.apply(variables, method="readout_table")
    scores = token_scores(read, table, rows.targets, logit_scale=scale, chunks=vocabulary_chunks)
    return scores.log_probability, scores.is_likeliest
