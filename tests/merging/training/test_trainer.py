"""The compiled functions of a run, as the compiler has them."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest

from merging import partitioning
from merging.engine.collectives import Collective
from merging.engine.compiled import figures
from merging.models.families import model_of
from merging.partitioning import MeshShape
from merging.training.batch import Batch
from merging.training.feed import Placement
from merging.training.optimizer import WeightAveraging
from merging.training.programs import Work, model_programs
from merging.training.trainer import Trainer, recipe
from tests.merging.training import runs

pytestmark = pytest.mark.usefixtures("optax_promotes")

EXPERTS = 8


def collectives(shape: MeshShape) -> dict[str, Collective]:
    """What devices tell one another in one step of eight experts."""
    mesh = shape.mesh()
    settings = runs.settings(pathlib.Path("out"), experts_at_once=EXPERTS)
    program = Trainer(recipe(settings, runs.CONFIG, mesh, experts=EXPERTS))
    size = (EXPERTS, runs.ROWS, runs.LENGTH)
    rows = partitioning.rows_sharding(size, mesh, has_experts=True)

    def array(dtype: type) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, dtype, sharding=rows)

    batch = Batch(
        *(array(dtype) for dtype in (np.int32, np.int32, np.float32)),
        segment_ids=array(np.int32),
        positions=array(np.int32),
        prefix_mask=array(bool),
    )
    with partitioning.use(mesh):
        lowered = program.step.lower(program.abstract_state, batch, np.int32(0))
    return figures(lowered.compile()).collectives


@pytest.mark.slow
def test_eight_experts_on_eight_devices_tell_one_another_their_metrics_alone():
    """A number of each: no parameter, gradient or activation leaves its device."""
    found = collectives(MeshShape(experts=8))
    assert found, "the metrics are told"
    assert max(each.largest_bytes for each in found.values()) <= EXPERTS * 4, found
    for each in found.values():  # some metrics, and no more often than once
        assert each.nbytes <= 32 * EXPERTS * 4, found


def test_what_is_compiled_for_pods_is_the_step_of_a_run():
    """Of a run with all that changes a step, on the batch that its feed makes."""
    mesh = MeshShape(fsdp=4, model=2).mesh()
    options = {
        "frozen": ("token_embedder/*",),
        "averaging": WeightAveraging(decay=0.5),
        "clip_norm": 0.5,
        "microbatches": 2,
    }
    settings = runs.settings(pathlib.Path("out"), learning_rate=0.0, **options)
    run = Trainer(recipe(settings, runs.CONFIG, mesh, experts=None))
    place = Placement(mesh, rows=runs.ROWS, length=runs.LENGTH)
    batch = place([runs.rows(0, 0, runs.ROWS)])
    seed = jax.ShapeDtypeStruct((), np.int32, sharding=partitioning.replicated(mesh))
    with partitioning.use(mesh):
        wanted = run.step.lower(run.abstract_state, batch, seed).as_text()
    work = Work(
        rows=runs.ROWS, length=runs.LENGTH, prompts=1, prompt_length=1, new_tokens=1, **options
    )
    model, optimizer = model_of(runs.CONFIG), settings.optimizer(0.0)
    (program,) = model_programs(model, mesh, work, optimizer=optimizer, only=["train"])
    assert program.lower().as_text() == wanted


@pytest.mark.slow
def test_experts_that_are_cut_do_tell_more():
    found = collectives(MeshShape(experts=4, fsdp=2))
    assert max(each.largest_bytes for each in found.values()) > EXPERTS * 4
