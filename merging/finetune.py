"""The finetune stage: from mixtures and a checkpoint to experts. Pretraining, instruction tuning and multitask models are the same.

A run may be ended at any moment by anything: the same command goes on from the last state that is whole, with the same batches,
and gives the same bits. Several experts are trained one after another from one base in memory by one compiled step, or
several at once by one step with an axis over experts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from merging import manifest, partitioning
from merging.checkpoints import open_checkpoint
from merging.checkpoints.storage import LinesFile
from merging.engine import hosts
from merging.models import model_file
from merging.models.config import DecoderConfig, PalmConfig
from merging.models.decoder import Decoder, abstract_params, boxed_params
from merging.models.families import model_of
from merging.models.parameters import as_model, read_params
from merging.partitioning import MeshShape
from merging.paths import is_like, of_tree_path
from merging.training import output
from merging.training.batch import Batch, batch_scores
from merging.training.checkpoints import Checkpoints
from merging.training.feed import Feed, Placement, Source
from merging.training.loop import Loop, Progress, Schedule, Seconds, Values
from merging.training.loss import LossSums, loss_sums
from merging.training.optimizer import Averaging, adamw, averaged_params, freezing
from merging.training.step import TrainState, init_state, train_step

METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"

# (learning rate, a number or a function of the step) -> optimizer
Optimizer = Callable[[Any], optax.GradientTransformation]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """What an expert is trained on; made by who reads text.

    Attributes:
      name: of the mixture, and of the expert's folder where there are several.
      train: (batch_size, host, hosts) -> batches.
      validation: the same, of examples that are not trained on; None: none.
      length: tokens of a row.
      vocab_size: tokens are below it.
      vocabulary: of the tokens, to go along with the parameters.
      identity: JSON, all that the batches depend on.
    """

    name: str
    train: Callable[[int, int, int], Source]
    validation: Callable[[int, int, int], Source] | None = None
    length: int
    vocab_size: int
    vocabulary: model_file.Vocabulary | None = None
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to train and how.

    Attributes:
      output_dir: folder to be made.
      train_steps: of each expert.
      batch_size: rows of a batch, over all devices.
      initial_checkpoint_path: a checkpoint of any format to start from; None: from random parameters.
      params_path: where its parameters are in a train state.
      model: configuration; None: the checkpoint says it.
      optimizer: learning rate -> optax transformation.
      learning_rate: a number, or a function of the step.
      seed: of new parameters and of dropout.
      mesh: how devices are used, all of them unless it is a mesh of some; None: along the data axis.
      dropout_rate, remat, dtype, param_dtype: of the model in this run; None: as its configuration has them.
      z_loss: coefficient; None: the configuration's, or 0.
      clip_norm: of gradients; None: not clipped.
      microbatches, vocabulary_chunks: see `training.step.train_step`.
      averaging: of weights; None: the last ones count.
      frozen: patterns of parameters that stay as they are.
      experts_at_once: how many are trained by one step; 1: one after another.
      log_every, validate_every, checkpoint_every, patience: see `training.loop.Schedule`.
      validation_batches: of each validation.
      keep_checkpoints: how many of the newest stay.
      choose: "last", or "best" on validation.
      keep_state: the last train states stay in the output, to go on from.
      format: "orbax" or "safetensors" (Hugging Face's, where the model is of such a family).
      peak_flops: of one device, in operations a second, for the share of it that was used; None: not told.
    """

    output_dir: epath.PathLike
    train_steps: int
    batch_size: int
    initial_checkpoint_path: epath.PathLike | None = None
    params_path: str | None = None
    model: DecoderConfig | None = None
    optimizer: Optimizer = adamw
    learning_rate: Any = 3e-5
    seed: int = 0
    mesh: MeshShape | jax.sharding.Mesh | None = None
    dropout_rate: float | None = None
    remat: str | None = None
    dtype: str | None = None
    param_dtype: str | None = None
    z_loss: float | None = None
    clip_norm: float | None = 1.0
    microbatches: int = 1
    vocabulary_chunks: int = 1
    averaging: Averaging | None = None
    frozen: Sequence[str] = ()
    experts_at_once: int = 1
    log_every: int = 10
    validate_every: int | None = None
    validation_batches: int = 8
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    choose: str = "last"
    patience: int | None = None
    keep_state: bool = False
    format: str = "orbax"
    peak_flops: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do; all that can be refused without a step has been.

    Attributes:
      mixtures: by the name of the output's folder below `output`; "" for the output itself.
      config: of the model in this run.
      mesh: of devices.
      vocabulary: that goes along with the parameters.
      initial_digest: of the checkpoint.
      is_done: the output is there, made by these settings.
    """

    settings: Settings
    mixtures: Mapping[str, Mixture]
    output: epath.Path
    config: DecoderConfig
    mesh: jax.sharding.Mesh
    vocabulary: model_file.Vocabulary | None
    initial_digest: str | None
    identity: Mapping[str, Any]
    is_done: bool

    @property
    def outputs(self) -> dict[str, epath.Path]:
        """The folder of each expert."""
        return {name: self.output / name if name else self.output for name in self.mixtures}

    @property
    def groups(self) -> list[list[str]]:
        """The experts of each step."""
        names, size = list(self.mixtures), self.settings.experts_at_once
        return [names[i : i + size] for i in range(0, len(names), size)]

    def describe(self) -> str:
        """The plan as text, one fact a line."""
        s = self.settings
        first = next(iter(self.mixtures.values()))
        tokens = s.batch_size * first.length
        at_once = f", {s.experts_at_once} at once" if s.experts_at_once > 1 else ""
        lines = [
            f"trains     {', '.join(m.name for m in self.mixtures.values())}{at_once}",
            f"model      {self.config.num_params():,} parameters: {type(self.config).__name__} of {self.config.num_layers} layers"
            f" of {self.config.embed_dim}, {self.config.dtype}",
            f"from       {s.initial_checkpoint_path or f'random parameters, seed {s.seed}'}",
            f"steps      {s.train_steps:,} of {s.batch_size} rows of {first.length} tokens:"
            f" {s.train_steps * tokens / 1e6:,.1f} M tokens each",
            f"mesh       {partitioning.describe(self.mesh)}",
            f"output     {self.output}",
        ]
        if self.is_done:
            lines.append("done       the output is there already, made so")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a run did.

    Attributes:
      outputs: folder by name of the expert.
      metrics: the last values of each expert, by name.
      steps: taken by this process, of all groups.
      seconds: of the stage.
      spent: where the time of the main thread went.
      tokens_per_s: in the steps, padding included.
      was_done: nothing was done, the output was there.
    """

    outputs: Mapping[str, epath.Path]
    metrics: Mapping[str, Mapping[str, float]]
    steps: int
    seconds: float
    spent: Seconds
    tokens_per_s: float
    was_done: bool

    @property
    def goodput(self) -> float:
        """The share of the time that went into steps."""
        return self.spent.steps / self.seconds if self.seconds else 0.0

    def describe(self) -> str:
        """The report as text."""
        where = ", ".join(str(folder) for folder in self.outputs.values())
        if self.was_done:
            return f"done before: {where}"
        spent = {k: v for k, v in dataclasses.asdict(self.spent).items() if k != "steps"}
        rest = self.seconds - sum(dataclasses.asdict(self.spent).values())
        told = ", ".join(f"{name} {value:.1f}" for name, value in (spent | {"rest": rest}).items())
        lines = [
            f"written    {where}",
            f"time       {self.seconds:.1f} s for {self.steps:,} steps, {self.tokens_per_s:,.0f} tokens/s in them",
            f"goodput    {self.goodput:.0%} of the time in steps; seconds of others: {told}",
        ]
        for name, values in self.metrics.items():
            shown = ("loss", "accuracy", "validation/loss", "validation/accuracy")
            found = ", ".join(f"{key} {values[key]:.4f}" for key in shown if key in values)
            lines.append(f"last       {name or 'expert'}: {found}")
        return "\n".join(lines)


