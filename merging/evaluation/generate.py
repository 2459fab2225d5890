"""The generating step: prompts of a batch continued by the likeliest tokens."""

from __future__ import annotations

from typing import Any

import flax.struct
from jaxtyping import Array, Int

from merging.models.decoder import Decoder
from merging.models.decoding import Generated, generate


@flax.struct.dataclass
class Prompts:
    """Prompts, filled up at the right.

    Attributes:
      tokens: [B, T] int32.
      lengths: [B] int32, 1 to T each.
    """

    tokens: Int[Array, "B T"]
    lengths: Int[Array, " B"]


def continued(
    model: Decoder,
    params: Any,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    eos_id: int | None,
    bidirectional: bool = False,
) -> Generated:
    """Each prompt's greedy continuation; the loop stops when all rows have ended. See `decoding.generate`."""
    return generate(
        model,
        params,
        prompts.tokens,
        prompts.lengths,
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        bidirectional=bidirectional,
    )
