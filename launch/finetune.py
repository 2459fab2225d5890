r"""Trains a model on mixtures of tasks: pretraining, instruction tuning, experts, multitask models.

  python -m launch.finetune --gin_file=gin_configs/runs/pretrain.gin --gin_file=gin_configs/models/mini_xs.gin \
    --gin.OUTPUT_DIR='"/data/base"'
  python -m launch.finetune --gin_file=gin_configs/runs/expert.gin --gin.MIXTURE_OR_TASK_NAME='"sentiment_mini"' \
    --gin.INITIAL_CHECKPOINT_PATH='"/data/base"' --gin.OUTPUT_DIR='"/data/sentiment"'

Several experts, each in OUTPUT_DIR/name, four by one step:
  python -m launch.finetune --gin_file=gin_configs/runs/expert.gin \
    --gin.MIXTURES='["sentiment_mini", "paraphrase_mini", "summarization_mini", "extractive_qa_mini"]' \
    --gin.EXPERTS_AT_ONCE=4 --gin.INITIAL_CHECKPOINT_PATH='"/data/base"' --gin.OUTPUT_DIR='"/data/experts"'

A run that was ended goes on by the same command; SIGTERM ends it after saving (exit code 143). gin_configs/runs/finetune.gin
lists the macros, and --dry_run prints the plan.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from launch import command, devices, gin_config, preemption
from launch.mixtures import Mixtures, mixtures
from launch.observers import Observers
from launch.progress import Training
from launch.validation import ValidationTasks, validation

if TYPE_CHECKING:  # the library brings jax, which --help does without
    from merging.finetune import Report

flags.adopt_module_key_flags(gin_config)
flags.adopt_module_key_flags(devices)


def main(joined: devices.Processes) -> None:
    """Trains as the flags say."""
    resolved = configured(
        gin_config.GIN_FILE.value,
        gin_config.GIN_BINDINGS.value,
        search_paths=gin_config.GIN_SEARCH_PATHS.value,
    )
    finetune(resolved, joined, is_dry_run=gin_config.DRY_RUN.value)


def configured(
    files: Sequence[str], bindings: Sequence[str], *, search_paths: Sequence[str] = (".",)
) -> gin_config.Resolved:
    """What gin files and bindings say: `settings` of the stage, its `mixtures`, `validation`, `observers`, arguments of `tasks`."""
    import tasks
    from merging.finetune import Settings
    from merging.training.optimizer import WeightAveraging, adafactor, adamw

    gin_config.register(Settings, name="finetune")
    gin_config.register(Mixtures, name="mixtures")
    gin_config.register(ValidationTasks, name="validation")
    gin_config.register(Observers, name="observers")
    gin_config.register(tasks.register, name="register")
    gin_config.register_models()
    gin_config.register_values(adamw, adafactor, WeightAveraging)
    gin_config.register_optax()
    gin_config.parse(
        files, bindings, search_paths=search_paths, either={"MIXTURE_OR_TASK_NAME": "MIXTURES"}
    )
    arguments: dict[str, Any] = {
        "tasks": gin_config.resolve(tasks.register, name="register").arguments,
        "mixtures": Mixtures(**gin_config.resolve(Mixtures, name="mixtures").arguments),
    }
    by_tasks = gin_config.resolve(ValidationTasks, name="validation").arguments
    arguments["validation"] = ValidationTasks(**by_tasks)
    observers = gin_config.resolve(Observers, name="observers").arguments
    arguments["observers"] = Observers(**observers)
    resolved = gin_config.resolve(Settings, name="finetune")
    arguments["settings"] = Settings(**resolved.arguments)
    return gin_config.Resolved(arguments=arguments, text=resolved.text)


def finetune(
    resolved: gin_config.Resolved, joined: devices.Processes, *, is_dry_run: bool = False
) -> Report | None:
    """Prints configuration and plan, trains, and prints the report, which it returns; None after a dry run."""
    from merging import finetune as stage

    command.quiet_libraries()
    settings, asked = resolved.arguments["settings"], resolved.arguments["mixtures"]
    is_shown = joined.index == 0
    registered = resolved.arguments["tasks"]
    by_tasks = validation(resolved.arguments["validation"], registered)
    each = mixtures(asked, registered, train_rows=settings.train_steps * settings.batch_size)
    planned = stage.plan(settings, each, is_one=asked.names is None, validation=by_tasks)
    if is_shown:
        print(f"{resolved.text}\n{planned.describe()}\n", flush=True)
    if is_dry_run:
        return None
    gc.freeze()  # what imports made stays out of the collector's way
    observers = resolved.arguments["observers"]
    is_asked = preemption.should_stop(joined)
    with (
        Training(steps=settings.train_steps, is_shown=is_shown) as shown,
        observers.metrics() as write,
        observers.profile() as trace,
    ):

        def write_metrics(name: str, step: int, values: Mapping[str, float]) -> None:
            shown(name, step, values)
            write(name, step, values)

        with preemption.ending(shown.log, joined):
            report = stage.run(
                planned,
                config_text=resolved.text,
                log=shown.log,
                write_metrics=write_metrics,
                should_stop=lambda step: is_asked(),
                trace=trace,
            )
    if is_shown:
        print(report.describe(), flush=True)
    return report


if __name__ == "__main__":
    command.run(main)
