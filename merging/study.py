"""The study stage: a grid of bases, experts, merges and evaluations, of which it makes what is missing.

  bases     a pretrained and an instruction-tuned base of every size
  experts   from every base an expert of each held-in category, and a multitask model
  cells     base, experts, multitask model and all merges scored on all tasks; merges live and die in device memory unless they are to be kept
  report    (merging.report)

Items of a phase depend on none of the same phase and meet in files alone: worker i of n takes every n-th of them, an item that is done
is left as it is, and what a lost worker left is made by running the phase again. What is being trained by another worker is passed over, and
looked at again at the end. The merge of a cell is `merge_params`, the
very steps of the merge from disk to disk, which it equals bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from merging import finetune, manifest
from merging.checkpoints.storage import put_whole
from merging.engine import hosts
from merging.engine.vectors import task_vectors_of
from merging.evaluation.collect import Result, cut, put_scores
from merging.evaluation.evaluator import Evaluator, Options
from merging.evaluation.examples import Task
from merging.finetune import Mixture
from merging.grid import study_file, tuning
from merging.grid.cells import TUNED, Cell, cells
from merging.grid.study_file import (
    BASE,
    HELD_IN,
    INSTRUCTION_TUNED,
    MULTITASK,
    PRETRAINED,
    Category,
    Places,
    expert,
)
from merging.interrupted import Interrupted, ShouldStop, never
from merging.methods.method import Method
from merging.models import model_file
from merging.models.config import DecoderConfig
from merging.models.families import is_prefix_lm, model_of
from merging.partitioning import MeshShape, mesh_of
from merging.study_identity import depends_on
from merging.study_models import StudyModels
from merging.training.optimizer import adamw
from merging.training.settings import Optimizer

PHASES = ("bases", "experts", "cells")

# At an item that another worker is making, which takes minutes to days.
SECONDS_BETWEEN_LOOKS = 5.0


class InputMissing(ValueError):
    """A phase found that an earlier one is not done: names what is missing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How one kind of model is trained.

    Attributes:
      mixture: its name; of experts with `{category}` in it.
      lengths: {"inputs": tokens, "targets": tokens}.
      start: of a base, the base that it starts from; None: random parameters.
      train_steps, batch_size, learning_rate, optimizer, dropout_rate, clip_norm, checkpoint_every: see `finetune.Settings`.
      at_once: experts that are trained by one step.
      by_size: {size: {field: value}} where a size asks for other values.
    """

    mixture: str
    lengths: Mapping[str, int]
    train_steps: int
    batch_size: int
    learning_rate: Any
    start: str | None = None
    optimizer: Optimizer = adamw
    dropout_rate: float | None = None
    clip_norm: float | None = 1.0
    checkpoint_every: int | None = None
    at_once: int = 1
    by_size: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def of_size(self, size: str) -> Training:
        """With the values of one size."""
        return dataclasses.replace(self, **self.by_size.get(size, {}), by_size={})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a study is made of.

    Attributes:
      output_dir: its folder.
      name, question: for the report.
      sizes: the model of each size, small to large; None where the bases are checkpoints that say it.
      bases: "pretrained" and "instruction_tuned", or one of them: how it is trained, or the folder of a checkpoint, with `{size}` in it.
      expert, multitask: how these are trained; multitask None: there is none.
      methods: by the name that they have in the report.
      num_experts: of a merge.
      seeds: that pick them.
      expert_steps: experts that were trained for so many steps only are made and merged too.
      mesh: how devices are used; None: all along the data axis.
      seed: of all training.
      tune: merges are made by chosen settings too: see `grid.tuning`.
      experts_in_memory: base and all experts of a size lie in the devices' memory together; False: merges are streamed from disk; None:
        where they fit.
      keep_merged: merged checkpoints are written, in the base's format, and stay; each is a whole model.
      models_at_once: that are evaluated by one step, each on one device.
      normalization, row_length, batch_tokens, shapes: see `evaluator.Options`.
    """

    output_dir: epath.PathLike
    name: str
    question: str
    sizes: Mapping[str, DecoderConfig | None]
    bases: Mapping[str, Training | str]
    expert: Training
    multitask: Training | None
    methods: Mapping[str, Method]
    num_experts: Sequence[int] = (2, 4, 6, 8)
    seeds: Sequence[int] = (0, 1, 2)
    expert_steps: Sequence[int] = ()
    mesh: MeshShape | jax.sharding.Mesh | None = None
    seed: int = 0
    tune: bool = False
    experts_in_memory: bool | None = None
    keep_merged: bool = False
    models_at_once: int = 1
    normalization: str = "sum"
    row_length: int = 2_048
    batch_tokens: int = 4_096
    shapes: int = 4


