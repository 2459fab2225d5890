"""A batch as models see it, and the scores of its targets: what training and scoring share."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
from jaxtyping import Array, Bool, Float, Int

from merging.models.decoder import Decoder
from merging.training.loss import TokenScores, token_scores


@flax.struct.dataclass
class Batch:
    """Rows of tokens and what should follow each.

    Attributes:
      tokens: int32 [B, T], what the model reads.
      targets: int32 [B, T], what should follow each token.
      weights: float32 [B, T]; 0 where the target does not count (inputs, padding).
      segment_ids: int32 [B, T], numbers of packed sequences; None for one sequence a row.
      positions: int32 [B, T], of each token in its sequence; None counts along the row.
      prefix_mask: bool [B, T], true for the inputs of a prefix-LM; None is causal.
    """

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    segment_ids: Int[Array, "B T"] | None = None
    positions: Int[Array, "B T"] | None = None
    prefix_mask: Bool[Array, "B T"] | None = None


def batch_scores(
    model: Decoder,
    params: Any,
    batch: Batch,
    *,
    dropout_rng: jax.Array | None = None,
    vocabulary_chunks: int = 1,
) -> TokenScores:
    """Scores of a batch's targets; with dropout where its rng is given."""
    variables = {"params": params}
    hidden = model.apply(
        variables,
        batch.tokens,
        segment_ids=batch.segment_ids,
        positions=batch.positions,
        prefix_mask=batch.prefix_mask,
        deterministic=dropout_rng is None,
        rngs={} if dropout_rng is None else {"dropout": dropout_rng},
        method="hidden",
    )
    table, logit_scale = model.apply(variables, method="readout_table")
    return token_scores(
        hidden, table, batch.targets, logit_scale=logit_scale, chunks=vocabulary_chunks
    )
