r"""Starts one of T5X's programs on several processes, which T5X itself does for `t5x.train` on GPUs only.

  python -m launch.pod.local --processes=2 --devices=4 -- \
    python -m launch.t5x.start t5x.eval --gin_file=gin_configs/t5x/eval.gin ...

Who takes part is said by MERGING_COORDINATOR, MERGING_PROCESS_COUNT and MERGING_PROCESS_INDEX, as for all programs here; without
them it is one process, started as `python -m t5x.eval` would be, with the platform chosen and XLA's threads counted as in
`launch/devices.py`. Everything behind the program's name is the program's.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import runpy
import sys
from collections.abc import Sequence

from absl import flags

import gin_configs
from launch import devices

MISSING = (
    "T5X is not installed: pip install -e '.[t5x]' and pip install --no-deps -r launch/t5x/requirements.txt, or, where git is"
    " not reachable, put a checkout of it on PYTHONPATH: see 'T5X' in WORKSPACE.md"
)


def main(argv: Sequence[str]) -> None:
    """Joins the other processes, then runs the program that `argv` names."""
    program, *arguments = argv or [""]
    if not program.startswith("t5x."):
        sys.exit(
            f"found {program!r}, wanted a program of T5X first: t5x.train, t5x.eval or t5x.infer"
        )
    if importlib.util.find_spec("t5x") is None:
        sys.exit(MISSING)
    try:
        joined = devices.processes(os.environ)
    except ValueError as error:
        sys.exit(f"Error: {error}")
    devices.start(joined)
    import gin

    gin.add_config_file_search_path(str(pathlib.Path(gin_configs.__file__).parent.parent))
    for flag in list(flags.FLAGS.flags_by_module_dict()[devices.__name__]):
        delattr(flags.FLAGS, flag.name)  # t5x.train has flags of the same names
    sys.argv = [program, *arguments]
    runpy.run_module(program, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
