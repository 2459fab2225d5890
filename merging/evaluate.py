"""The evaluate stage: models from disk, one after another through one evaluator, and their scores to disk.

The output holds scores.jsonl and, where asked for, every example; it has its name when all is there. A run that was ended goes on
behind the last task that was whole: the lines are then those of a run that was not, but for the seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any

from etils import epath

from merging import manifest
from merging.checkpoints import open_checkpoint
from merging.engine import hosts
from merging.evaluation.collect import (
    SCORES,
    Result,
    Score,
    ScoresFile,
    total_ties,
    write_examples,
)
from merging.evaluation.evaluator import Evaluator, Options
from merging.evaluation.examples import Task
from merging.interrupted import Interrupted, ShouldStop, never
from merging.models import model_file
from merging.models.config import DecoderConfig
from merging.models.families import is_prefix_lm, model_of
from merging.models.parameters import read_params
from merging.models.trees import as_model
from merging.partitioning import MeshShape, mesh_of

# Tokens of one model, without padding and what is generated, after which its scores so far are put on disk, at the next end
# of a task.
SAVE_TOKENS = 4_000_000

# The most tokens of a row where neither user nor model says it.
ROW_LENGTH = 2_048

# (what is evaluated, examples done, of how many)
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to evaluate and how.

    Attributes:
      output_dir: folder to be made.
      checkpoints: folder of each model by the id that its scores have.
      model: configuration of all of them; None: each checkpoint says it.
      params_path: where the parameters are in a train state.
      mesh: how devices are used; None: all of them along the data axis.
      dtype, param_dtype: of activations, and of parameters in memory; None: as the configuration has them.
      normalization, batch_tokens, shapes, vocabulary_chunks: see `evaluator.Options`.
      row_length: the most tokens of a prompt with a choice, or with what is generated; None: ROW_LENGTH, or as many as the model
        has learnt where these are fewer.
      prefix_lm: prompts see themselves in both directions; None: where the model is PaLM, as it is trained here.
      write_examples: every example with its prediction too.
    """

    output_dir: epath.PathLike
    checkpoints: Mapping[str, epath.PathLike]
    model: DecoderConfig | None = None
    params_path: str | None = None
    mesh: MeshShape | None = None
    dtype: str | None = None
    param_dtype: str | None = None
    normalization: str = "sum"
    row_length: int | None = None
    batch_tokens: int = 4_096
    shapes: int = 4
    vocabulary_chunks: int = 1
    prefix_lm: bool | None = None
    write_examples: bool = False

    def config_of(self, checkpoint: epath.PathLike) -> DecoderConfig:
        """The configuration of the model in a folder. Raises CheckpointError where nothing says it."""
        given = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        changes = {name: value for name, value in given.items() if value is not None}
        if self.model is None:
            return model_file.describe(checkpoint, **changes).config
        return dataclasses.replace(self.model, **changes)

    def options(self, config: DecoderConfig) -> Options:
        """How a model of this configuration is run. Raises ValueError for rows longer than it has learnt."""
        learnt = config.max_positions
        row_length = self.row_length
        if row_length is None:
            row_length = ROW_LENGTH if learnt is None else min(ROW_LENGTH, learnt)
        if learnt is not None and row_length > learnt:
            raise ValueError(
                f"ROW_LENGTH is {row_length:,}, and the model has learnt {learnt:,} positions (max_position_embeddings of its"
                " config.json): give at most so many, or None, which is that"
            )
        prefix_lm = is_prefix_lm(config) if self.prefix_lm is None else self.prefix_lm
        return Options(
            normalization=self.normalization,
            bidirectional=prefix_lm,
            row_length=row_length,
            batch_tokens=self.batch_tokens,
            shapes=self.shapes,
            vocabulary_chunks=self.vocabulary_chunks,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be done: everything that could be refused has been."""

    settings: Settings
    tasks: Sequence[Task]
    configs: Mapping[str, DecoderConfig]
    identity: Mapping[str, Any]

    @property
    def examples(self) -> int:
        """Of one model."""
        return sum(len(task.examples) for task in self.tasks)

    def describe(self) -> str:
        """The plan in a few lines."""
        kinds = ", ".join(
            f"{sum(task.kind == kind for task in self.tasks)} {words}"
            for kind, words in _KINDS.items()
            if any(task.kind == kind for task in self.tasks)
        )
        lines = [
            f"{_number(self.configs, 'model')} on {_number(self.tasks, 'task')} ({kinds}), {self.examples:,} examples each,"
            f" to {self.settings.output_dir}"
        ]
        cut_inputs = sum(task.cut_inputs for task in self.tasks)
        cut_targets = sum(task.cut_targets for task in self.tasks)
        if cut_inputs or cut_targets:
            lines.append(
                f"cut to TASK_FEATURE_LENGTHS: the inputs of {cut_inputs:,} examples, choices of {cut_targets:,}"
            )
        return "\n".join(lines)


def _number(things: Sized, name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


_KINDS = {"rank": "ranked", "generate": "generated", "loss": "of loss"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What was done.

    Attributes:
      scores: of all models and tasks.
      ties: ranked examples whose best choices were equal, of all models and tasks.
      examples: that this run evaluated.
      seconds: that it took, reading the models included.
      was_done: the output was there already.
    """

    scores: Sequence[Score]
    ties: int = 0
    examples: int = 0
    seconds: float = 0.0
    was_done: bool = False


def plan(settings: Settings, tasks: Sequence[Task], *, tasks_identity: Mapping[str, Any]) -> Plan:
    """Looks at every checkpoint's header. `tasks_identity`: JSON, all that the tasks depend on.

    Raises ValueError or CheckpointError for what can't be evaluated.
    """
    configs, identity = described_models(settings)
    largest = _largest_token(tasks)
    for model_id, config in configs.items():
        if largest >= config.vocab_size:
            raise ValueError(
                f"model {model_id} has a vocabulary of {config.vocab_size:,} and the tasks have a token {largest:,}: give the"
                " VOCABULARY that the model was trained with"
            )
    identity = {"stage": "evaluate", **identity, "tasks": _as_json(tasks_identity)}
    return Plan(settings=settings, tasks=tasks, configs=configs, identity=identity)


def described_models(settings: Settings) -> tuple[dict[str, DecoderConfig], dict[str, Any]]:
    """Each model's configuration, and JSON that says all that scores depend on besides the tasks: models and settings.

    Raises ValueError or CheckpointError for models that can't be evaluated, and for an output that is or lies in one of them.
    """
    if not settings.checkpoints:
        raise ValueError(
            "there is no model to evaluate: give CHECKPOINTS or INITIAL_CHECKPOINT_PATH"
        )
    configs, inputs = {}, {}
    for model_id, path in settings.checkpoints.items():
        config = settings.config_of(path)
        reader = open_checkpoint(epath.Path(path), params_path=settings.params_path)
        try:
            as_model(reader, config)
            inputs[model_id] = {"path": str(path), "digest": reader.digest()}
        finally:
            reader.close()
        configs[model_id] = config
        settings.options(config)
    manifest.check_apart(epath.Path(settings.output_dir), list(settings.checkpoints.values()))
    plain = dataclasses.asdict(settings)
    for name in (
        "output_dir",
        "checkpoints",
        "model",
        "mesh",
    ):  # where, and what the models are told by
        del plain[name]
    identity = {
        "models": inputs,
        "configs": {model_id: dataclasses.asdict(config) for model_id, config in configs.items()},
        "settings": plain,
    }
    return configs, _as_json(identity)


def run(
    planned: Plan,
    *,
    config_text: str = "",
    progress: Progress = lambda what, done, total: None,
    log: Callable[[str], None] = lambda text: None,
    should_stop: ShouldStop = never,
) -> Report:
    """Evaluates what is missing.

    Args:
      config_text: goes into the manifest.
      progress: hears of examples.
      log: hears of what is not as usual.
      should_stop: asked between batches, the same on all hosts.

    Raises Interrupted where asked to stop: what was saved by then is gone on with.
    """
    settings = planned.settings
    output = epath.Path(settings.output_dir)
    if manifest.is_done(output, planned.identity):
        scores = ScoresFile(output / SCORES).scores
        return Report(scores=scores, ties=total_ties(scores), was_done=True)
    with contextlib.closing(manifest.Staging(output)) as staging:
        return _run(planned, staging, config_text, progress, log, should_stop)


def _run(
    planned: Plan,
    staging: manifest.Staging,
    config_text: str,
    progress: Progress,
    log: Callable[[str], None],
    should_stop: ShouldStop,
) -> Report:
    settings = planned.settings
    started = time.monotonic()
    is_main = hosts.is_main()
    if is_main and staging.resume(planned.identity):
        log(f"goes on from {staging.folder}")
    hosts.wait_for_all("staged")
    file = ScoresFile(staging.folder / SCORES)
    mesh = mesh_of(settings.mesh)
    evaluators: dict[DecoderConfig, Evaluator] = {}
    examples = 0
    total = planned.examples
    for model_id, path in settings.checkpoints.items():
        config = planned.configs[model_id]
        if config not in evaluators:
            evaluators[config] = Evaluator(
                model_of(config), planned.tasks, mesh=mesh, options=settings.options(config)
            )
        evaluator = evaluators[config]
        missing = [task for task in planned.tasks if (model_id, *task.key) not in file.done]
        if not missing:
            continue
        params = read_params(path, config, mesh, params_path=settings.params_path)
        done = total - sum(len(task.examples) for task in missing)
        for part in _parts(evaluator, missing):
            if should_stop():
                raise Interrupted(f"stopped at {model_id}, {done:,} of {total:,} examples")
            before = done
            done += sum(len(task.examples) for task in part)
            told = functools.partial(_told, progress, should_stop, model_id, before, done, total)
            results = evaluator(params, model_id, tasks=part, progress=told)
            examples += done - before
            if is_main:
                _write(staging.folder, file, model_id, results, settings)
            hosts.wait_for_all("scores")
    if is_main:
        staging.commit(
            manifest.provenance(planned.identity)
            | {"config": config_text, "examples": total, "ties": total_ties(file.scores)}
        )
    hosts.wait_for_all("committed")
    scores = file.scores if is_main else ScoresFile(staging.output / SCORES).scores
    return Report(
        scores=scores,
        ties=total_ties(scores),
        examples=examples,
        seconds=time.monotonic() - started,
    )


def _told(
    progress: Progress,
    should_stop: ShouldStop,
    model_id: str,
    before: int,
    after: int,
    total: int,
    examples: int,
) -> None:
    """Of a part, (before, after] of the examples: once it is whole it is saved first."""
    progress(model_id, before + examples, total)
    if before + examples < after and should_stop():
        raise Interrupted(f"stopped at {model_id}, {before:,} of {total:,} examples")


def _write(
    folder: epath.Path,
    file: ScoresFile,
    model_id: str,
    results: Sequence[Result],
    settings: Settings,
) -> None:
    if settings.write_examples:
        for each in results:
            write_examples(folder, model_id, each)
    file.append(results)


def _parts(evaluator: Evaluator, tasks: Sequence[Task]) -> Iterator[list[Task]]:
    """The tasks in runs of at least SAVE_TOKENS, after each of which the scores are saved."""
    part: list[Task] = []
    for task in tasks:
        part.append(task)
        if evaluator.tokens(part) >= SAVE_TOKENS:
            yield part
            part = []
    if part:
        yield part


def _largest_token(tasks: Sequence[Task]) -> int:
    return max(
        int(tokens.max())
        for task in tasks
        for example in task.examples
        for tokens in (example.prompt, *example.choices)
    )


def _as_json(value: Any) -> Any:
    """Tuples as lists, as JSON has them; paths and the like as text."""
    if isinstance(value, Mapping):
        return {str(k): _as_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
