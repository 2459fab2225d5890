r"""Scores models on tasks: ranked choices, generated answers, losses.

  python -m launch.evaluate --gin_file=gin_configs/runs/evaluate.gin --gin.INITIAL_CHECKPOINT_PATH='"/data/expert"' \
    --gin.MIXTURE_OR_TASK_NAME='"held_out_mini"' --gin.OUTPUT_DIR='"/data/scores"'

The same, in short:
  python -m launch.evaluate --checkpoint=/data/expert --tasks=held_out_mini --output=/data/scores

Several models, a sample of the examples, and each example on disk:
  python -m launch.evaluate --checkpoint=/data/a,/data/b --tasks=held_in_mini,held_out_mini --output=/data/scores \
    --gin.LIMIT=100 --gin.WRITE_EXAMPLES=True

Tasks of lm-evaluation-harness (extra `peers`), its own or those defined in a folder; the output holds harness.json:
  python -m launch.evaluate --checkpoint=/data/expert --harness_tasks=mine --harness_path=/data/definitions --output=/data/scores

gin_configs/runs/evaluate.gin lists the macros, and --dry_run prints the plan. A run that was ended goes on by the same command.
"""

from __future__ import annotations

import gc
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from launch import command, devices, gin_config, preemption
from launch.progress import Evaluating

if TYPE_CHECKING:  # the library brings jax, which --help does without
    from launch.evaluation import Examples
    from merging.evaluate import Report, Settings
    from merging.evaluation.collect import Score

RUN_FILE = "gin_configs/runs/evaluate.gin"

flags.adopt_module_key_flags(gin_config)
flags.adopt_module_key_flags(devices)


def define_flags() -> None:
    """Not at import, since other commands have flags of these names."""
    flags.DEFINE_list(
        "checkpoint", None, "Folders, with commas between; short for --gin.CHECKPOINTS."
    )
    flags.DEFINE_list(
        "tasks",
        None,
        "Mixtures or tasks, with commas between; short for --gin.MIXTURE_OR_TASK_NAME.",
    )
    flags.DEFINE_string("output", None, "Folder to be made; short for --gin.OUTPUT_DIR.")
    flags.DEFINE_list("harness_tasks", None, "Tasks of lm-evaluation-harness, in place of ours.")
    flags.DEFINE_string(
        "harness_path",
        None,
        "A folder with definitions of them; the harness's own are then not known.",
    )


def main(joined: devices.Processes) -> None:
    """Evaluates as the flags say."""
    values = flags.FLAGS
    if values.tasks and values.harness_tasks:
        raise ValueError(
            "give --tasks, ours, or --harness_tasks, and not both: each has a run and an output of its own"
        )
    if values.harness_path and not values.harness_tasks:
        raise ValueError(
            "--harness_path says where tasks are defined: name those to be run by --harness_tasks"
        )
    files, bindings = gin_config.shorthand(
        {
            "CHECKPOINTS": values.checkpoint,
            "MIXTURE_OR_TASK_NAME": values.tasks or values.harness_tasks,
            "OUTPUT_DIR": values.output,
        },
        gin_config.GIN_FILE.value,
        run_file=RUN_FILE,
    )
    bindings += gin_config.GIN_BINDINGS.value
    resolved = configured(files, bindings, search_paths=gin_config.GIN_SEARCH_PATHS.value)
    if values.harness_tasks:
        harness_evaluate(resolved, joined, values.harness_path, is_dry_run=gin_config.DRY_RUN.value)
    else:
        evaluate(resolved, joined, is_dry_run=gin_config.DRY_RUN.value)