def plan(settings: Settings, mixtures: Sequence[Mixture], *, is_one: bool = True) -> Plan:
    """Checks everything that can be known before the first step.

    Args:
      settings: what to do.
      mixtures: an expert of each.
      is_one: the only mixture's expert is the output itself, not a folder in it.

    Raises ValueError (CheckpointError, OutputError) saying what was found, wanted, where, and what to do.
    """
    _check(settings, mixtures)
    output_dir = epath.Path(settings.output_dir)
    initial = settings.initial_checkpoint_path
    if initial is not None:
        manifest.check_apart(output_dir, [initial])
    config, vocabulary = _model(settings, mixtures)
    _check_model(settings, config)
    mesh = settings.mesh or MeshShape(data=jax.device_count())
    mesh = mesh.mesh() if isinstance(mesh, MeshShape) else mesh
    partitioning.shardings(boxed_params(model_of(config)), mesh)
    Placement(
        mesh,
        rows=settings.batch_size,
        length=mixtures[0].length,
        experts=settings.experts_at_once if settings.experts_at_once > 1 else None,
    )
    initial_digest = None
    if initial is not None:
        with contextlib.closing(
            open_checkpoint(initial, params_path=settings.params_path)
        ) as reader:
            initial_digest = reader.digest()
            as_model(reader, config)
    named = {"" if is_one and len(mixtures) == 1 else m.name: m for m in mixtures}
    identity = _identity(settings, mixtures, config, initial_digest)
    is_done = manifest.is_done(output_dir, identity)
    if not is_done:
        nbytes = config.num_params() * config.parameter_dtype.itemsize * len(mixtures)
        if settings.checkpoint_every is not None:
            nbytes += 3 * nbytes * (settings.keep_checkpoints + 1)
        manifest.check_free_space(output_dir, nbytes)
    return Plan(
        settings=settings,
        mixtures=named,
        output=output_dir,
        config=config,
        mesh=mesh,
        vocabulary=vocabulary,
        initial_digest=initial_digest,
        identity=identity,
        is_done=is_done,
    )


