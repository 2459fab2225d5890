"""How the time of a merge falls with the number of processes where storage is what limits it: a pod in small.

    python -m tests.benchmarks.scaling --work_dir=/data/scaling             # a quarter of an hour
    python -m tests.benchmarks.scaling --divisor=128 --processes=1,2 --each=2e6 --all=2e6

The inputs are the paper's top case, 64b and 8 experts with all their layers, in widths `--divisor` times smaller, so that leaves and the
files of the output have its proportions. `launch.merge` runs through `launch.pod.local` in 1, 2, 4 and 8 processes of one device,
in three series, of which a table is printed:

  free   nothing is limited: what the processors of this machine take, which must be little beside the others
  each   each process has a line of `--each` bytes/s to the storage, as hosts of a slice have
  all    all have one line of `--all` bytes/s between them, as the quota of a bucket is

Seconds are the stage's own, from its manifest. The bound is what the line takes for the bytes of the busiest process (each) or of all.
The ideal is the time of one process divided by their number (each), or that time (all). The benchmark fails where outputs differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Sequence

from launch.pod.local import run_local
from merging.models import model_file
from tests import top_case
from tests.benchmarks import merge as bench

SERIES = ("free", "each", "all")
SHARD_BYTES = 5e9  # the default of launch.merge, for models of full width


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A merge by several processes.

    Attributes:
      seconds: of the stage.
      read, sent: bytes by each process; sent: read and written.
      checksums: of the output.
    """

    seconds: float
    read: list[int]
    sent: list[int]
    checksums: dict[str, object]


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(arguments)
    with bench.work_folder(options.work_dir) as folder:
        print(f"{bench.heading('scaling', arguments)}\n")
        inputs = make(folder, options)
        print(f"{inputs.describe()}, by {options.method}.\n", flush=True)
        rates = {"free": 0.0, "each": options.each, "all": options.all}
        rows = []
        for series in options.series:
            rows += [
                *rows_of(series, rates[series], measured(folder, inputs, options, series, rates))
            ]
        heads = "line, processes, merge s, speed-up, MB read by each, bound s, share of the ideal"
        bench.table(heads.split(", "), rows)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--divisor",
        type=int,
        default=32,
        help="of the widths of 64b; parameters fall by its square",
    )
    add(
        "--scanned",
        action="store_true",
        help="layers stacked into one leaf, which hosts do not cut",
    )
    add("--method", default="ties")
    add("--processes", type=lambda text: [*map(int, text.split(","))], default=[1, 2, 4, 8])
    add("--series", type=lambda text: text.split(","), default=list(SERIES), help="with commas")
    add("--each", type=float, default=12e6, help="bytes/s of each process")
    add("--all", type=float, default=48e6, help="bytes/s of all processes together")
    add("--work_dir", type=pathlib.Path, help="keeps the inputs for the next time")
    options = parser.parse_args(arguments)
    if unknown := set(options.series) - set(SERIES):
        parser.error(f"no such series: {', '.join(unknown)}; there are {', '.join(SERIES)}")
    return options


def make(folder: pathlib.Path, options: argparse.Namespace) -> bench.Inputs:
    """The inputs, made unless they are there."""
    model = top_case.config(is_scanned=options.scanned, divisor=options.divisor)
    specs = top_case.leaves(model)
    name = f"64b_by_{options.divisor}{'_scanned' if options.scanned else ''}"
    made = bench.Inputs(folder / name, bench.count(specs), top_case.EXPERTS)
    folder.mkdir(parents=True, exist_ok=True)
    if not made.folder.exists():
        with bench.staged(made) as partial:
            bench.fill(partial, specs)
            for each in partial.folders:
                model_file.write(each, model, model_file.stacked_of(model), None)
    return made


def measured(
    folder: pathlib.Path,
    inputs: bench.Inputs,
    options: argparse.Namespace,
    series: str,
    rates: dict[str, float],
) -> dict[int, Run]:
    """The runs of a series, by the number of processes."""
    runs: dict[int, Run] = {}
    for processes in options.processes:
        runs[processes] = run(folder, inputs, options, series, rates[series], processes)
        bench.log(f"{series}: {processes} processes, {runs[processes].seconds:.1f} s")
    first, *others = runs.values()
    if any(each.checksums != first.checksums for each in others):
        sys.exit(f"{series}: outputs of different numbers of processes differ")
    return runs


def run(
    folder: pathlib.Path,
    inputs: bench.Inputs,
    options: argparse.Namespace,
    series: str,
    bytes_per_s: float,
    processes: int,
) -> Run:
    """One merge. Of the free series there is one before it, so that all programs are in the cache."""
    output, lines = folder / "output", folder / "lines"
    command = [sys.executable, "-m", "tests.benchmarks.limited_merge"]
    command += [str(bytes_per_s), series, str(lines), f"--method={options.method}"]
    command += [f"--base={inputs.base}", f"--experts={','.join(map(str, inputs.experts))}"]
    command += [f"--output={output}"]
    command += [f"--gin.SHARD_BYTES={round(SHARD_BYTES / options.divisor**2)}"]
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    for _ in range(2 if series == "free" else 1):
        for left in (output, output.with_name("output.partial"), lines):
            shutil.rmtree(left, ignore_errors=True)
        lines.mkdir()
        run_local(
            command,
            processes=processes,
            devices=1,
            timeout_s=None,
            env=environment,
            echo=lambda _: None,
        )
    manifest = json.loads((output / "manifest.json").read_text())
    told = [json.loads((lines / f"sent_{i}.json").read_text()) for i in range(processes)]
    return Run(
        seconds=manifest["seconds"],
        read=[each["read"] for each in told],
        sent=[each["read"] + each["written"] for each in told],
        checksums=manifest["checksums"],
    )


def rows_of(series: str, bytes_per_s: float, runs: dict[int, Run]) -> list[list[str]]:
    """Rows of the table; the ideal follows from the smallest number of processes."""
    fewest = min(runs)
    one = runs[fewest].seconds
    rows = []
    for processes, found in runs.items():
        ideal = one if series == "all" else one * fewest / processes
        least, most = (f"{bound(found.read) / 1e6:,.0f}" for bound in (min, max))
        sent = sum(found.sent) if series == "all" else max(found.sent)
        rows.append(
            [
                series if series == "free" else f"{series}, {bytes_per_s / 1e6:g} MB/s",
                str(processes),
                f"{found.seconds:.1f}",
                f"{one / found.seconds:.2f}",
                least if least == most else f"{least} to {most}",
                f"{sent / bytes_per_s:.1f}" if bytes_per_s else "-",
                f"{ideal / found.seconds:.2f}" if bytes_per_s else "-",
            ]
        )
    return rows


if __name__ == "__main__":
    main()