def configured(
    files: Sequence[str], bindings: Sequence[str], *, search_paths: Sequence[str] = (".",)
) -> gin_config.Resolved:
    """What gin files and bindings say: arguments of the stage, of its examples and of the tasks, under these names."""
    import tasks
    from launch.evaluation import Examples
    from merging.evaluate import Settings

    gin_config.register(Settings, name="evaluate")
    gin_config.register(Examples, name="examples")
    gin_config.register(tasks.register, name="register")
    gin_config.register_models()
    gin_config.register_values(named_checkpoints)
    gin_config.parse(
        files,
        bindings,
        search_paths=search_paths,
        either={"INITIAL_CHECKPOINT_PATH": "CHECKPOINTS"},
    )
    arguments: dict[str, Any] = {
        "tasks": gin_config.resolve(tasks.register, name="register").arguments,
        "examples": Examples(**gin_config.resolve(Examples, name="examples").arguments),
    }
    resolved = gin_config.resolve(Settings, name="evaluate")
    arguments["settings"] = Settings(**resolved.arguments)
    return gin_config.Resolved(arguments=arguments, text=resolved.text)


def named_checkpoints(
    initial_checkpoint_path: str | None, checkpoints: Sequence[str] | Mapping[str, str] | None
) -> dict[str, str]:
    """Each folder by the name that was given, or else by its own: of one checkpoint, or of several.

    Raises ValueError for two of one name.
    """
    if (initial_checkpoint_path is None) == (checkpoints is None):
        raise ValueError("give INITIAL_CHECKPOINT_PATH, or CHECKPOINTS, and not both")
    if isinstance(checkpoints, Mapping):
        return dict(checkpoints)
    checkpoints = [initial_checkpoint_path] if checkpoints is None else checkpoints
    found = {pathlib.PurePosixPath(path).name: path for path in checkpoints}
    if len(found) < len(checkpoints):
        raise ValueError(
            f"two of the folders {', '.join(checkpoints)} have one name: give CHECKPOINTS as {{name: folder}}"
        )
    return found


def evaluate(
    resolved: gin_config.Resolved, joined: devices.Processes, *, is_dry_run: bool = False
) -> Report | None:
    """Prints configuration and plan, evaluates, and prints the scores; returns the report, None after a dry run."""
    from launch.evaluation import evaluation_tasks
    from merging import evaluate as stage

    command.quiet_libraries()
    asked = resolved.arguments["settings"]
    registered = with_vocabulary(resolved.arguments["tasks"], asked)
    tasks, identity = evaluation_tasks(resolved.arguments["examples"], registered)
    planned = stage.plan(asked, tasks, tasks_identity=identity)
    is_shown = joined.index == 0
    if is_shown:
        print(f"{resolved.text}\n{planned.describe()}\n", flush=True)
    if is_dry_run:
        return None
    gc.freeze()  # what imports made stays out of the collector's way
    shown = Evaluating(models=len(planned.configs), is_shown=is_shown)
    with preemption.ending(shown.log, joined):
        report = stage.run(
            planned,
            config_text=resolved.text,
            progress=shown,
            log=shown.log,
            should_stop=preemption.should_stop(joined),
        )
    if is_shown:
        print(described(report, planned), flush=True)
    return report


def harness_evaluate(
    resolved: gin_config.Resolved,
    joined: devices.Processes,
    include_path: str | None = None,
    *,
    is_dry_run: bool = False,
) -> dict[str, Any] | None:
    """Prints configuration and the harness's tables of its tasks; returns its results by model, None after a dry run."""
    try:
        from launch import harness
    except ImportError as error:
        raise ValueError(
            "tasks of lm-evaluation-harness need it: pip install -e '.[peers]'"
        ) from error
    from tasks import vocabularies

    command.quiet_libraries()
    asked, examples = resolved.arguments["settings"], resolved.arguments["examples"]
    refuse_in_harness(asked, examples)
    echo = print if joined.index == 0 else lambda text: None
    echo(resolved.text)
    names = examples.mixture_or_task_name
    spec = with_vocabulary(resolved.arguments["tasks"], asked)["vocabulary"]
    if spec is None:
        from tasks.miniature import vocabulary

        made = vocabulary()
    else:
        made = vocabularies.load(spec)
    return harness.evaluate(
        asked,
        harness.Asked(
            names=[names] if isinstance(names, str) else names,
            include_path=include_path,
            limit=examples.limit,
            few_shot=examples.few_shot,
            seed=examples.seed,
        ),
        vocabulary=made,
        vocabulary_digest=vocabularies.digest(made),
        config_text=resolved.text,
        is_dry_run=is_dry_run,
        echo=echo,
    )


