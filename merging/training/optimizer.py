"""Optimizers as optax transformations: AdamW, Adafactor as PaLM used it, and what goes around any optimizer.

All map over the tree of parameters, so their state is cut as the parameters are, and none clips by the global norm,
which the step does. The step hands every optimizer the model's stacked axes as optax's extra argument `stacked`
({pattern of paths: axis over layers}, as in `paths.Stacked`); those that look at whole tensors take it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from merging import partitioning
from merging.paths import Stacked, is_like, of_tree_path

LearningRate = float | Callable[[Int[Array, ""]], Float[Array, ""]]


def adamw(
    learning_rate: LearningRate,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101); moments are float32, and norms' scales and biases don't decay."""
    return optax.adamw(
        learning_rate,
        b1=b1,
        b2=b2,
        eps=epsilon,
        weight_decay=weight_decay,
        mask=decays,
        mu_dtype=jnp.float32,
    )


def adafactor(
    learning_rate: LearningRate,
    *,
    b1: float | None = 0.9,
    decay_exponent: float = 0.8,
    epsilon: float = 1e-30,
    clipping_threshold: float | None = 1.0,
    least_scale: float = 1e-3,
    weight_decay_exponent: float | None = 2.0,
) -> optax.GradientTransformationExtraArgs:
    """Adafactor (arXiv 1804.04235) as PaLM used it (arXiv 2204.02311, section 5).

    Second moments are not factored, and their decay at step k (from 1) is 1 - k^-0.8. An update is clipped to a root mean square
    of 1, and multiplied by the learning rate and the root mean square of its parameter. The momentum (0.9) is taken of
    that. Weight decay is learning rate^2 times the parameter. A root mean square is of one layer's tensor, which takes
    update's extra argument `stacked` where a leaf holds all layers.

    Args:
      learning_rate: PaLM's is 1e-2 for 10,000 steps, then 1 / sqrt(k).
      b1: None: no momentum, and no memory for it.
      clipping_threshold, least_scale: d and epsilon_2 of Adafactor; the paper on PaLM doesn't mention them.
      weight_decay_exponent: 2.0 for learning rate^2; None for no decay.

    Deviations: norms' scales and biases don't decay, of which the paper says nothing.
    """
    schedule = (
        learning_rate if callable(learning_rate) else lambda count: jnp.float32(learning_rate)
    )
    steps = [_by_second_moment(decay_exponent, epsilon)]
    if clipping_threshold is not None:
        steps.append(_clipped_by_tensor(clipping_threshold))
    steps += [_by_parameter_scale(least_scale), optax.scale_by_schedule(schedule)]
    if b1 is not None:
        steps.append(optax.ema(b1, debias=False, accumulator_dtype=jnp.float32))
    if weight_decay_exponent is not None:
        steps.append(_decayed(lambda count: schedule(count) ** weight_decay_exponent))
    return optax.chain(*steps, optax.scale(-1.0))


def decays(params: Any) -> Any:
    """Which parameters weight decay applies to: all but norms' scales and biases, which their names tell."""
    return jax.tree.map_with_path(
        lambda path, _: of_tree_path(path).rpartition("/")[2] not in ("scale", "bias"), params
    )


# ---- around an optimizer -------------------------------------------------------------------------------------------


def freezing(
    optimizer: optax.GradientTransformation, patterns: Sequence[str]
) -> optax.GradientTransformation:
    """The optimizer, without state or updates for the parameters that are like one of the patterns (`paths.is_like`)."""

    def frozen(params: Any) -> Any:
        return jax.tree.map_with_path(
            lambda path, _: is_like(of_tree_path(path), patterns),
            params,
            is_leaf=partitioning.is_box,
        )

    def free(params: Any) -> Any:
        return jax.tree.map(lambda is_frozen: not is_frozen, frozen(params))

    return optax.chain(optax.masked(optimizer, free), optax.masked(optax.set_to_zero(), frozen))


