"""The train step: gradients over microbatches, clipping, the optimizer's update, and metrics, as one pure function.

Everything it does follows from (state, batch, seed): the dropout of a step comes from the seed and the step's number, so a run
that goes on from a checkpoint repeats what an unbroken one would have done, on any mesh.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from merging import paths
from merging.models.decoder import Decoder
from merging.models.model_file import stacked_of
from merging.training.batch import Batch, batch_scores
from merging.training.loss import LossSums, loss_sums


class TrainState(NamedTuple):
    """What a training run carries from step to step.

    Attributes:
      step: int32, steps taken.
      params: of the model.
      opt_state: of the optimizer.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any


class Metrics(NamedTuple):
    """Of one step, float32.

    Attributes:
      loss: per weight, z-loss included.
      cross_entropy: per weight, in nats.
      z_loss: per weight.
      accuracy: the weight's share whose target is the likeliest token.
      weight: of the batch, a count of target tokens where weights are 0 and 1.
      gradient_norm: global, before clipping.
      update_norm: global.
      first_bad: int32, the first leaf of the parameters, by its number, whose gradient is not finite; else -1.
    """

    loss: Float[Array, ""]
    cross_entropy: Float[Array, ""]
    z_loss: Float[Array, ""]
    accuracy: Float[Array, ""]
    weight: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    update_norm: Float[Array, ""]
    first_bad: Int[Array, ""]


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """A state before its first step. Boxed parameters give a boxed state, which `partitioning.shardings` reads."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def train_step(
    state: TrainState,
    batch: Batch,
    seed: Int[Array, ""],
    *,
    model: Decoder,
    optimizer: optax.GradientTransformation,
    z_loss: float = 0.0,
    clip_norm: float | None = 1.0,
    microbatches: int = 1,
    vocabulary_chunks: int = 1,
    frozen: Sequence[str] = (),
) -> tuple[TrainState, Metrics]:
    """One step; to be jitted with the state donated.

    Args:
      state: its params and moments may be cut in any way.
      batch: rows are split into `microbatches` equal parts, whose gradients are summed in float32; the result is that of
        the whole batch, whatever the parts' weights.
      seed: int32, of dropout.
      optimizer: is given the model's stacked axes if it takes extra arguments, see `optimizer.py`.
      clip_norm: the gradient's global norm is at most this; None: not clipped.
      vocabulary_chunks: see `loss.token_scores`.
      frozen: patterns of parameters (`paths.is_like`) that have no gradient; an optimizer may yet move them (see
        `optimizer.freezing`).

    Returns:
      The next state, and metrics. A batch of weight 0 gives a gradient of 0.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)

    def loss(params: Any, part: Batch, number: Array) -> tuple[Array, LossSums]:
        params = _without_gradient(params, frozen) if frozen else params
        has_dropout = model.config.dropout_rate > 0
        rng = jax.random.fold_in(key, number) if has_dropout else None
        scores = batch_scores(
            model, params, part, dropout_rng=rng, vocabulary_chunks=vocabulary_chunks
        )
        sums = loss_sums(scores, part.weights, z_loss=z_loss)
        return sums.loss, sums

    gradients, sums = accumulated(loss, state.params, batch, microbatches=microbatches)
    per_weight = 1.0 / jnp.maximum(sums.weight, jnp.finfo(jnp.float32).tiny)
    squares = jnp.stack([jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients)])
    gradient_norm = jnp.sqrt(jnp.sum(squares)) * per_weight
    factor = per_weight
    if clip_norm is not None:
        factor = factor * jnp.minimum(1.0, clip_norm / jnp.maximum(gradient_norm, 1e-30))
    gradients = jax.tree.map(lambda g: g * factor, gradients)
    updates, opt_state = optax.with_extra_args_support(optimizer).update(
        gradients, state.opt_state, state.params, stacked=stacked_of(model.config)
    )
    params = optax.apply_updates(state.params, updates)
    metrics = Metrics(
        loss=sums.loss * per_weight,
        cross_entropy=sums.cross_entropy * per_weight,
        z_loss=sums.z_loss * per_weight,
        accuracy=sums.correct * per_weight,
        weight=sums.weight,
        gradient_norm=gradient_norm,
        update_norm=optax.tree.norm(updates),
        first_bad=_first(~jnp.isfinite(squares)),
    )
    return TrainState(state.step + 1, params, opt_state), metrics


def accumulated(
    loss: Any, params: Any, batch: Batch, *, microbatches: int = 1
) -> tuple[Any, LossSums]:
    """Float32 gradients of `loss(params, part, number) -> (sum, LossSums)`, and the sums, added up over microbatches."""
    gradient = jax.grad(loss, has_aux=True)
    rows = batch.tokens.shape[0]
    if rows % microbatches:
        raise ValueError(f"{microbatches} microbatches don't divide a batch of {rows} rows")
    if microbatches == 1:
        return _float32(gradient(params, batch, jnp.int32(0)))
    # Row r goes to microbatch r % microbatches: so each device has its part of every one.
    parts = jax.tree.map(
        lambda x: x.reshape(rows // microbatches, microbatches, *x.shape[1:]).swapaxes(0, 1), batch
    )

    def add(total: Any, part: tuple[Batch, Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, _float32(gradient(params, *part))), None

    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], parts), jnp.int32(0))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    total, _ = jax.lax.scan(add, nothing, (parts, jnp.arange(microbatches, dtype=jnp.int32)))
    return total


def _without_gradient(params: Any, frozen: Sequence[str]) -> Any:
    return jax.tree.map_with_path(
        lambda path, p: (
            jax.lax.stop_gradient(p) if paths.is_like(paths.of_tree_path(path), frozen) else p
        ),
        params,
    )


def _first(true: Array) -> Array:
    """The number of the first true entry; -1 where there is none."""
    return jnp.where(jnp.any(true), jnp.argmax(true), -1).astype(jnp.int32)


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
