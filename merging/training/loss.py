"""Cross entropy in float32 over hidden states and the readout's table, without ever holding all logits.

Logits of 256,000 entries are the largest array of a training step: 32 rows of 1,280 tokens have 42 GB of them. Here the
table goes by in chunks of its rows, as parameters cut over fsdp do: a chunk is gathered, its logits add to a running
log-sum-exp, and it is forgotten; the backward pass computes it again. Cutting the tokens instead would gather the table's
gradient once a chunk.

With one chunk nothing is computed twice; that is the form for small vocabularies.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class TokenScores(NamedTuple):
    """Of each token: log p(target) and log Z = log sum exp(logits), float32; and whether no logit is above the target's."""

    log_probability: Float[Array, "B T"]
    log_z: Float[Array, "B T"]
    is_likeliest: Bool[Array, "B T"]


class LossSums(NamedTuple):
    """Sums over tokens, which add up over microbatches and hosts; float32.

    Attributes:
      loss: weighted cross entropy plus z-loss; over `weight` it is what training minimises.
      cross_entropy: weighted, in nats.
      z_loss: weighted, with its coefficient.
      correct: weight of the tokens whose target is the likeliest.
      weight: of all tokens: the token count where weights are 0 and 1.
    """

    loss: Float[Array, ""]
    cross_entropy: Float[Array, ""]
    z_loss: Float[Array, ""]
    correct: Float[Array, ""]
    weight: Float[Array, ""]


def loss_sums(scores: TokenScores, weights: Float[Array, "B T"], *, z_loss: float) -> LossSums:
    """-log p(target) + z_loss * log^2 Z, weighted and summed (PaLM, section 5: z_loss = 1e-4)."""
    # A token that does not count may have any target, one outside the vocabulary too.
    cross_entropy = -jnp.sum(jnp.where(weights > 0, weights * scores.log_probability, 0.0))
    z_sum = jnp.float32(z_loss) * jnp.sum(weights * jnp.square(scores.log_z))
    return LossSums(
        loss=cross_entropy + z_sum,
        cross_entropy=cross_entropy,
        z_loss=z_sum,
        correct=jnp.sum(jnp.where(scores.is_likeliest, weights, 0.0)),
        weight=jnp.sum(weights),
    )


def token_scores(
    hidden: Float[Array, "B T d"],
    table: Float[Array, "V d"],
    targets: Int[Array, "B T"],
    *,
    logit_scale: float = 1.0,
    chunks: int = 1,
) -> TokenScores:
    """Scores of the targets under softmax(logit_scale * hidden . table^T).

    Args:
      hidden: normed states, in the activations' dtype; products are summed in float32.
      table: rows of the readout; rounded to the activations' dtype.
      targets: int32; one outside the vocabulary scores -infinity, as nothing has its probability.
      chunks: into how many the table's rows are dealt out; divides V, over the model axis too.
    """
    rows = table.shape[0]
    if rows % chunks:
        raise ValueError(f"{chunks} chunks don't divide a vocabulary of {rows}")
    # Row r goes to chunk r % chunks: so each device of the model axis has its part of every chunk.
    dealt = table.reshape(rows // chunks, chunks, table.shape[1]).astype(hidden.dtype)

    def one(carry: tuple[Array, Array, Array], chunk: tuple[Array, Array]):  # noqa: ANN202
        part, number = chunk
        part = nn.with_logical_constraint(part, ("vocab", "embed"))
        logits = _logits(hidden, part) * jnp.float32(logit_scale)
        most, total, chosen = carry
        new_most = jnp.maximum(most, jax.lax.stop_gradient(logits.max(-1)))
        total = total * jnp.exp(most - new_most) + jnp.exp(logits - new_most[..., None]).sum(-1)
        wanted = jnp.where(targets % chunks == number, targets // chunks, -1)
        is_target = jnp.arange(part.shape[0]) == wanted[..., None]
        return (new_most, total, chosen + jnp.where(is_target, logits, 0.0).sum(-1)), None

    nothing = jnp.zeros(targets.shape, jnp.float32)
    carry = (jnp.full(targets.shape, -jnp.inf, jnp.float32), nothing, nothing)
    numbers = jnp.arange(chunks, dtype=targets.dtype)
    if chunks == 1:
        carry, _ = one(carry, (dealt[:, 0], numbers[0]))
    else:
        carry, _ = jax.lax.scan(
            jax.checkpoint(one, prevent_cse=False), carry, (dealt.swapaxes(0, 1), numbers)
        )
    most, total, chosen = carry
    log_z = most + jnp.log(total)
    known = (targets >= 0) & (targets < rows)
    return TokenScores(
        jnp.where(known, chosen - log_z, -jnp.inf), log_z, is_likeliest=known & (chosen >= most)
    )


def _logits(hidden: Float[Array, "B T d"], table: Float[Array, "V d"]) -> Float[Array, "B T V"]:
    logits = jnp.einsum("BTd,Vd->BTV", hidden, table, preferred_element_type=jnp.float32)
    return nn.with_logical_constraint(logits, ("batch", "length", "vocab"))
