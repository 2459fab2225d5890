"""What each process of `test_orbax.py` runs: the library saves an array sharded over both, and two writers of ours."""

from __future__ import annotations

import os
import pathlib
import sys

from launch import devices

devices.start(devices.processes(os.environ))

import jax  # noqa: E402
import numpy as np  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from merging.checkpoints import boxes, orbax  # noqa: E402
from tests.merging.checkpoints.trees_common import ARRAYS, memory_reader  # noqa: E402

folder = pathlib.Path(sys.argv[1])
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
want = np.arange(16 * 24, dtype=np.float32).reshape(16, 24)
place = NamedSharding(mesh, PartitionSpec("a", "b"))
array = jax.make_array_from_callback(want.shape, place, lambda index: want[index])
for kind, use_ocdbt in (("ocdbt", True), ("zarr", False)):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt)) as checkpointer:
        checkpointer.save(folder / kind, {"w": array, "step": np.int32(5)})

reader = memory_reader()
(folder / "ours").mkdir(exist_ok=True)
multihost_utils.sync_global_devices("folder is there")
writer = orbax.Writer(
    folder / "ours",
    reader.specs(),
    chunk_bytes=64,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
)
assert 0 < len(writer.names_mine) < len(ARRAYS)
for name in writer.names_mine:
    for index in boxes.row_boxes(ARRAYS[name].shape, 13):
        writer.write(name, index, reader.read(name, index))
if jax.process_index() != 0:
    writer.commit()
multihost_utils.sync_global_devices("others are done")
if jax.process_index() == 0:
    writer.commit()
multihost_utils.sync_global_devices("all is there")