def run(
    planned: Plan,
    *,
    config_text: str = "",
    log: Callable[[str], None] = lambda text: None,
    write_metrics: Callable[[str, int, Mapping[str, float]], None] = lambda name, step, values: (
        None
    ),
    evaluate: Callable[[str, Any, int], Mapping[str, float]] | None = None,
    should_stop: Callable[[int], bool] = lambda step: False,
) -> Report:
    """Does what was planned.

    Args:
      config_text: the configuration as it was resolved, kept in the manifest.
      log: told in words.
      write_metrics: told (name of the expert, step, metrics by name) of the main process.
      evaluate: (name of the mixture, parameters, step) -> metrics that go beside those of a validation.
      should_stop: (steps taken) -> whether to save the state and stop; the same on all hosts.

    Raises loop.TrainingError for a loss that is not finite, loop.Interrupted when asked to stop, ValueError and OSError
    for what is wrong on disk.
    """
    return _Run(planned, config_text, log, write_metrics, evaluate, should_stop).run()


# ---- what is known before -----------------------------------------------------------------------------------------


def _check(settings: Settings, mixtures: Sequence[Mixture]) -> None:
    s, problems = settings, []
    for name in ("train_steps", "batch_size", "experts_at_once", "microbatches", "log_every"):
        if getattr(s, name) < 1:
            problems.append(f"{name.upper()} is {getattr(s, name)}, wanted at least 1")
    if not mixtures:
        problems.append("there is no mixture to train on")
    names = [m.name for m in mixtures]
    problems += [
        f"{name} is given twice" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    if len({(m.length, m.vocab_size) for m in mixtures}) > 1:
        problems.append("the mixtures' rows differ in length or vocabulary, so no step fits all")
    if s.batch_size % s.microbatches:
        problems.append(f"MICROBATCHES={s.microbatches} don't divide BATCH_SIZE={s.batch_size}")
    if s.choose not in ("last", "best"):
        problems.append(f"CHOOSE is {s.choose!r}, wanted 'last' or 'best'")
    if s.format not in ("orbax", "safetensors"):
        problems.append(f"FORMAT is {s.format!r}, wanted 'orbax' or 'safetensors'")
    judges = s.choose == "best" or s.patience is not None
    if judges and (s.validate_every is None or any(m.validation is None for m in mixtures)):
        problems.append(
            "CHOOSE='best' and PATIENCE need VALIDATE_EVERY and mixtures with a validation split"
        )
    if judges and s.experts_at_once > 1:
        problems.append(
            "CHOOSE='best' and PATIENCE are of one expert: train with EXPERTS_AT_ONCE=1"
        )
    if s.experts_at_once > len(mixtures) > 0:
        problems.append(
            f"EXPERTS_AT_ONCE={s.experts_at_once}, and there are {len(mixtures)} mixtures"
        )
    if problems:
        raise ValueError("\n  ".join(["these settings can't be used:", *problems]))


def _check_model(settings: Settings, config: DecoderConfig) -> None:
    """What is known of the settings once the model is."""
    if settings.format == "safetensors" and isinstance(config, PalmConfig):
        raise ValueError("FORMAT is 'safetensors', and Hugging Face has no PaLM: choose 'orbax'")
    names, patterns = leaf_names(abstract_params(model_of(config))), settings.frozen
    unused = [p for p in patterns if not any(is_like(name, [p]) for name in names)]
    if unused:
        raise ValueError(
            f"FROZEN: no parameter is like {', '.join(map(repr, unused))}; there are {', '.join(names)}"
        )
    if patterns and all(is_like(name, patterns) for name in names):
        raise ValueError("FROZEN: all parameters are frozen, so there is nothing to train")


def _model(
    settings: Settings, mixtures: Sequence[Mixture]
) -> tuple[DecoderConfig, model_file.Vocabulary | None]:
    """The model's configuration in this run, and its vocabulary."""
    chosen = {
        name: getattr(settings, name)
        for name in ("dropout_rate", "remat", "dtype", "param_dtype")
        if getattr(settings, name) is not None
    }
    config, initial = settings.model, settings.initial_checkpoint_path
    vocabulary = mixtures[0].vocabulary
    if initial is None and config is None:
        raise ValueError(
            "give MODEL (gin_configs/models/*.gin) or INITIAL_CHECKPOINT_PATH to start from"
        )
    if config is None:
        described = model_file.describe(initial)
        config = described.config
        _check_vocabulary(described.vocabulary, vocabulary, str(initial))
        vocabulary = described.vocabulary if vocabulary is None else vocabulary
    config = dataclasses.replace(config, **chosen)
    most = max(m.vocab_size for m in mixtures)
    if most > config.vocab_size:
        raise ValueError(
            f"the mixtures' vocabulary has {most:,} tokens and the model {config.vocab_size:,}: choose the model's own"
            " vocabulary (VOCABULARY), or a MODEL with more"
        )
    return config, vocabulary


def _check_vocabulary(
    of_model: model_file.Vocabulary | None, of_data: model_file.Vocabulary | None, where: str
) -> None:
    if of_model is None or of_data is None or None in (of_model.digest, of_data.digest):
        return
    if of_model.digest != of_data.digest:
        raise ValueError(
            f"{where} was trained on the vocabulary {of_model.name} ({of_model.digest[:12]}), and the mixtures are in"
            f" {of_data.name} ({of_data.digest[:12]}): give the same VOCABULARY"
        )


def _identity(
    settings: Settings,
    mixtures: Sequence[Mixture],
    config: DecoderConfig,
    initial_digest: str | None,
) -> dict[str, Any]:
    """All that the result depends on, as JSON. How it is cut (mesh, microbatches) changes no more than rounding."""
    s = settings
    return {
        "stage": "finetune",
        "mixtures": {m.name: dict(m.identity) for m in mixtures},
        "initial": initial_digest,
        "params_path": s.params_path,
        "model": json.loads(json.dumps(dataclasses.asdict(config))),
        "train_steps": s.train_steps,
        "batch_size": s.batch_size,
        "seed": s.seed,
        "optimizer": _behaviour(s),
        "z_loss": s.z_loss,
        "clip_norm": s.clip_norm,
        "averaging": s.averaging and dataclasses.asdict(s.averaging),
        "frozen": list(s.frozen),
        "experts_at_once": s.experts_at_once,
        "validate_every": s.validate_every,
        "validation_batches": s.validation_batches,
        "choose": s.choose,
        "patience": s.patience,
        "keep_state": s.keep_state,
        "format": s.format,
    }


def _behaviour(settings: Settings) -> str:
    """What tells an optimizer and its learning rate from others: what it does, since functions have no other name.

    Three steps of a small problem at a learning rate of 1, and the learning rate over the run; to four digits.
    """
    params = {"kernel": jnp.asarray([[1.0, -2.0], [0.5, 3.0]]), "scale": jnp.asarray([1.0, 0.25])}
    optimizer = settings.optimizer(1.0)

    @jax.jit
    def moved(params: Any, state: Any, number: Any) -> tuple[Any, Any]:
        gradients = jax.tree.map(lambda p: jnp.sin(p * (number + 1.0)), params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    numbers = []
    for number in range(3):
        params, state = moved(params, state, np.float32(number))
        numbers += [float(x) for leaf in jax.tree.leaves(params) for x in np.ravel(leaf)]
    rate = settings.learning_rate
    places = np.unique(np.linspace(0, settings.train_steps - 1, 17).astype(np.int32))
    rates = [float(rate(place)) for place in places] if callable(rate) else [float(rate)]
    return manifest.digest([f"{number:.4g}" for number in numbers + rates])


# ---- the run ------------------------------------------------------------------------------------------------------


class _Run:
    """One stage under way."""

    def __init__(
        self,
        planned: Plan,
        config_text: str,
        log: Callable[[str], None],
        write_metrics: Callable[[str, int, Mapping[str, float]], None],
        evaluate: Callable[[str, Any, int], Mapping[str, float]] | None,
        should_stop: Callable[[int], bool],
    ):
        self.started = time.perf_counter()
        self.plan, self.settings, self.mesh = planned, planned.settings, planned.mesh
        self.config_text, self.log = config_text, log
        self.write_metrics, self.evaluate, self.should_stop = write_metrics, evaluate, should_stop
        self.model: Decoder = model_of(planned.config)
        self.spent = Seconds()
        self.tokens = self.steps = 0
        self.last: dict[str, dict[str, float]] = {name: {} for name in planned.mixtures}

    def run(self) -> Report:
        plan = self.plan
        if plan.is_done:
            return self._report(was_done=True)
        staging = manifest.Staging(plan.output)
        if hosts.is_main():
            staging.resume(plan.identity)
        hosts.wait_for_all("staging is there")
        self.base = self._base()
        for number, names in enumerate(plan.groups):
            folders = {n: staging.folder / n if n else staging.folder for n in names}
            done = {n: manifest.read(folder) for n, folder in folders.items() if n}
            if done and None not in done.values():
                for name, how in done.items():
                    self.last[name] = how["metrics"][plan.mixtures[name].name]
            else:
                self._train(names, folders, staging.folder / CHECKPOINTS / str(number))
        if hosts.is_main():
            if not self.settings.keep_state and (staging.folder / CHECKPOINTS).exists():
                (staging.folder / CHECKPOINTS).rmtree()
            record = self._record(list(plan.mixtures))
            if "" not in plan.mixtures:
                record["experts"] = list(plan.mixtures)
            staging.commit(record)
        hosts.wait_for_all("output is there")
        return self._report(was_done=False)

    def _base(self) -> Any:
        """The parameters that every expert starts from."""
        s = self.settings
        if s.initial_checkpoint_path is not None:
            return read_params(
                s.initial_checkpoint_path, self.plan.config, self.mesh, params_path=s.params_path
            )
        shardings = partitioning.shardings(boxed_params(self.model), self.mesh)

        @functools.partial(jax.jit, out_shardings=shardings)
        def init() -> Any:
            tokens = jnp.zeros((1, 1), jnp.int32)
            return nn.unbox(self.model.init(jax.random.key(s.seed), tokens)["params"])

        with partitioning.use(self.mesh):
            return init()

    # ---- one group of experts --------------------------------------------------------------------------------------

    def _train(
        self, names: Sequence[str], folders: Mapping[str, epath.Path], checkpoints: epath.Path
    ) -> None:
        """Trains some experts, each with the others in one step where there are several, and writes them."""
        s = self.settings
        mixtures = [self.plan.mixtures[name] for name in names]
        for folder in folders.values():
            if hosts.is_main():
                folder.mkdir(parents=True, exist_ok=True)
        program = self._program(len(names))
        with contextlib.ExitStack() as stack:
            kept = self._checkpoints(checkpoints)
            stack.callback(kept.close)
            found = kept.restore(program.abstract_state)
            if found is None:
                progress, state = Progress(), program.start(self.base)
            else:
                progress, state = Progress.from_json(found.step, found.progress), found.state
                self.log(f"going on from step {found.step:,} of {s.train_steps:,}")
            place = Placement(
                self.mesh,
                rows=s.batch_size,
                length=mixtures[0].length,
                experts=program.experts,
            )
            files = stack.enter_context(_metrics_files(folders, after=progress.step))

            def log_metrics(step: int, values: Values) -> None:
                for i, name in enumerate(names):
                    mine = self._shown(values, i, program.experts, mixtures[0].length)
                    self.last[name].update(mine)
                    if hosts.is_main():
                        print(json.dumps({"step": step, **mine}), file=files[name], flush=True)
                        self.write_metrics(self.plan.mixtures[name].name, step, mine)

            loop = Loop(
                step=functools.partial(_seeded, program.step, np.int32(s.seed)),
                schedule=Schedule(
                    steps=s.train_steps,
                    log_every=s.log_every,
                    validate_every=s.validate_every,
                    checkpoint_every=s.checkpoint_every,
                    patience=s.patience,
                ),
                tokens_per_step=s.batch_size * mixtures[0].length * len(names),
                leaf_names=program.leaf_names,
                log=log_metrics,
                checkpoints=kept,
                validate=self._validation(program, mixtures, place),
                should_stop=self.should_stop,
                experts=None if program.experts is None else [m.name for m in mixtures],
            )
            begun = progress.step
            with partitioning.use(self.mesh):
                if progress.step < s.train_steps:
                    sources = [m.train(s.batch_size, place.host, place.hosts) for m in mixtures]
                    with Feed(sources, place, positions=progress.positions) as feed:
                        state = loop.run(state, feed, progress)
                self._account(loop.seconds, progress.step - begun, loop)
                if s.keep_state:
                    kept.save(progress.step, state, progress.to_json())
                if s.choose == "best" and progress.best[1] != progress.step:
                    self.log(f"taking step {progress.best[1]:,}, the best on validation")
                    state = kept.restore_step(progress.best[1], program.abstract_state).state
                for i, name in enumerate(names):
                    self._write(folders[name], program.params_of(state, i), name, progress)

    def _checkpoints(self, folder: epath.Path) -> Checkpoints:
        s = self.settings
        return Checkpoints(
            folder, keep=s.keep_checkpoints, keep_best=s.choose == "best", log=self.log
        )

    def _program(self, count: int) -> _Program:
        s, config = self.settings, self.plan.config
        of_model = getattr(config, "z_loss", 0.0)
        return _program(
            _Recipe(
                config=config,
                mesh=self.mesh,
                optimizer=s.optimizer,
                learning_rate=s.learning_rate,
                z_loss=of_model if s.z_loss is None else s.z_loss,
                clip_norm=s.clip_norm,
                microbatches=s.microbatches,
                vocabulary_chunks=s.vocabulary_chunks,
                averaging=s.averaging,
                frozen=tuple(s.frozen),
                experts=count if count > 1 else None,
            )
        )

    def _account(self, seconds: Seconds, steps: int, loop: Loop) -> None:
        for field in dataclasses.fields(Seconds):
            now = getattr(self.spent, field.name) + getattr(seconds, field.name)
            setattr(self.spent, field.name, now)
        self.steps += steps
        self.tokens += max(0, steps - 1) * loop.tokens_per_step

    def _validation(
        self, program: _Program, mixtures: Sequence[Mixture], place: Placement
    ) -> Callable[[TrainState], Values] | None:
        s = self.settings
        if any(m.validation is None for m in mixtures):
            return None
        sources = [m.validation(s.batch_size, place.host, place.hosts) for m in mixtures]

        def batches() -> Iterator[Batch]:
            readers = [source.read(None) for source in sources]
            for _ in range(s.validation_batches):
                yield place([next(reader)[0] for reader in readers])

        def validate(state: TrainState) -> Values:
            sums = [program.score(state, batch) for batch in batches()]
            total = jax.tree.map(lambda *each: np.sum(np.stack(each), 0), *jax.device_get(sums))
            weight = np.maximum(total.weight, 1e-30)
            values = {
                "validation/loss": total.cross_entropy / weight,
                "validation/accuracy": total.correct / weight,
            }
            if self.evaluate is not None:
                step = int(np.max(jax.device_get(state.step)))
                found = [
                    self.evaluate(m.name, program.params_of(state, i), step)
                    for i, m in enumerate(mixtures)
                ]
                for key in found[0]:
                    each = np.array([of_one[key] for of_one in found])
                    values[f"validation/{key}"] = each if program.experts else each[0]
            return values

        return validate

    def _shown(
        self, values: Values, number: int, experts: int | None, length: int
    ) -> dict[str, float]:
        """The metrics of one expert as plain numbers."""
        per_expert = {
            k: float(np.ravel(v)[number] if np.ndim(v) else v)
            for k, v in values.items()
            if k != "first_bad"
        }
        if self.settings.peak_flops and "tokens_per_s" in per_expert:
            flops = per_expert["tokens_per_s"] * flops_per_token(self.plan.config, length)
            per_expert["mfu"] = flops / (self.settings.peak_flops * self.mesh.size)
        return per_expert

    # ---- the end ---------------------------------------------------------------------------------------------------

    def _write(self, folder: epath.Path, params: Any, name: str, progress: Progress) -> None:
        """Parameters, what says what they are of, and, in a folder of experts, the manifest."""
        output.write(
            folder,
            params,
            self.plan.config,
            self.plan.vocabulary,
            format=self.settings.format,
            like=self.settings.initial_checkpoint_path,
        )
        self.last[name]["steps"] = progress.step
        if hosts.is_main() and name:
            manifest.write(folder, self._record([name]))
        hosts.wait_for_all(f"written {folder}")

    def _record(self, names: Sequence[str]) -> dict[str, Any]:
        s = self.settings
        inputs = {}
        if s.initial_checkpoint_path is not None:
            path = os.fspath(s.initial_checkpoint_path)
            inputs["base"] = {"path": path, "digest": self.plan.initial_digest}
        return {
            **manifest.provenance(self.plan.identity),
            "inputs": inputs,
            "stacked": model_file.stacked_of(self.plan.config),
            "mesh": partitioning.describe(self.mesh),
            "metrics": {self.plan.mixtures[n].name: self.last[n] for n in names},
            "seconds": round(time.perf_counter() - self.started, 3),
            "config": self.config_text,
        }

    def _report(self, *, was_done: bool) -> Report:
        return Report(
            outputs=self.plan.outputs,
            metrics=self.last,
            steps=self.steps,
            seconds=time.perf_counter() - self.started,
            spent=self.spent,
            tokens_per_s=self.tokens / self.spent.steps if self.spent.steps else 0.0,
            was_done=was_done,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Recipe:
    """All that the compiled functions depend on."""

    config: DecoderConfig
    mesh: jax.sharding.Mesh
    optimizer: Optimizer
    learning_rate: Any
    z_loss: float
    clip_norm: float | None
    microbatches: int
    vocabulary_chunks: int
    averaging: Averaging | None
    frozen: tuple[str, ...]
    experts: int | None


class _Program:
    """The compiled functions of a run, for one expert or for several along a leading axis.

    Attributes:
      experts: how many; None for one without that axis.
      abstract_state: ShapeDtypeStructs with shardings.
      leaf_names: of the parameters, in their order.
      step: (state, batch, seed) -> (state, metrics by name); the state is donated.
      score: (state, batch) -> loss.LossSums.
    """

    def __init__(self, recipe: _Recipe):
        self.experts, self._mesh = recipe.experts, recipe.mesh
        mesh, experts, schedule = recipe.mesh, recipe.experts, recipe.learning_rate
        model = model_of(recipe.config)
        optimizer = _optimizer(recipe)
        boxed = jax.eval_shape(
            functools.partial(init_state, optimizer=optimizer), boxed_params(model)
        )
        shapes, one = nn.unbox(boxed), partitioning.shardings(boxed, mesh)
        self.leaf_names = leaf_names(shapes.params)
        shardings = one
        if experts is not None:
            shapes = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((experts, *x.shape), x.dtype), shapes
            )
            shardings = partitioning.of_experts(one, mesh)
        self.abstract_state = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            shardings,
        )

        def step(
            state: TrainState, batch: Batch, seed: jax.Array
        ) -> tuple[TrainState, dict[str, jax.Array]]:
            rate = schedule(state.step) if callable(schedule) else schedule
            state, metrics = train_step(
                state,
                batch,
                seed,
                model=model,
                optimizer=optimizer,
                z_loss=recipe.z_loss,
                clip_norm=recipe.clip_norm,
                microbatches=recipe.microbatches,
                vocabulary_chunks=recipe.vocabulary_chunks,
                frozen=recipe.frozen,
            )
            return state, {**metrics._asdict(), "learning_rate": jnp.asarray(rate, jnp.float32)}

        def chosen(state: TrainState) -> Any:
            average = averaged_params(state.opt_state)
            if average is None:
                return state.params
            return jax.tree.map(lambda a, p: a.astype(p.dtype), average, state.params)

        def score(state: TrainState, batch: Batch) -> LossSums:
            scores = batch_scores(
                model, chosen(state), batch, vocabulary_chunks=recipe.vocabulary_chunks
            )
            return loss_sums(scores, batch.weights, z_loss=0.0)

        def start(params: Any) -> TrainState:
            state = init_state(jax.tree.map(jnp.copy, params), optimizer)
            if experts is None:
                return state
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (experts, *x.shape)), state)

        def params_of(state: TrainState, number: jax.Array) -> Any:
            return jax.tree.map(jnp.copy if experts is None else lambda x: x[number], chosen(state))

        if experts is not None:
            axis = partitioning.EXPERT_AXIS if partitioning.EXPERT_AXIS in mesh.shape else None
            step = jax.vmap(step, in_axes=(0, 0, None), spmd_axis_name=axis)
            score = jax.vmap(score, spmd_axis_name=axis)
        whole = partitioning.replicated(mesh)
        self.step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, whole))
        self.score = jax.jit(score, out_shardings=whole)
        self._start = jax.jit(start, out_shardings=shardings)
        self._params_of = jax.jit(params_of, out_shardings=one.params)

    def start(self, base: Any) -> TrainState:
        """The state before the first step, with copies of the base's parameters."""
        with partitioning.use(self._mesh):
            return self._start(base)

    def params_of(self, state: TrainState, number: int) -> Any:
        """The parameters of one expert, averaged where weights are."""
        return self._params_of(state, np.int32(number))


