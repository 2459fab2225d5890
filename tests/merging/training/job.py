"""A run of the tiny model as a process, or as one of several: tells its number and each step that it has seen to be whole.

python -m tests.merging.training.job OUTPUT '{"train_steps": 20}' '{"data": 2, "fsdp": 2, "model": 2}'
"""

from __future__ import annotations

import json
import os
import sys

from etils import epath

from launch import devices, preemption


def main(output: str, changes: str, mesh: str) -> None:
    joined = devices.processes(os.environ)
    devices.start(joined)
    print(f"pid {os.getpid()}", flush=True)
    from merging.partitioning import MeshShape
    from tests.merging.training import runs

    is_asked = preemption.should_stop(joined)
    with preemption.ending(print, joined):
        runs.run(
            epath.Path(output),
            mesh=MeshShape(**json.loads(mesh)),
            should_stop=lambda step: is_asked(),
            write_metrics=lambda name, step, values: print(f"step {step}", flush=True),
            log=lambda text: print(text, flush=True),
            **json.loads(changes),
        )
    print("whole", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
