r"""Reports what a study has found: the paper's findings tested, figures, and a table of every cell.

In short:
  python -m launch.report --study=/data/study

The same by gin, where everything can be set (gin_configs/runs/report.gin lists the macros):
  python -m launch.report --gin_file=gin_configs/runs/report.gin --gin.STUDY_DIR='"/data/study"' \
    --gin.OUTPUT_DIR='"/data/report"'

It reads scores and manifests alone, works with what is there of a study that runs, and makes no use of accelerators. The report is a
folder: index.html, which needs no network, the same as report.md, and all numbers as cells.csv, references.csv and report.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from launch import command, devices, gin_config

if TYPE_CHECKING:  # the library brings jax, which --help does without
    from merging.report import Report

RUN_FILE = "gin_configs/runs/report.gin"

flags.adopt_module_key_flags(gin_config)


def define_flags() -> None:
    """Not at import, since other commands have flags of these names."""
    flags.DEFINE_string("study", None, "Folder of the study; short for --gin.STUDY_DIR.")
    flags.DEFINE_string(
        "output", None, "Folder to be made, default `report` in it; short for --gin.OUTPUT_DIR."
    )


def main(joined: devices.Processes) -> None:
    """Reports as the flags say."""
    values = flags.FLAGS
    if joined.count > 1:
        raise ValueError(f"report runs in one process, not {joined.count}: start it once")
    files, bindings = gin_config.shorthand(
        {"STUDY_DIR": values.study, "OUTPUT_DIR": values.output},
        gin_config.GIN_FILE.value,
        run_file=RUN_FILE,
    )
    bindings += gin_config.GIN_BINDINGS.value
    resolved = configured(files, bindings, search_paths=gin_config.GIN_SEARCH_PATHS.value)
    report(resolved, is_dry_run=gin_config.DRY_RUN.value)


def configured(
    files: Sequence[str], bindings: Sequence[str], *, search_paths: Sequence[str] = (".",)
) -> gin_config.Resolved:
    """What gin files and bindings say about a report."""
    from merging.report import report as stage

    gin_config.register(stage, name="report")
    gin_config.parse(files, bindings, search_paths=search_paths)
    return gin_config.resolve(stage, name="report")


def report(resolved: gin_config.Resolved, *, is_dry_run: bool = False) -> Report | None:
    """Prints the configuration, makes the report, and prints what it says, which it returns; None after a dry run."""
    from merging import report as stage
    from merging.grid import results

    print(f"{resolved.text}\n", flush=True)
    if is_dry_run:
        found = results.read(resolved.arguments["study_dir"])
        print(f"scores of {found.is_there.sum()} of {len(found.rows)} models")
        return None
    made = stage.report(**resolved.arguments)
    print(made.describe(), flush=True)
    return made


if __name__ == "__main__":
    define_flags()
    command.run(main)
