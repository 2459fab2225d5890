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

import jax
import numpy as np
from etils import epath

from merging import manifest, partitioning
from merging.engine import hosts
from merging.models import model_file
from merging.training import output
from merging.training.batch import Batch
from merging.training.checkpoints import Checkpoints, read_state
from merging.training.curves import flops_per_token, metrics_files, of_expert
from merging.training.feed import Feed, Placement
from merging.training.initial import initial_params
from merging.training.loop import Loop, Progress, Schedule, Seconds, Values
from merging.training.planning import Plan, plan
from merging.training.settings import Mixture, Optimizer, Settings
from merging.training.step import TrainState
from merging.training.trainer import Trainer, recipe, trainer
from merging.training.validation import SCORE, Validation

__all__ = ["Mixture", "Optimizer", "Plan", "Report", "Settings", "Validation", "plan", "run"]

CHECKPOINTS = "checkpoints"


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
            shown = (
                "loss",
                "accuracy",
                *(f"validation/{each}" for each in ("loss", "accuracy", SCORE)),
            )
            found = ", ".join(f"{key} {values[key]:.4f}" for key in shown if key in values)
            lines.append(f"last       {name}: {found}" if name else f"last       {found}")
        return "\n".join(lines)


def run(
    planned: Plan,
    *,
    config_text: str = "",
    log: Callable[[str], None] = lambda text: None,
    write_metrics: Callable[[str, int, Mapping[str, float]], None] = lambda name, step, values: (
        None
    ),
    should_stop: Callable[[int], bool] = lambda step: False,
    trace: Callable[[int], None] = lambda step: None,
) -> Report:
    """Does what was planned.

    Args:
      config_text: the configuration as it was resolved, kept in the manifest.
      log: told in words.
      write_metrics: told (name of the expert, step, metrics by name) of the main process.
      should_stop: (steps taken) -> whether to save the state and stop; the same on all hosts.
      trace: told (steps taken) before each step begins, for who takes a profile.

    Raises loop.TrainingError for a loss that is not finite, interrupted.Interrupted when asked to stop, manifest.Busy where
    another run is at work on the output, ValueError and OSError for what is wrong on disk.
    """
    return _Run(planned, config_text, log, write_metrics, should_stop, trace).run()


