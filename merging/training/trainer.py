"""The compiled functions of a run, for one expert or for several at once along a leading axis of every array."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from merging import partitioning
from merging.models.config import DecoderConfig
from merging.models.decoder import boxed_params
from merging.models.families import model_of
from merging.paths import of_leaves
from merging.training.batch import Batch, batch_scores
from merging.training.loss import LossSums, loss_sums
from merging.training.optimizer import WeightAveraging, averaged_params, freezing
from merging.training.settings import Optimizer, Settings
from merging.training.step import TrainState, init_state, train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that the compiled functions depend on."""

    config: DecoderConfig
    mesh: jax.sharding.Mesh
    optimizer: Optimizer
    learning_rate: Any
    z_loss: float
    clip_norm: float | None
    microbatches: int
    vocabulary_chunks: int
    averaging: WeightAveraging | None
    frozen: tuple[str, ...]
    experts: int | None


def recipe(
    settings: Settings, config: DecoderConfig, mesh: jax.sharding.Mesh, *, experts: int | None
) -> Recipe:
    """What settings say of the functions; `experts`: that are trained at once, None for one without the axis over them."""
    s, of_model = settings, getattr(config, "z_loss", 0.0)
    return Recipe(
        config=config,
        mesh=mesh,
        optimizer=s.optimizer,
        learning_rate=s.learning_rate,
        z_loss=of_model if s.z_loss is None else s.z_loss,
        clip_norm=s.clip_norm,
        microbatches=s.microbatches,
        vocabulary_chunks=s.vocabulary_chunks,
        averaging=s.averaging,
        frozen=tuple(s.frozen),
        experts=experts,
    )


class Trainer:
    """The compiled functions of a run, for one expert or for several along a leading axis.

    Attributes:
      experts: how many; None for one without that axis.
      abstract_state: ShapeDtypeStructs with shardings; abstract_state_of_one: without the axis over experts.
      leaf_names: of the parameters, in their order.
      step: (state, batch, seed) -> (state, metrics by name); the state is donated.
      score: (state, batch) -> loss.LossSums.
    """

    def __init__(self, recipe: Recipe):
        self.experts, self._mesh = recipe.experts, recipe.mesh
        mesh, experts, schedule = recipe.mesh, recipe.experts, recipe.learning_rate
        model = model_of(recipe.config)
        optimizer = _optimizer(recipe)
        boxed = jax.eval_shape(
            functools.partial(init_state, optimizer=optimizer), boxed_params(model)
        )
        shapes, one = nn.unbox(boxed), partitioning.shardings(boxed, mesh)
        self.leaf_names = of_leaves(shapes.params)
        shardings = one
        self.abstract_state_of_one = _placed(shapes, one)
        if experts is not None:
            shapes = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((experts, *x.shape), x.dtype), shapes
            )
            shardings = partitioning.of_experts(one, mesh)
        self.abstract_state = _placed(shapes, shardings)

        def step(
            state: TrainState, batch: Batch, seed: jax.Array
        ) -> tuple[TrainState, dict[str, jax.Array]]:
            rate = schedule(state.step) if callable(schedule) else schedule
            state, metrics = train_step(
                state,
                batch,
                seed,
                model=model,
                optimizer=optimizer,
                z_loss=recipe.z_loss,
                clip_norm=recipe.clip_norm,
                microbatches=recipe.microbatches,
                vocabulary_chunks=recipe.vocabulary_chunks,
                frozen=recipe.frozen,
            )
            return state, {**metrics._asdict(), "learning_rate": jnp.asarray(rate, jnp.float32)}

        def chosen(state: TrainState) -> Any:
            average = averaged_params(state.opt_state)
            if average is None:
                return state.params
            return jax.tree.map(lambda a, p: a.astype(p.dtype), average, state.params)

        def score(state: TrainState, batch: Batch) -> LossSums:
            scores = batch_scores(
                model, chosen(state), batch, vocabulary_chunks=recipe.vocabulary_chunks
            )
            return loss_sums(scores, batch.weights, z_loss=0.0)

        def start(params: Any) -> TrainState:
            return of_each(init_state(jax.tree.map(jnp.copy, params), optimizer))

        def of_each(state: TrainState) -> TrainState:
            if experts is None:
                return state
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (experts, *x.shape)), state)

        def params_of(state: TrainState, number: jax.Array) -> Any:
            return jax.tree.map(jnp.copy if experts is None else lambda x: x[number], chosen(state))

        if experts is not None:
            axis = partitioning.EXPERT_AXIS if partitioning.EXPERT_AXIS in mesh.shape else None
            step = jax.vmap(step, in_axes=(0, 0, None), spmd_axis_name=axis)
            score = jax.vmap(score, spmd_axis_name=axis)
        whole = partitioning.replicated(mesh)
        self.step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, whole))
        self.score = jax.jit(score, out_shardings=whole)
        self._start = jax.jit(start, out_shardings=shardings)
        self._of_each = jax.jit(of_each, out_shardings=shardings)
        self._params_of = jax.jit(params_of, out_shardings=one.params)

    def start(self, base: Any) -> TrainState:
        """The state before the first step, with copies of the base's parameters."""
        with partitioning.use(self._mesh):
            return self._start(base)

    def start_state(self, state: TrainState) -> TrainState:
        """A state of one expert as that of each."""
        return self._of_each(state)

    def params_of(self, state: TrainState, number: int) -> Any:
        """The parameters of one expert, averaged where weights are."""
        return self._params_of(state, np.int32(number))


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def _optimizer(recipe: Recipe) -> optax.GradientTransformation:
    optimizer = recipe.optimizer(recipe.learning_rate)
    if recipe.frozen:
        optimizer = freezing(optimizer, recipe.frozen)
    return optimizer if recipe.averaging is None else recipe.averaging.around(optimizer)


# Kept from run to run: a study trains many experts in one process, and compiling takes as long as training a small one.
trainer = functools.lru_cache(maxsize=8)(Trainer)