def refuse_in_harness(asked: Settings, examples: Examples) -> None:
    """Raises ValueError for what was set and says nothing to tasks of the harness, whose definitions say it themselves."""
    ours = {
        "NUM_PROMPTS": (examples, "num_prompts"),
        "SPLIT": (examples, "split"),
        "MEASURE": (examples, "measure"),
        "TRUNCATION": (examples, "truncation"),
        "NORMALIZATION": (asked, "normalization"),
        "WRITE_EXAMPLES": (asked, "write_examples"),
    }
    given = [
        name
        for name, (where, field) in ours.items()
        if getattr(where, field) != getattr(type(where), field)
    ]
    if given:
        raise ValueError(
            f"{', '.join(given)} can't be combined with --harness_tasks, whose definitions say it: leave it out"
        )


def with_vocabulary(registered: Mapping[str, Any], asked: Any) -> dict[str, Any]:
    """The arguments of `tasks.register`; a vocabulary that was not named is the first model's, where it lies beside it as a file."""
    from etils import epath

    from merging.checkpoints.format import CheckpointError
    from merging.models import model_file

    registered = dict(registered)
    if registered.get("vocabulary") is None:
        folder = epath.Path(next(iter(asked.checkpoints.values())))
        try:
            known = model_file.describe(folder).vocabulary
        except CheckpointError:
            known = None  # a foreign checkpoint, whose MODEL was given
        if known is not None and known.path is not None:
            registered["vocabulary"] = str(known.path)
    return registered


# ---- the table ----------------------------------------------------------------------------------------------------


def described(report: Report, planned: Any) -> str:
    """The scores in a table, a line for each model, task and metric; over several prompts the mean and their spread."""
    from launch.tasks import table

    head = ["model", "task", "metric", "score", "stderr", "prompts", "spread", "chance", "examples"]
    is_cut = any(score.cut_inputs or score.cut_targets for score in report.scores)
    rows = [head + ["cut inputs", "cut targets"] * is_cut]
    groups: dict[tuple[str, str, str], list[Score]] = {}
    for score in report.scores:
        groups.setdefault((score.model, score.task, score.metric), []).append(score)
    for (model, task, metric), scores in groups.items():
        values = [score.value for score in scores]
        n = len(values)
        mean = sum(values) / n
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else None
        stderr = math.sqrt(sum(score.stderr**2 for score in scores)) / n
        chance = scores[0].chance
        rows.append(
            [
                model,
                task,
                metric,
                f"{mean:.4f}",
                "" if math.isnan(stderr) else f"{stderr:.4f}",
                str(n),
                "" if spread is None else f"{spread:.4f}",
                "" if chance is None else f"{chance:.4f}",
                f"{sum(score.count for score in scores):,}",
            ]
        )
        if is_cut:
            rows[-1] += [
                f"{sum(score.cut_inputs for score in scores):,}",
                f"{sum(score.cut_targets for score in scores):,}",
            ]
    told = "\n".join(table(rows))
    output = planned.settings.output_dir
    rate = report.examples / report.seconds if report.seconds else 0
    done = (
        f"Nothing to do: {output} holds these scores already."
        if report.was_done
        else f"{report.examples:,} examples in {report.seconds:.1f} s ({rate:,.0f}/s, compiling and reading included), to {output}"
    )
    lines = [told, done]
    if is_cut:
        lines.append("cut inputs, cut targets: examples that lost tokens to TASK_FEATURE_LENGTHS")
    if report.ties:
        lines.append(
            f"{report.ties:,} examples had several best choices of equal score: the first of them counts"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    define_flags()
    command.run(main)