Tasks = tuple[Sequence[Task], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What a study is trained on and judged by; made by who reads text.

    Attributes:
      categories: held-in and held-out ones, in the order of the table.
      mixture: (how to train, name of a mixture) -> what is trained on.
      tasks: (whether settings are chosen, by examples that judge nobody then) -> what judges, and JSON that says all it depends on.
      tuning_tasks: () -> the same of what settings are chosen by.
      depends_on: (whether settings are chosen) -> JSON, all that examples depend on and that is known without reading them.
    """

    categories: Mapping[str, Category]
    mixture: Callable[[Training, str], Mixture]
    tasks: Callable[[bool], Tasks]
    tuning_tasks: Callable[[], Tasks]
    depends_on: Callable[[bool], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """A part of a phase that is made as a whole.

    Attributes:
      phase, size, base: of what; base "" where it is all of a size's.
      name: what is made: a model, or a group of experts.
      folders: that hold a manifest once it is done.
      needs: folders that must hold one before.
      steps: of experts, where these are fewer.
    """

    phase: str
    size: str
    base: str
    name: str
    folders: tuple[epath.Path, ...]
    needs: tuple[epath.Path, ...] = ()
    steps: int | None = None

    @property
    def is_done(self) -> bool:
        return all((folder / manifest.MANIFEST).exists() for folder in self.folders)

    @property
    def label(self) -> str:
        return "/".join(part for part in (self.size, self.base, self.name) if part)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a study is; all that can be refused at once has been.

    Attributes:
      categories: all; `held_in` has those with an expert.
      cells: every one, those of equal merges too.
      items: by phase, in the order in which they are made.
    """

    settings: Settings
    data: Data
    cells: Sequence[Cell]
    places: Places
    items: Mapping[str, Sequence[Item]]

    @property
    def held_in(self) -> list[str]:
        """The categories that have an expert."""
        return [name for name, each in self.data.categories.items() if each.role == HELD_IN]

    @property
    def mixtures(self) -> list[str]:
        """The names of all that is trained on."""
        s = self.settings
        names = [how.mixture for how in s.bases.values() if isinstance(how, Training)]
        names += [s.expert.mixture.format(category=category) for category in self.held_in]
        return names if s.multitask is None else [*names, s.multitask.mixture]

    def merges(self, size: str, base: str) -> dict[str, Cell]:
        """The different merges of a size and base, by the name of their model."""
        found: dict[str, Cell] = {}
        for cell in self.cells:
            if (cell.size, cell.base) == (size, base):
                found.setdefault(cell.model, cell)
        return found

    def config(self, size: str) -> DecoderConfig:
        """Of a size's models; read from a base where the study does not say it."""
        config = self.settings.sizes[size]
        if config is not None:
            return config
        return model_file.describe(self.base_folder(size, next(iter(self.settings.bases)))).config

    def base_folder(self, size: str, base: str) -> epath.Path:
        """Where the base is: made here, or a checkpoint that was there."""
        return base_folder(self.settings, self.places, size, base)

    def expert_folder(
        self, size: str, base: str, category: str, steps: int | None = None
    ) -> epath.Path:
        """Where the expert of a category is; `steps` as in `Cell`."""
        group = self.held_in.index(category) // self.settings.expert.of_size(size).at_once
        return self.places.experts(size, base, group, steps) / category

    @property
    def every_steps(self) -> list[int | None]:
        """Of experts: None, which is all that there are, and fewer."""
        return [None, *self.settings.expert_steps]

    def describe(self) -> str:
        """The plan as text, one fact a line."""
        s = self.settings
        datasets = sum(len(each.datasets) for each in self.data.categories.values())
        merges = {(c.size, c.base, c.model) for c in self.cells}
        lines = [
            f"study      {s.name}: {s.question}",
            f"sizes      {', '.join(s.sizes)}",
            f"bases      {', '.join(s.bases)}",
            f"methods    {', '.join(s.methods)}",
            f"merges     {len(self.cells)} of {', '.join(map(str, s.num_experts))} experts, {len(s.seeds)} seeds"
            f" ({len(merges)} different ones), on {datasets} datasets: {len(self.cells) * datasets:,} evaluations",
            *(
                f"{phase:10s} {sum(item.is_done for item in items)} of {len(items)} done"
                for phase, items in self.items.items()
            ),
            f"output     {s.output_dir}",
        ]
        return "\n".join(lines)


def base_folder(settings: Settings, places: Places, size: str, base: str) -> epath.Path:
    """Where a base is: made by the study, or a checkpoint that was there."""
    how = settings.bases[base]
    return epath.Path(how.format(size=size)) if isinstance(how, str) else places.base(size, base)


def plan(settings: Settings, data: Data) -> Plan:
    """Lists what must be.

    Raises ValueError for settings that make no study, with the names.
    """
    _check(settings)
    held_in = [name for name, each in data.categories.items() if each.role == HELD_IN]
    every = cells(
        sizes=list(settings.sizes),
        bases=list(settings.bases),
        methods=settings.methods,
        num_experts=settings.num_experts,
        seeds=settings.seeds,
        categories=held_in,
        is_tuned=settings.tune,
        expert_steps=settings.expert_steps,
    )
    for method in settings.methods.values():
        for number in settings.num_experts:
            method.check(number)
    places = Places(root=epath.Path(settings.output_dir))
    planned = Plan(settings=settings, data=data, cells=every, places=places, items={})
    experts = _experts(planned)
    items = {"bases": _bases(planned), "experts": experts, "cells": _models(planned, experts)}
    return dataclasses.replace(planned, items=items)


def _check(s: Settings) -> None:
    problems = []
    for name in ("sizes", "bases", "methods", "num_experts", "seeds"):
        if not getattr(s, name):
            problems.append(f"{name.upper()} is empty")
    known = (PRETRAINED, INSTRUCTION_TUNED)
    problems += [
        f"BASES has {name!r}: a base is one of {', '.join(known)}"
        for name in s.bases
        if name not in known
    ]
    for name, how in s.bases.items():
        if isinstance(how, Training):
            if how.start is not None and how.start not in s.bases:
                problems.append(
                    f"the base {name} starts from {how.start!r}, which is none of BASES: {', '.join(s.bases)}"
                )
            problems += [
                f"SIZES gives no model for {size}, and the base {name} is trained"
                for size, config in s.sizes.items()
                if config is None and how.start is None
            ]
    if "{category}" not in s.expert.mixture:
        problems.append(
            f"the experts' mixture is {s.expert.mixture!r}: it must have {{category}} in it"
        )
    for size in s.sizes:
        most = s.expert.of_size(size).train_steps
        problems += [
            f"EXPERT_STEPS has {steps}: the experts of {size} are trained for {most} steps, and these must be fewer"
            for steps in s.expert_steps
            if not 1 <= steps < most
        ]
    if s.models_at_once < 1:
        problems.append(f"MODELS_AT_ONCE is {s.models_at_once}: it must be at least 1")
    if problems:
        raise ValueError("\n  ".join(["these settings make no study:", *problems]))


# ---- what must be -------------------------------------------------------------------------------------------------


def _bases(planned: Plan) -> list[Item]:
    """One item a size, since one base may start from another."""
    s = planned.settings
    trained = [base for base, how in s.bases.items() if isinstance(how, Training)]
    return [
        Item(
            phase="bases",
            size=size,
            base="",
            name="bases",
            folders=tuple(planned.places.base(size, base) for base in trained),
        )
        for size in s.sizes
        if trained
    ]


def _experts(planned: Plan) -> list[Item]:
    s, items = planned.settings, []
    for size in s.sizes:
        at_once = s.expert.of_size(size).at_once
        for base, how in s.bases.items():
            needs = (planned.places.base(size, base),) if isinstance(how, Training) else ()
            make = functools.partial(Item, phase="experts", size=size, base=base, needs=needs)
            for steps in planned.every_steps:
                for number in range(-(-len(planned.held_in) // at_once)):
                    folder = planned.places.experts(size, base, number, steps)
                    items.append(make(name=folder.name, folders=(folder,), steps=steps))
            if s.multitask is not None:
                folder = planned.places.multitask(size, base)
                items.append(make(name=MULTITASK, folders=(folder,)))
    return items


def _models(planned: Plan, experts: Sequence[Item]) -> list[Item]:
    """Every model that is scored; `experts`: the items of the phase before."""
    s = planned.settings
    needs: dict[tuple[str, str], list[epath.Path]] = {}
    for item in experts:
        needs.setdefault((item.size, item.base), []).extend((*item.needs, *item.folders))
    return [
        Item(
            phase="cells",
            size=size,
            base=base,
            name=model,
            folders=(planned.places.scores(size, base, model), *kept),
            needs=tuple(needs[size, base]),
        )
        for size in s.sizes
        for base in s.bases
        for model, kept in (
            *((model, ()) for model in _trained(planned)),
            *((model, _kept(planned, size, base, model)) for model in planned.merges(size, base)),
        )
    ]


def _trained(planned: Plan) -> list[str]:
    """The models of a size and base that are not merged."""
    experts = [expert(c, steps) for steps in planned.every_steps for c in planned.held_in]
    return [BASE, *experts, *([MULTITASK] if planned.settings.multitask is not None else [])]


def _kept(planned: Plan, size: str, base: str, model: str) -> tuple[epath.Path, ...]:
    """Where a merged model's checkpoint is written."""
    return (planned.places.merged(size, base, model),) if planned.settings.keep_merged else ()


# ---- what is done -------------------------------------------------------------------------------------------------

# (phase, items done, of how many, what was done last) as they are made.
Progress = Callable[[str, int, int, str], None]


@dataclasses.dataclass
class Seconds:
    """Where the time of a study goes: training steps, merges and forward passes, and what is around them.

    Attributes:
      steps, train: training steps, and the rest of training: compiling, reading, checkpoints.
      read: of checkpoints.
      tasks: examples read and made into tokens.
      merge: of merges, from disk to disk where they are streamed.
      vectors: of comparing task vectors.
      forward: of evaluations, compiling them included.
      tune, evaluate: the rest of choosing settings and of evaluating.
      write: of scores.
    """

    steps: float = 0.0
    merge: float = 0.0
    forward: float = 0.0
    train: float = 0.0
    read: float = 0.0
    tasks: float = 0.0
    vectors: float = 0.0
    tune: float = 0.0
    evaluate: float = 0.0
    write: float = 0.0

    @property
    def work(self) -> float:
        """What a study is for."""
        return self.steps + self.merge + self.forward


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a run did.

    Attributes:
      made: items by phase.
      seconds: of the stage.
      spent: where they went.
    """

    made: Mapping[str, int]
    seconds: float
    spent: Seconds

    def describe(self) -> str:
        """The report as text."""
        made = ", ".join(f"{count} {phase}" for phase, count in self.made.items()) or "nothing"
        parts = dataclasses.asdict(self.spent)
        parts["rest"] = self.seconds - sum(parts.values())
        told = ", ".join(f"{name} {value:.1f}" for name, value in parts.items())
        lines = [f"made       {made} in {self.seconds:.1f} s", f"seconds    {told}"]
        if self.spent.work:  # else there is nothing to have a share in
            outside = 1 - self.spent.work / self.seconds
            lines.append(
                f"shares     {outside:.1%} of the time outside training steps, merges and forward passes"
            )
        return "\n".join(lines)


def run(
    planned: Plan,
    *,
    phases: Sequence[str] = PHASES,
    worker: int = 0,
    num_workers: int = 1,
    config_text: str = "",
    progress: Progress = lambda phase, done, total, name: None,
    log: Callable[[str], None] = lambda text: None,
    write_metrics: Callable[[str, int, Mapping[str, float]], None] = lambda name, step, values: (
        None
    ),
    should_stop: ShouldStop = never,
) -> Report:
    """Makes what is missing of some phases, in their order.

    Args:
      phases: of PHASES.
      worker, num_workers: of each phase the items worker, worker + num_workers, ... are made.
      config_text: goes into manifests.
      progress, log, write_metrics: are told.
      should_stop: asked after each step of training, before each group of models that are scored together, and between batches of
        examples; the same on all hosts.

    Raises InputMissing where an earlier phase is not done, Interrupted when asked to stop, and what the stages raise.
    """
    if not 0 <= worker < num_workers:
        raise ValueError(
            f"--worker={worker} of --num_workers={num_workers}: workers are 0 to {num_workers - 1}"
        )
    started = time.perf_counter()
    if hosts.is_main():
        study_file.write(planned.places.root, _description(planned))
    hosts.wait_for_all("study.json")
    making = _Making(planned, config_text, log, write_metrics, should_stop)
    made = dict.fromkeys(phases, 0)
    for phase in phases:
        items = planned.items[phase][worker::num_workers]
        is_done = hosts.of_main([item.is_done for item in items])  # one look for all hosts
        missing = [item for item, there in zip(items, is_done, strict=True) if not there]
        done = len(items) - len(missing)
        progress(phase, done, len(items), "")
        _check_needs(phase, missing)
        for item, is_mine in making.make(phase, missing):
            made[phase] += is_mine
            done += 1
            progress(phase, done, len(items), item.label)
    return Report(made=made, seconds=time.perf_counter() - started, spent=making.spent)


def _description(planned: Plan) -> dict[str, Any]:
    s = planned.settings
    return study_file.described(
        name=s.name,
        question=s.question,
        sizes={size: planned.config(size).num_params() for size in s.sizes},
        bases=list(s.bases),
        methods={name: repr(method) for name, method in s.methods.items()},
        num_experts=s.num_experts,
        seeds=s.seeds,
        categories=planned.data.categories,
        cells=planned.cells,
        depends_on=depends_on(planned),
    )


def check_done(planned: Plan) -> None:
    """Raises InputMissing, with names, unless all that a whole report is of is there."""
    _check_there(
        "report", [f for of in planned.items.values() for item in of for f in item.folders]
    )


def _check_needs(phase: str, items: Sequence[Item]) -> None:
    _check_there(phase, dict.fromkeys(folder for item in items for folder in item.needs))


def _check_there(phase: str, folders: Iterable[epath.Path]) -> None:
    missing = [str(f) for f in folders if not (f / manifest.MANIFEST).exists()]
    if missing:
        shown = "\n  ".join(missing[:10])
        more = f"\n  and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise InputMissing(
            f"the phase {phase} needs what an earlier phase has not made yet; run that to its end first:\n  {shown}{more}"
        )


class _Making:
    """A run under way, with what its items share."""

    def __init__(
        self,
        planned: Plan,
        config_text: str,
        log: Callable[[str], None],
        write_metrics: Callable[[str, int, Mapping[str, float]], None],
        should_stop: ShouldStop,
    ):
        self.plan, self.settings, self.places = planned, planned.settings, planned.places
        self.config_text, self.log = config_text, log
        self.write_metrics, self.should_stop = write_metrics, should_stop
        self.spent = Seconds()

    def make(self, phase: str, items: Sequence[Item]) -> Iterator[tuple[Item, bool]]:
        """Makes items, and gives each when it is done, with whether it was made here."""
        if phase == "cells":
            groups = dict.fromkeys((item.size, item.base) for item in items)
            for group in groups:
                mine = [item for item in items if (item.size, item.base) == group]
                yield from ((item, True) for item in self._score(mine))
            return
        make = self._train_bases if phase == "bases" else self._train_experts
        others: list[Item] = []
        for item in items:
            try:
                make(item)
            except manifest.Busy:
                self.log(f"{item.label} is being made by another worker: passed over until the end")
                others.append(item)
            else:
                yield item, True
        for item in others:
            yield item, self._made_after_all(item, make)

    def _made_after_all(self, item: Item, make: Callable[[Item], None]) -> bool:
        """Waits until another worker has made an item, or makes it where that one has stopped; whether it was made here."""
        self.log(f"waiting for {item.label}, which another worker is making")
        while not hosts.of_main(item.is_done):
            with contextlib.suppress(manifest.Busy):
                make(item)
                return True
            self._stop_if_asked()
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return False

    @contextlib.contextmanager
    def _counted(self, part: str) -> Iterator[None]:
        """Adds what a block takes to the seconds of a part."""
        started = time.perf_counter()
        try:
            yield
        finally:
            now = getattr(self.spent, part) + time.perf_counter() - started
            setattr(self.spent, part, now)

    def _move(self, part: str, to: str, seconds: float) -> None:
        """Counts seconds of a part as another's."""
        for name, more in ((part, -seconds), (to, seconds)):
            setattr(self.spent, name, getattr(self.spent, name) + more)

    @contextlib.contextmanager
    def _counted_forward(self, part: str, evaluator: Evaluator) -> Iterator[None]:
        """As `_counted`, with the forward passes apart."""
        before = evaluator.forward_seconds
        with self._counted(part):
            yield
        self._move(part, "forward", evaluator.forward_seconds - before)

    # ---- training --------------------------------------------------------------------------------------------------

    def _train_bases(self, item: Item) -> None:
        for base, how in self.settings.bases.items():
            if isinstance(how, str):
                continue
            start = None if how.start is None else self.plan.base_folder(item.size, how.start)
            output = self.places.base(item.size, base)
            self._train(how.of_size(item.size), item.size, output, start=start)

    def _train_experts(self, item: Item) -> None:
        start = self.plan.base_folder(item.size, item.base)
        if item.name == MULTITASK:
            how = self.settings.multitask.of_size(item.size)
            self._train(how, item.size, item.folders[0], start=start)
            return
        how = self.settings.expert.of_size(item.size)
        if item.steps is not None:
            how = dataclasses.replace(how, train_steps=item.steps)
        folder = functools.partial(self.plan.expert_folder, item.size, item.base, steps=item.steps)
        categories = [c for c in self.plan.held_in if folder(c).parent == item.folders[0]]
        self._train(how, item.size, item.folders[0], start=start, categories=categories)

    def _train(
        self,
        how: Training,
        size: str,
        output: epath.Path,
        *,
        start: epath.Path | None,
        categories: Sequence[str] = (),
    ) -> None:
        """One run of the finetune stage: a model, or an expert of each category in folders of their names."""
        with self._counted("train"):
            made = [
                dataclasses.replace(
                    self.plan.data.mixture(how, how.mixture.format(category=category)),
                    name=category,
                )
                for category in categories
            ] or [self.plan.data.mixture(how, how.mixture)]
            settings = finetune.Settings(
                output_dir=output,
                initial_checkpoint_path=start,
                model=self.settings.sizes[size] if start is None else None,
                train_steps=how.train_steps,
                batch_size=how.batch_size,
                learning_rate=how.learning_rate,
                optimizer=how.optimizer,
                dropout_rate=how.dropout_rate,
                clip_norm=how.clip_norm,
                checkpoint_every=how.checkpoint_every,
                experts_at_once=min(how.at_once, len(made)),
                mesh=self.settings.mesh,
                seed=self.settings.seed,
            )
            report = finetune.run(
                finetune.plan(settings, made, is_one=not categories),
                config_text=self.config_text,
                log=self.log,
                write_metrics=self.write_metrics,
                should_stop=lambda step: self.should_stop(),
            )
        self._move("train", "steps", report.spent.steps)

    # ---- scores ----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _tasks(self) -> Tasks:
        with self._counted("tasks"):
            return self.plan.data.tasks(self.settings.tune)

    @functools.cached_property
    def _tuning_tasks(self) -> Tasks:
        with self._counted("tasks"):
            return self.plan.data.tuning_tasks()

    @functools.cached_property
    def _mesh(self) -> jax.sharding.Mesh:
        return mesh_of(self.settings.mesh)

    @functools.lru_cache(maxsize=2)  # sizes come one after another  # noqa: B019
    def _evaluator(self, config: DecoderConfig, *, is_tuning: bool = False) -> Evaluator:
        s = self.settings
        options = Options(
            normalization=s.normalization,
            bidirectional=is_prefix_lm(config),
            row_length=s.row_length,
            batch_tokens=s.batch_tokens,
            shapes=s.shapes,
        )
        tasks, _ = self._tuning_tasks if is_tuning else self._tasks
        return Evaluator(model_of(config), tasks, mesh=self._mesh, options=options)

    def _models_of(self, size: str, base: str) -> StudyModels:
        return StudyModels(
            self.plan,
            size,
            base,
            self._mesh,
            counted=self._counted,
            judge=self._held_in_score,
            judge_identity=lambda: self._judged_by(self._tuning_tasks[1]),
            log=self.log,
        )

    def _held_in_score(
        self, config: DecoderConfig, params: Any, categories: Sequence[str]
    ) -> float:
        """What a chosen setting makes high."""
        evaluator = self._evaluator(config, is_tuning=True)
        with self._counted_forward("tune", evaluator):
            results = evaluator(params, TUNED, progress=self._between_batches(evaluator, 1))
        return tuning.held_in_score(results, [self.plan.data.categories[c] for c in categories])

    def _judged_by(self, tasks: Mapping[str, Any]) -> dict[str, Any]:
        """All that scores depend on beside a model's parameters, as JSON."""
        s = self.settings
        return {"tasks": dict(tasks), "normalization": s.normalization, "row_length": s.row_length}

    def _score(self, items: Sequence[Item]) -> Iterator[Item]:
        """Scores models of one size and base; `models_at_once` of them by one step."""
        size, base = items[0].size, items[0].base
        models = self._models_of(size, base)
        evaluator = self._evaluator(models.config)
        models.read()
        if models.streams:
            self.log(
                f"{size}/{base}: task vectors that don't lie in memory together are not compared"
            )
        elif not self.places.vectors(size, base).exists():
            with self._counted("vectors"):
                self._write_vectors(models)
        # Checkpoints may be asked for behind the scores.
        is_scored = hosts.of_main([(i.folders[0] / manifest.MANIFEST).exists() for i in items])
        for item in itertools.compress(items, is_scored):
            models.params(item.name)
            yield item
        items = [item for item, there in zip(items, is_scored, strict=True) if not there]
        at_once = self.settings.models_at_once
        for start in range(0, len(items), at_once):
            self._stop_if_asked()
            group = items[start : start + at_once]
            params, identities, got_in = [], [], []
            for item in group:
                # First, since a setting may have to be chosen, which is not the merge's time.
                of_params = models.identity(item.name)
                identities.append(
                    {
                        "stage": "study",
                        "model": item.name,
                        **self._judged_by(self._tasks[1]),
                        **of_params,
                    }
                )
                begun, merged = time.perf_counter(), self.spent.merge
                params.append(models.params(item.name))
                merged = self.spent.merge - merged
                got_in.append(
                    {
                        "load_seconds": round(time.perf_counter() - begun - merged, 4),
                        "merge_seconds": round(merged, 4),
                    }
                )
            ids = [item.label for item in group]
            begun, forward = time.perf_counter(), evaluator.forward_seconds
            with self._counted_forward("evaluate", evaluator):
                progress = self._between_batches(evaluator, at_once)
                results = _evaluated(evaluator, params, ids, at_once, progress)
            evaluated_in = (time.perf_counter() - begun) / len(group)
            forward = (evaluator.forward_seconds - forward) / len(group)
            with self._counted("write"):
                for item, identity, seconds, of_model in zip(
                    group, identities, got_in, results, strict=True
                ):
                    record = {
                        **manifest.provenance(identity),
                        **seconds,
                        "evaluate_seconds": round(evaluated_in, 4),
                        "forward_seconds": round(forward, 4),
                        "cut": cut(of_model),
                        "config": self.config_text,
                    }
                    self._write_scores(item.folders[0], of_model, record)
            yield from group

    def _stop_if_asked(self) -> None:
        if self.should_stop():
            raise Interrupted("stopped between items")

    def _between_batches(self, evaluator: Evaluator, models: int) -> Callable[[int], None]:
        """What an evaluator tells of examples; when all are done, the scores are written first."""
        total = models * sum(len(task.examples) for task in evaluator.tasks)
        return lambda examples: self._stop_if_asked() if examples < total else None

    def _write_scores(
        self, folder: epath.Path, results: Sequence[Result], record: Mapping[str, Any]
    ) -> None:
        """Scores, then the manifest: two that make the same put the same, and no reader takes a part for the whole."""
        if hosts.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            put_scores(folder, results)
            manifest.write(folder, record)
        hosts.wait_for_all(f"scores in {folder}")

    def _write_vectors(self, models: StudyModels) -> None:
        found = task_vectors_of(models.base, list(models.experts().values()))
        path = self.places.vectors(models.size, models.base_name)
        if hosts.is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            content = {
                "experts": list(models.experts()),
                **{k: v.tolist() for k, v in dataclasses.asdict(found).items()},
            }
            put_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def _evaluated(
    evaluator: Evaluator,
    params: Sequence[Any],
    ids: Sequence[str],
    at_once: int,
    progress: Callable[[int], None],
) -> list[list[Result]]:
    """The results of each model. Of several by one step, a last group is filled up with copies: nothing is compiled for it."""
    if at_once == 1:
        return [evaluator(params[0], ids[0], progress=progress)]
    missing = at_once - len(ids)
    filled = [*params, *params[-1:] * missing]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *filled)
    filled_ids = [*ids, *ids[-1:] * missing]
    return evaluator.many(stacked, filled_ids, progress=progress)[: len(ids)]