def _seeded(step: Any, seed: np.int32, state: TrainState, batch: Batch) -> Any:
    return step(state, batch, seed)


# Kept from run to run: a study trains many experts in one process, and compiling takes as long as training a small one.
_program = functools.lru_cache(maxsize=8)(_Program)


def leaf_names(params: Any) -> list[str]:
    """Of a tree, in its order."""
    return [of_tree_path(path) for path, _ in jax.tree.leaves_with_path(params)]


def _optimizer(recipe: _Recipe) -> optax.GradientTransformation:
    optimizer = recipe.optimizer(recipe.learning_rate)
    if recipe.frozen:
        optimizer = freezing(optimizer, recipe.frozen)
    return optimizer if recipe.averaging is None else recipe.averaging.around(optimizer)


def flops_per_token(config: DecoderConfig, length: int) -> float:
    """Of a training step: 6 N + 12 L H h T (PaLM, arXiv 2204.02311, appendix B), nothing computed twice counted."""
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * length
    return 6 * config.num_params() + attention


@contextlib.contextmanager
def _metrics_files(folders: Mapping[str, epath.Path], *, after: int) -> Iterator[dict[str, Any]]:
    """Each expert's file of metrics, open to be added to; lines of later steps, which are taken again, are removed."""
    with contextlib.ExitStack() as stack:
        files = {}
        if hosts.is_main():
            for name, folder in folders.items():
                path = folder / METRICS_FILE
                kept = []
                if path.exists():
                    for line in path.read_text().splitlines(keepends=True):
                        with contextlib.suppress(json.JSONDecodeError):  # the last one may be cut
                            if json.loads(line)["step"] <= after:
                                kept.append(line)
                files[name] = stack.enter_context(LinesFile(path, "".join(kept)))
        yield files
