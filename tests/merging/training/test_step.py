"""The train step gives the same on any mesh, and what it does is what optax and autodiff do on whole logits."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from merging import partitioning
from merging.models.config import named
from merging.models.palm import Palm
from merging.partitioning import MeshShape
from merging.training import optimizer as optimizers
from merging.training.batch import Batch
from merging.training.step import TrainState, init_state, train_step

pytestmark = pytest.mark.slow  # programs for several meshes take minutes to compile

B, T, V = 8, 24, 128
CONFIG = named("mini_xs", vocab_size=V)
MESHES = {
    "fsdp": MeshShape(fsdp=8),
    "data_model": MeshShape(data=2, model=4),
    "all": MeshShape(data=2, fsdp=2, model=2),
    "slices": MeshShape(slices=2, fsdp=2, model=2),
}


@functools.cache
def model(**changes) -> Palm:
    return Palm(named("mini_xs", vocab_size=V, **changes))


def batch(seed: int = 0) -> Batch:
    """Rows of two packed sequences, a few of them of weight 0."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, V, (B, T + 1), dtype=np.int32)
    segments = np.where(np.arange(T) < T // 3, 1, 2)
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=(rng.random((B, T)) < 0.8).astype(np.float32),
        segment_ids=np.broadcast_to(segments, (B, T)).astype(np.int32),
        positions=np.broadcast_to(np.arange(T), (B, T)).astype(np.int32),
    )


def boxed(net: Palm):
    return net.init(jax.random.key(0), jnp.zeros((1, T), jnp.int32))["params"]


def one_step(net: Palm, *, mesh: MeshShape | None, optimizer=None, **options):
    """The state after a step of plain descent (whose update is the gradient) and its metrics, on one device or a mesh."""
    optimizer = optimizer or optax.sgd(1.0)
    state = init_state(boxed(net), optimizer)
    step = functools.partial(train_step, model=net, optimizer=optimizer, z_loss=1e-4, **options)
    seed = np.int32(3)
    if mesh is None:
        return jax.jit(step)(nn.unbox(state), batch(), seed)
    devices = mesh.mesh()
    cut = partitioning.shardings(state, devices)
    rows = partitioning.batch_shardings(batch(), devices)
    placed = jax.device_put(nn.unbox(state), cut), jax.device_put(batch(), rows)
    with partitioning.use(devices):
        whole = partitioning.replicated(devices)
        return jax.jit(
            step, in_shardings=(cut, rows, whole), out_shardings=(cut, whole), donate_argnums=0
        )(*placed, seed)


def gradients(before: TrainState | None, after: TrainState):
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), before, after.params)


def assert_close(found, wanted, *, relative: float):
    """Each leaf's difference is small beside the leaf's own norm."""
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        error = np.linalg.norm(np.asarray(a) - np.asarray(b))
        assert error <= relative * np.linalg.norm(np.asarray(b)), jax.tree_util.keystr(path)


@functools.cache
def gradient_on(mesh: str | None, **options):
    """Gradient and metrics of the first batch."""
    net = model(dropout_rate=0.1)
    placed = MESHES[mesh] if mesh else None
    collect = optax.GradientTransformation(lambda p: p, lambda g, s, p: (g, g))
    state, metrics = one_step(net, mesh=placed, optimizer=collect, clip_norm=None, **options)
    return jax.device_get(state.opt_state), jax.device_get(metrics)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_gives_the_loss_and_gradients_of_one_device(mesh: str):
    wanted, wanted_metrics = gradient_on(None)
    found, metrics = gradient_on(mesh)
    assert_close(found, wanted, relative=1e-5)
    np.testing.assert_allclose(metrics, wanted_metrics, rtol=1e-5)


@pytest.mark.parametrize("mesh", [None, "all"])
def test_chunks_of_the_vocabulary_give_the_same_gradients(mesh: str | None):
    wanted, wanted_metrics = gradient_on(None)
    found, metrics = gradient_on(mesh, vocabulary_chunks=8)
    assert_close(found, wanted, relative=1e-5)
    np.testing.assert_allclose(metrics, wanted_metrics, rtol=1e-5)