class _Run:
    """One stage under way."""

    def __init__(
        self,
        planned: Plan,
        config_text: str,
        log: Callable[[str], None],
        write_metrics: Callable[[str, int, Mapping[str, float]], None],
        should_stop: Callable[[int], bool],
        trace: Callable[[int], None],
    ):
        self.started = time.perf_counter()
        self.plan, self.settings, self.mesh = planned, planned.settings, planned.mesh
        self.config_text, self.log = config_text, log
        self.write_metrics, self.should_stop, self.trace = write_metrics, should_stop, trace
        self.spent = Seconds()
        self.tokens = self.steps = 0
        self.last: dict[str, dict[str, float]] = {name: {} for name in planned.mixtures}

    def run(self) -> Report:
        plan = self.plan
        if plan.is_done:
            return self._report(was_done=True)
        with contextlib.closing(manifest.Staging(plan.output)) as staging:
            was_whole = self._begin(staging)
            if not was_whole:
                self._run(staging)
        return self._report(was_done=was_whole)

    def _begin(self, staging: manifest.Staging) -> bool:
        """Makes the staging folder, or goes on with it; whether the output is there but for its name. All hosts raise Busy."""
        was_whole, busy = False, None
        if hosts.is_main():
            try:
                was_whole = staging.is_whole(self.plan.identity)
                if not was_whole:
                    staging.resume(self.plan.identity)
            except manifest.Busy as error:
                busy = str(error)
        was_whole, busy = hosts.of_main([was_whole, busy])
        if busy is not None:
            raise manifest.Busy(busy)
        return was_whole

    def _run(self, staging: manifest.Staging) -> None:
        plan = self.plan
        self.base = initial_params(
            self.settings.initial_checkpoint_path,
            plan.config,
            self.mesh,
            seed=self.settings.seed,
            params_path=self.settings.params_path,
            restore=self.settings.restore,
        )
        self.evaluate = None
        if plan.validation is not None:
            self.evaluate = plan.validation.evaluator(
                plan.config, self.mesh, vocabulary_chunks=self.settings.vocabulary_chunks
            )
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
        count = len(names) if len(names) > 1 else None
        program = trainer(recipe(s, self.plan.config, self.mesh, experts=count))
        with contextlib.ExitStack() as stack:
            kept = self._checkpoints(checkpoints)
            stack.callback(kept.close)
            found = kept.restore(program.abstract_state)
            if found is None:
                progress, state = self._beginning(program)
            else:
                progress, state = Progress.from_json(found.step, found.progress), found.state
                self.log(f"going on from step {found.step:,} of {s.train_steps:,}")
            place = Placement(
                self.mesh,
                rows=s.batch_size,
                length=mixtures[0].length,
                experts=program.experts,
            )
            files = stack.enter_context(metrics_files(folders, after=progress.step))

            def log_metrics(step: int, values: Values) -> None:
                for i, name in enumerate(names):
                    mine = self._shown(values, i, mixtures[0].length)
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
                judge=self._judge if s.is_judged else None,
                should_stop=self.should_stop,
                experts=None if program.experts is None else [m.name for m in mixtures],
                trace=self.trace,
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

    def _beginning(self, program: Trainer) -> tuple[Progress, TrainState]:
        """Where a group of experts begins."""
        s = self.settings
        if not s.restore_state:
            return Progress(), program.start(self.base)
        found = read_state(s.initial_checkpoint_path, program.abstract_state_of_one)
        if found.step >= s.train_steps:
            raise ValueError(
                f"{s.initial_checkpoint_path} has taken {found.step:,} steps already, and TRAIN_STEPS={s.train_steps:,}"
                " counts them: choose more"
            )
        return Progress(step=found.step), program.start_state(found.state)

    def _checkpoints(self, folder: epath.Path) -> Checkpoints:
        s = self.settings
        return Checkpoints(
            folder, keep=s.keep_checkpoints, keep_best=s.choose == "best", log=self.log
        )

    def _account(self, seconds: Seconds, steps: int, loop: Loop) -> None:
        for field in dataclasses.fields(Seconds):
            now = getattr(self.spent, field.name) + getattr(seconds, field.name)
            setattr(self.spent, field.name, now)
        self.steps += steps
        self.tokens += max(0, steps - 1) * loop.tokens_per_step

    def _validation(
        self, program: Trainer, mixtures: Sequence[Mixture], place: Placement
    ) -> Callable[[TrainState], Values] | None:
        """What a state is validated by: the loss where all mixtures have rows for it, and tasks where there are some."""
        parts = []
        if all(m.validation is not None for m in mixtures):
            parts.append(self._losses(program, mixtures, place))
        if self.evaluate is not None:
            parts.append(self._scores(program, mixtures))
        if not parts:
            return None
        return lambda state: {
            f"validation/{name}": value for part in parts for name, value in part(state).items()
        }

    def _losses(
        self, program: Trainer, mixtures: Sequence[Mixture], place: Placement
    ) -> Callable[[TrainState], Values]:
        s = self.settings
        sources = [m.validation(s.batch_size, place.host, place.hosts) for m in mixtures]

        def batches() -> Iterator[Batch]:
            readers = [source.read(None) for source in sources]
            for _ in range(s.validation_batches):
                yield place([next(reader)[0] for reader in readers])

        def losses(state: TrainState) -> Values:
            sums = [program.score(state, batch) for batch in batches()]
            total = jax.tree.map(lambda *each: np.sum(np.stack(each), 0), *jax.device_get(sums))
            weight = np.maximum(total.weight, 1e-30)
            return {"loss": total.cross_entropy / weight, "accuracy": total.correct / weight}

        return losses

    def _scores(
        self, program: Trainer, mixtures: Sequence[Mixture]
    ) -> Callable[[TrainState], Values]:
        def scores(state: TrainState) -> Values:
            found = [
                self.evaluate(program.params_of(state, i), m.name) for i, m in enumerate(mixtures)
            ]
            if program.experts is None:
                return found[0]
            return {name: np.array([each[name] for each in found]) for name in found[0]}

        return scores

    def _judge(self, values: Values) -> float:
        """What is to be low of a validation."""
        value = float(np.mean(values[f"validation/{self.settings.best_metric}"]))
        return value if self.settings.is_lowest_best else -value

    def _shown(self, values: Values, number: int, length: int) -> dict[str, float]:
        """The metrics of one expert as plain numbers."""
        per_expert = of_expert(values, number)
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
            "step_seconds": round(self.spent.steps, 3),
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


def _seeded(step: Any, seed: np.int32, state: TrainState, batch: Batch) -> Any:
    return step(state, batch, seed)
