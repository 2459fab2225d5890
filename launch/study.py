r"""Runs a study: bases, experts, merges and their scores, and the report.

  python -m launch.study --study=quick --output=/data/quick
  python -m launch.study --gin_file=gin_configs/studies/miniature.gin --gin.OUTPUT_DIR='"/data/miniature"'

The same command goes on after anything. One phase of a study, by the second of eight workers (as indexed jobs have them):
  python -m launch.study --study=paper --output=gs://bucket/paper --gin.PHASE='"cells"' --worker=1 --num_workers=8

--dry_run prints what a study is made of, --status what of it is there, --plan what it will cost. gin_configs/runs/study.gin lists
the macros. A phase that finds an earlier one undone names what it lacks and ends with exit code 3; launch.report reports on
what is there of a study that runs.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from launch import command, devices, exit_codes, gin_config, preemption
from launch.chips import CHIPS
from launch.phases import PHASES, REPORT
from launch.progress import Studying
from launch.study_data import Sources, check_mixtures, study_data

if TYPE_CHECKING:  # the library brings jax, which --help does without
    from merging.study import Plan

RUN_FILE = "gin_configs/runs/study.gin"

flags.adopt_module_key_flags(gin_config)
flags.adopt_module_key_flags(devices)


def define_flags() -> None:
    """Not at import, since other commands have flags of these names."""
    flags.DEFINE_string("study", None, "A file of gin_configs/studies without .gin.")
    flags.DEFINE_string("output", None, "The study's folder; short for --gin.OUTPUT_DIR.")
    flags.DEFINE_integer("worker", 0, "Which worker this is, from 0.", lower_bound=0)
    flags.DEFINE_integer("num_workers", 1, "How many share a phase.", lower_bound=1)
    flags.DEFINE_bool(
        "status", False, "Print what is there, what is missing and the time left, and end."
    )
    flags.DEFINE_bool("plan", False, "Print what it will cost, and end.")
    flags.DEFINE_enum("chip", "v5e", sorted(CHIPS), "For --plan: whose published peak.")
    flags.DEFINE_float("mfu", 0.4, "For --plan: the share of the peak that is reached.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What of a study is run.

    Attributes:
      phase: bases, experts, cells or report; None: all, in this order.
    """

    phase: str | None = None

    def __post_init__(self) -> None:
        if self.phase not in (None, *PHASES):
            raise ValueError(
                f"PHASE is {self.phase!r}: it is one of {', '.join(PHASES)}, or None for all"
            )

    @property
    def phases(self) -> tuple[str, ...]:
        """In their order."""
        return PHASES if self.phase is None else (self.phase,)


def main(joined: devices.Processes) -> None:
    """Runs what the flags say."""
    values = flags.FLAGS
    files, bindings = gin_config.shorthand(
        {"OUTPUT_DIR": values.output},
        gin_config.GIN_FILE.value,
        run_file=RUN_FILE,
        more=[f"gin_configs/studies/{values.study}.gin"] if values.study else [],
    )
    bindings += gin_config.GIN_BINDINGS.value
    resolved = configured(files, bindings, search_paths=gin_config.GIN_SEARCH_PATHS.value)
    if values.plan:
        print(priced(resolved, values.chip, values.mfu))
        return
    if values.status:
        from launch.study_status import described

        planned = plan(resolved)
        if joined.index == 0:
            print(f"{planned.describe()}\n\n{described(planned)}")
        return
    study(
        resolved,
        joined,
        worker=values.worker,
        num_workers=values.num_workers,
        is_dry_run=gin_config.DRY_RUN.value,
    )


def configured(
    files: Sequence[str], bindings: Sequence[str], *, search_paths: Sequence[str] = (".",)
) -> gin_config.Resolved:
    """What gin files and bindings say: the stage's settings, its sources, what is run and the tasks, under these names."""
    import tasks
    from merging.study import Settings, Training
    from merging.training.optimizer import adafactor, adamw

    gin_config.register(Settings, name="study")
    gin_config.register(Sources, name="sources")
    gin_config.register(Run, name="run")
    gin_config.register(tasks.register, name="register")
    gin_config.register_methods()
    gin_config.register_models()
    gin_config.register_values(adamw, adafactor)
    gin_config.register_values(Training)
    gin_config.register_optax()
    gin_config.parse(files, bindings, search_paths=search_paths)
    arguments: dict[str, Any] = {
        "tasks": gin_config.resolve(tasks.register, name="register").arguments,
        "sources": Sources(**gin_config.resolve(Sources, name="sources").arguments),
        "run": Run(**gin_config.resolve(Run, name="run").arguments),
    }
    resolved = gin_config.resolve(Settings, name="study")
    arguments["settings"] = Settings(**resolved.arguments)
    return gin_config.Resolved(arguments=arguments, text=resolved.text)


def plan(resolved: gin_config.Resolved) -> Plan:
    """What must be. Raises ValueError for settings that make no study."""
    from merging import study as stage

    data = study_data(resolved.arguments["sources"], resolved.arguments["tasks"])
    return stage.plan(resolved.arguments["settings"], data)


def priced(resolved: gin_config.Resolved, chip: str, mfu: float) -> str:
    """What the study is made of and what it will cost."""
    from launch.study_price import described, prices

    sources, planned = resolved.arguments["sources"], plan(resolved)
    return f"{planned.describe()}\n\n{described(prices(planned, sources), chip, mfu)}"


def study(
    resolved: gin_config.Resolved,
    joined: devices.Processes,
    *,
    worker: int = 0,
    num_workers: int = 1,
    is_dry_run: bool = False,
) -> None:
    """Prints the study, makes what is missing, and says where the report is."""
    from merging import study as stage

    command.quiet_libraries()
    is_shown = joined.index == 0
    planned = plan(resolved)
    check_mixtures(planned.mixtures, resolved.arguments["tasks"])
    if is_shown and worker == 0:
        print(f"{planned.describe()}\n", flush=True)
    if is_dry_run:
        return
    gc.freeze()  # what imports made stays out of the collector's way
    shown = Studying(is_shown=is_shown)
    phases = resolved.arguments["run"].phases
    try:
        with preemption.ending(shown.log, joined):
            report = stage.run(
                planned,
                phases=[phase for phase in phases if phase in stage.PHASES],
                worker=worker,
                num_workers=num_workers,
                config_text=resolved.text,
                progress=shown,
                log=shown.log,
                write_metrics=shown.metrics,
                should_stop=preemption.should_stop(joined),
            )
        is_reported = REPORT in phases and worker == 0
        if is_reported:
            stage.check_done(planned)
    except stage.InputMissing as missing:
        shown.log(f"Error: {missing}")
        devices.end(exit_codes.INPUT_MISSING, joined)
    if not is_shown:
        return
    print(report.describe(), flush=True)
    if is_reported:
        from merging.report import report as make_report

        print(make_report(planned.places.root).describe(), flush=True)


if __name__ == "__main__":
    define_flags()
    command.run(main)
