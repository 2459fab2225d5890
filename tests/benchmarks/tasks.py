"""How fast a mixture is packed, beside a raw tf.data read of the same rows, and how fast batches are read back.

  python -m tests.benchmarks.tasks --mixture=sentiment_mini --inputs_length=96 --targets_length=16

Prints examples/s of a raw read (rows as JSON, nothing done to them), of packing, rows/s and tokens/s of `batch(step)` on one core,
and then what the train step of a model eats of the same rows, on all cores.
"""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any

from absl import app, flags

MIXTURE = flags.DEFINE_string("mixture", "sentiment_mini", "What to pack.")
LOCAL_DATA = flags.DEFINE_string("local_data", None, "Folder of JSON lines.")
VOCABULARY = flags.DEFINE_string("vocabulary", None, "See tasks.register.")
INPUTS_LENGTH = flags.DEFINE_integer("inputs_length", 96, "Tokens of inputs.")
TARGETS_LENGTH = flags.DEFINE_integer("targets_length", 16, "Tokens of targets.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Rows of a batch.")
STEPS = flags.DEFINE_integer("steps", 500, "Batches to read.")
MODEL = flags.DEFINE_string("model", "mini_l", "A named size, whose train step is timed.")
TRAIN_STEPS = flags.DEFINE_integer("train_steps", 20, "Steps of it.")


def main(_: object) -> None:
    """Measures in the order of the docstring."""
    import tasks

    tasks.register(vocabulary=VOCABULARY.value, local_data=LOCAL_DATA.value)

    import seqio

    from tasks import batches, packing, registry

    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    count, started = 0, time.perf_counter()
    for name in registry.task_names(MIXTURE.value):
        source = seqio.TaskRegistry.get(name).source
        count += sum(1 for _ in source.get_dataset("train", shuffle=True, seed=0))
    raw = time.perf_counter() - started
    print(f"raw read: {count:,} rows in {raw:.1f} s, {count / raw:,.0f} rows/s")

    lengths = packing.Lengths(inputs=INPUTS_LENGTH.value, targets=TARGETS_LENGTH.value)
    with tempfile.TemporaryDirectory() as folder:
        packed = batches.pack_mixture(MIXTURE.value, cache_dir=folder, lengths=lengths)
        read = batches.PackedBatches(packed, share=batches.Share(batch_size=BATCH_SIZE.value))
        index = read.index
        print(
            f"packing: {index['examples']:,} examples in {index['seconds']} s,"
            f" {index['examples'] / index['seconds']:,.0f} examples/s,"
            f" {index['seconds'] / raw:.1f} times the raw read; {index['rows']:,} rows, {index['full']:.1%} full"
        )
        read.batch(0)
        started = time.perf_counter()
        for step in range(STEPS.value):
            read.batch(step)
        rows = STEPS.value * BATCH_SIZE.value / (time.perf_counter() - started)
        print(
            f"batch(step): {rows:,.0f} rows/s of {lengths.row}, {rows * lengths.row / 1e6:,.1f} M tokens/s"
        )
        os.sched_setaffinity(0, cores)
        eaten = train_rows(read)
        print(
            f"train step of {MODEL.value}: {eaten:,.1f} rows/s; batch(step) gives {rows / eaten:,.0f} times that"
        )


def train_rows(read: Any) -> float:
    """Rows a second of the model's train step, on batches that are in memory."""
    import functools

    import flax.linen as nn
    import jax

    from merging.models.config import named
    from merging.models.palm import Palm
    from merging.training.batch import Batch
    from merging.training.optimizer import adamw
    from merging.training.step import init_state, train_step

    batches = []
    for number in range(TRAIN_STEPS.value):
        arrays = read.batch(number)
        batches.append(Batch(weights=arrays.pop("loss_weights"), **arrays))
    model, optimizer = Palm(named(MODEL.value)), adamw(1e-3)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), batches[0].tokens))["params"]
    state = jax.jit(lambda params: init_state(params, optimizer))(params)
    step = jax.jit(
        functools.partial(train_step, model=model, optimizer=optimizer), donate_argnums=0
    )
    state, _ = jax.block_until_ready(step(state, batches[0], 0))
    started = time.perf_counter()
    for batch in batches:
        state, _ = step(state, batch, 0)
    jax.block_until_ready(state)
    return len(batches) * BATCH_SIZE.value / (time.perf_counter() - started)


if __name__ == "__main__":
    app.run(main)
