"""The scoring step: what rank classification needs of a model, one number an example."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from merging.models.decoder import Decoder
from merging.training.batch import Batch, batch_scores


def score(
    model: Decoder, params: Any, batch: Batch, *, vocabulary_chunks: int = 1
) -> Float[Array, " B"]:
    """The sum of each row's target log-probabilities, weighted by `batch.weights`; float32, in nats."""
    scores = batch_scores(model, params, batch, vocabulary_chunks=vocabulary_chunks)
    # A token of weight 0 may have any target, -infinity's included.
    counted = jnp.where(batch.weights > 0, batch.weights * scores.log_probability, 0.0)
    return counted.sum(-1)