class Averaged(NamedTuple):
    """Steps taken, the float32 average of the parameters, and the optimizer's own state."""

    count: Int[Array, ""]
    average: Any
    inner: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightAveraging:
    """How the weights of a run are averaged.

    Attributes:
      decay: of a running mean, decay * mean + (1 - decay) * weights at every step; None: all count alike.
      start: steps before the first that counts; until then the average is the weights themselves.
    """

    decay: float | None = None
    start: int = 0

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 <= self.decay < 1:
            raise ValueError(
                f"WeightAveraging.decay is {self.decay}: it must be in [0, 1), or None"
            )

    def around(
        self, optimizer: optax.GradientTransformation
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer, with the average in its state (`averaged_params`)."""
        optimizer = optax.with_extra_args_support(optimizer)

        def init(params: Any) -> Averaged:
            average = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
            return Averaged(jnp.zeros((), jnp.int32), average, optimizer.init(params))

        def update(
            updates: Any, state: Averaged, params: Any = None, **extra_args: Any
        ) -> tuple[Any, Averaged]:
            updates, inner = optimizer.update(updates, state.inner, params, **extra_args)
            counted = jnp.maximum(state.count + 1 - self.start, 1).astype(jnp.float32)
            share = 1 / counted if self.decay is None else jnp.float32(1 - self.decay)
            share = jnp.where(counted <= 1, 1.0, share)
            average = jax.tree.map(
                lambda a, p, u: a + share * (p.astype(jnp.float32) + u.astype(jnp.float32) - a),
                state.average,
                params,
                updates,
            )
            return updates, Averaged(optax.safe_increment(state.count), average, inner)

        return optax.GradientTransformationExtraArgs(init, update)


def averaged_params(opt_state: Any) -> Any | None:
    """The average that the state of an `WeightAveraging` holds; None where there is none."""
    return opt_state.average if isinstance(opt_state, Averaged) else None


# ---- Adafactor's parts --------------------------------------------------------------------------------------------


class SecondMoments(NamedTuple):
    """Steps taken, and a float32 running mean of squared gradients for each parameter."""

    count: Int[Array, ""]
    moments: Any


def _by_second_moment(exponent: float, epsilon: float) -> optax.GradientTransformation:
    def init(params: Any) -> SecondMoments:
        return SecondMoments(
            jnp.zeros((), jnp.int32),
            jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params),
        )

    def update(updates: Any, state: SecondMoments, params: Any = None) -> tuple[Any, SecondMoments]:
        count = optax.safe_increment(state.count)
        decay = 1.0 - count.astype(jnp.float32) ** -exponent
        moments = jax.tree.map(
            lambda m, g: decay * m + (1.0 - decay) * (jnp.square(g) + epsilon),
            state.moments,
            updates,
        )
        updates = jax.tree.map(lambda g, m: g * jax.lax.rsqrt(m), updates, moments)
        return updates, SecondMoments(count, moments)

    return optax.GradientTransformation(init, update)


def _clipped_by_tensor(threshold: float) -> optax.GradientTransformationExtraArgs:
    return _by_tensor(lambda u, p, size: u / jnp.maximum(1.0, size(u) / threshold))


def _by_parameter_scale(least: float) -> optax.GradientTransformationExtraArgs:
    return _by_tensor(lambda u, p, size: u * jnp.maximum(size(p), least))


def _by_tensor(
    change: Callable[[Array, Array, Any], Array],
) -> optax.GradientTransformationExtraArgs:
    """`change(update, parameter, size)` of each leaf; `size(x)` is its root mean square, of each layer's where it holds all."""

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        stacked: Mapping[str, int] | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        layers = Stacked(stacked)

        def changed(path: Any, u: Array, p: Array) -> Array:
            layer_axis = layers.axis(of_tree_path(path))
            return change(u, p, functools.partial(_root_mean_square, layer_axis=layer_axis))

        return jax.tree.map_with_path(changed, updates, params), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _decayed(rate: Callable[[Array], Array]) -> optax.GradientTransformation:
    def init(params: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        factor = rate(state.count)
        updates = jax.tree.map(
            lambda u, p, decays: u + factor * p.astype(u.dtype) if decays else u,
            updates,
            params,
            decays(params),
        )
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def _root_mean_square(x: Array, *, layer_axis: int | None) -> Array:
    """Of a tensor, [] float32; of each layer's where a leaf holds all, with the other axes kept as 1."""
    over = tuple(axis for axis in range(x.ndim) if axis != layer_axis)
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), over, keepdims=True))