@pytest.mark.parametrize("mesh", [None, "all"])
def test_microbatches_give_the_gradients_of_the_whole_batch(mesh: str | None):
    """Though their weights differ. Without dropout, whose masks are each microbatch's own."""
    collect = optax.GradientTransformation(lambda p: p, lambda g, s, p: (g, g))
    shape = MESHES[mesh] if mesh else None
    options = {"mesh": shape, "optimizer": collect, "clip_norm": None}
    whole, whole_metrics = jax.device_get(one_step(model(), **options))
    # Rows 0, 2, 4, 6 and 1, 3, 5, 7: each device has rows of both.
    found, metrics = jax.device_get(one_step(model(), **options, microbatches=2))
    assert_close(found.opt_state, whole.opt_state, relative=1e-5)
    np.testing.assert_allclose(metrics, whole_metrics, rtol=1e-5)


def test_a_gradient_is_clipped_to_its_norm():
    collect = optax.GradientTransformation(lambda p: p, lambda g, s, p: (g, g))
    state, metrics = one_step(model(), mesh=None, optimizer=collect, clip_norm=0.5)
    assert metrics.gradient_norm > 0.5
    np.testing.assert_allclose(optax.tree.norm(state.opt_state), 0.5, rtol=1e-5)
    np.testing.assert_allclose(metrics.update_norm, 0.5, rtol=1e-5)


def test_dropout_follows_from_seed_and_step_alone():
    net = model(dropout_rate=0.1)
    state = init_state(nn.unbox(boxed(net)), optax.sgd(0.0))
    step = jax.jit(functools.partial(train_step, model=net, optimizer=optax.sgd(0.0)))

    def loss(number: int, seed: int) -> float:
        return float(step(state._replace(step=jnp.int32(number)), batch(), np.int32(seed))[1].loss)

    assert loss(5, 1) == loss(5, 1)
    assert len({loss(5, 1), loss(6, 1), loss(5, 2)}) == 3


@pytest.mark.parametrize("make", [optimizers.adamw, optimizers.adafactor])
def test_a_few_steps_learn_a_batch(make):
    optimizer = make(0.01)
    state = init_state(nn.unbox(boxed(model())), optimizer)
    step = jax.jit(
        functools.partial(train_step, model=model(), optimizer=optimizer, z_loss=1e-4),
        donate_argnums=0,
    )
    losses = []
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to whole numbers
        for _ in range(20):
            state, metrics = step(state, batch(), np.int32(0))
            losses.append(float(metrics.loss))
    assert losses[-1] < 0.7 * losses[0]
    assert int(state.step) == 20


def test_microbatches_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="3 microbatches don't divide a batch of 8 rows"):
        one_step(model(), mesh=None, microbatches=3)


@pytest.mark.slow
def test_scanned_layers_give_the_gradients_of_unrolled_ones_under_any_remat():
    def gradients(**changes):
        net = model(**changes)
        scanned = nn.unbox(boxed(model()))
        params = scanned
        if not net.config.scan_layers:
            layers = scanned["layers"]
            count = net.config.num_layers
            each = {f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], layers) for i in range(count)}
            params = {k: v for k, v in scanned.items() if k != "layers"} | each
        collect = optax.GradientTransformation(lambda p: p, lambda g, s, p: (g, g))
        step = functools.partial(train_step, model=net, optimizer=collect, clip_norm=None)
        state, _ = jax.jit(step)(init_state(params, collect), batch(), np.int32(0))
        found = state.opt_state
        if not net.config.scan_layers:
            layers = [found.pop(f"layers_{i}") for i in range(count)]
            found["layers"] = jax.tree.map(lambda *x: jnp.stack(x), *layers)
        return found

    wanted = gradients()
    for changes in ({"scan_layers": False}, {"remat": "full"}, {"remat": "dots"}):
        assert_close(gradients(**changes), wanted, relative=1e-5)
