"""How fast a mixture is packed, beside a raw tf.data read of the same rows, and how fast batches are read back.

  python -m tests.benchmarks.tasks --mixture=sentiment_mini --inputs_length=96 --targets_length=16

Prints examples/s of a raw read (rows as JSON, nothing done to them), of packing, and rows/s and tokens/s of `batch(step)` on one core.
"""

from __future__ import annotations

import os
import tempfile
import time

from absl import app, flags

MIXTURE = flags.DEFINE_string("mixture", "sentiment_mini", "What to pack.")
LOCAL_DATA = flags.DEFINE_string("local_data", None, "Folder of JSON lines.")
VOCABULARY = flags.DEFINE_string("vocabulary", None, "See tasks.register.")
INPUTS_LENGTH = flags.DEFINE_integer("inputs_length", 96, "Tokens of inputs.")
TARGETS_LENGTH = flags.DEFINE_integer("targets_length", 16, "Tokens of targets.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Rows of a batch.")
STEPS = flags.DEFINE_integer("steps", 500, "Batches to read.")


def main(_: object) -> None:
    """Measures in the order of the docstring."""
    import tasks

    tasks.register(vocabulary=VOCABULARY.value, local_data=LOCAL_DATA.value)

    import seqio

    from tasks import batches, packing, registry

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
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


if __name__ == "__main__":
    app.run(main)
