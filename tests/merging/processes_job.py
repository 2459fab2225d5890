"""What each process of `test_processes.py` runs: a merge from disk to disk, and one of arrays sharded over all hosts."""

from __future__ import annotations

import json
import pathlib
import sys

from launch import devices

joined = devices.processes(__import__("os").environ)
devices.start(joined)

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

import merging  # noqa: E402
from tests import models  # noqa: E402
from tests.merging.process_settings import EXPERTS, SETTINGS  # noqa: E402

folder = pathlib.Path(sys.argv[1])
assert jax.process_count() == joined.count

report = merging.merge_checkpoints(
    base=str(folder / "base"),
    experts=[str(folder / f"expert_{i}") for i in range(EXPERTS)],
    output_dir=folder / "streamed",
    methods=SETTINGS,
    shard_bytes=4_000,
)
(folder / f"read_{joined.index}.json").write_text(json.dumps([report.bytes_read, report.reads]))

base, experts = models.base_and_experts(EXPERTS)
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))


def sharded(model: models.Model) -> dict[str, jax.Array]:
    def place(leaf: np.ndarray) -> jax.Array:
        spec = PartitionSpec("a", "b") if leaf.shape in ((40, 24), (96, 96)) else PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return {name: place(leaf) for name, leaf in model.items() if leaf.dtype == models.BFLOAT16}


for name, method in SETTINGS.items():
    resident = merging.merge_params(sharded(base), [sharded(e) for e in experts], method)
    for leaf, array in resident.items():
        want = models.load(folder / "streamed" / name)[leaf]
        for shard in array.addressable_shards:
            assert np.asarray(shard.data).tobytes() == want[shard.index].tobytes(), (name, leaf)
print("bit-equal on process", joined.index)
