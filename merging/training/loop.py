"""The training loop: steps one behind another without waiting for any, and what is done between them.

The host runs a few steps ahead of the devices. A step's metrics are looked at when they are there, a few steps later; before
anything is kept (a checkpoint, a validation, the end) all of them have been. So a loss that is not finite is always found
before a state that it has spoilt is saved.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from merging.interrupted import Interrupted
from merging.training.batch import Batch
from merging.training.checkpoints import Checkpoints
from merging.training.feed import Feed, Position
from merging.training.step import TrainState

# Steps that are under way at once: one is computed, one waits behind it.
IN_FLIGHT = 2

Step = Callable[[TrainState, Batch], tuple[TrainState, Mapping[str, jax.Array]]]
Values = Mapping[str, Any]  # a number, or one for each expert


class TrainingError(ValueError):
    """Training that can't go on: says at which step, what was found and what to do."""


@dataclasses.dataclass(kw_only=True)
class Seconds:
    """Where the time of a run went, in seconds of the main thread.

    Attributes:
      compile: of the first step, which is mostly that.
      steps: calling steps and waiting for them.
      input: waiting for batches.
      validation, checkpoints: of these.
    """

    compile: float = 0.0
    steps: float = 0.0
    input: float = 0.0
    validation: float = 0.0
    checkpoints: float = 0.0

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Adds what happens inside."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - begun)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """When what is done.

    Attributes:
      steps: in all.
      log_every: steps between two lines of metrics; the last step has one always.
      validate_every: steps between validations; None: at the end only, where there is one.
      checkpoint_every: steps between checkpoints; None: only when asked to stop.
      patience: validations without a new best after which the run ends; None: it never does.
    """

    steps: int
    log_every: int = 10
    validate_every: int | None = None
    checkpoint_every: int | None = None
    patience: int | None = None


@dataclasses.dataclass(kw_only=True)
class Progress:
    """What a run carries beside its state, and saves with it.

    Attributes:
      step: steps taken.
      positions: of the data.
      best: (metric, step) of the best validation, less is better; None before the first.
      bad_validations: how many there were since.
    """

    step: int = 0
    positions: Sequence[Position] | None = None
    best: tuple[float, int] | None = None
    bad_validations: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "positions": [dict(position) for position in self.positions or ()],
            "best": self.best,
            "bad_validations": self.bad_validations,
        }

    @classmethod
    def from_json(cls, step: int, found: Mapping[str, Any]) -> Progress:
        return cls(
            step=step,
            positions=found["positions"],
            best=tuple(found["best"]) if found["best"] else None,
            bad_validations=found["bad_validations"],
        )


class Loop:
    """One run.

    Args:
      step: (state, batch) -> (state, metrics by name: those of `step.Metrics`, and others); the state is donated.
      schedule: when what is done.
      tokens_per_step: of all experts, padding included; for the speed.
      checkpoints: where states are saved; None: nowhere.
      validate: state -> the validation's metrics by name.
      judge: of these -> the one number that is to be low; None: no validation is better than another.
      log: told (step, metrics by name) every `log_every` steps.
      should_stop: (steps taken) -> whether to save and stop; the same on all hosts.
      leaf_names: of the parameters, in their order.
      experts: names, for messages, where the state has a leading axis over them.
      trace: told each step before it begins, for who takes a profile.
    """

    def __init__(
        self,
        *,
        step: Step,
        schedule: Schedule,
        tokens_per_step: int,
        leaf_names: Sequence[str],
        log: Callable[[int, Values], None],
        checkpoints: Checkpoints | None = None,
        validate: Callable[[TrainState], Values] | None = None,
        judge: Callable[[Values], float] | None = None,
        should_stop: Callable[[int], bool] = lambda step: False,
        experts: Sequence[str] | None = None,
        trace: Callable[[int], None] = lambda step: None,
    ):
        self._step, self._schedule = step, schedule
        self.tokens_per_step = tokens_per_step
        self._leaf_names, self._experts = leaf_names, experts
        self._log, self._should_stop = log, should_stop
        self._validate, self._judge = validate, judge
        self._checkpoints, self._trace = checkpoints, trace
        self._pending: collections.deque[tuple[int, Any]] = collections.deque()
        self.seconds = Seconds()
        self._mark: tuple[int, float] | None = (
            None  # the step of the last line, and when it was done
        )

    def run(self, state: TrainState, feed: Feed, progress: Progress) -> TrainState:
        """Trains to the last step, or until there is no hope of a new best; `progress` is kept up.

        Raises TrainingError for a loss or gradient that is not finite, Interrupted when asked to stop.
        """
        schedule = self._schedule
        while progress.step < schedule.steps:
            with self.seconds.of("input"):
                batch, progress.positions = next(feed)
            state = self._take(state, batch, progress.step)
            progress.step += 1
            is_stopping = self._should_stop(progress.step)
            is_last = progress.step == schedule.steps
            is_validated = self._is_due(progress.step, schedule.validate_every)
            is_validated |= is_last and self._validate is not None
            is_saved = self._is_due(progress.step, schedule.checkpoint_every) or is_stopping
            if is_validated or is_saved or is_last:
                with self.seconds.of("steps"):
                    self._settle(0)
            metric = None
            if is_validated:
                metric = self._validated(state, progress)
            is_best = metric is not None and progress.best[1] == progress.step
            if self._checkpoints is not None and (is_saved or (is_best and self._keeps_best)):
                with self.seconds.of("checkpoints"):
                    self._checkpoints.save(progress.step, state, progress.to_json(), metric=metric)
            if schedule.patience is not None and progress.bad_validations >= schedule.patience:
                break
            if is_stopping and not is_last:
                if self._checkpoints is not None:
                    self._checkpoints.wait()
                raise Interrupted(f"stopped at step {progress.step}")
        return state

    @property
    def _keeps_best(self) -> bool:
        return self._checkpoints is not None and self._checkpoints.keeps_best

    @staticmethod
    def _is_due(step: int, every: int | None) -> bool:
        return every is not None and step % every == 0

    def _take(self, state: TrainState, batch: Batch, step: int) -> TrainState:
        is_first = self._mark is None
        with self.seconds.of("compile" if is_first else "steps"):
            self._trace(step)
            state, metrics = self._step(state, batch)
            self._pending.append((step + 1, metrics))
            if is_first:
                jax.block_until_ready(metrics)
                self._mark = (step + 1, self._busy())
            self._settle(IN_FLIGHT - 1)
        return state

    def _settle(self, left: int) -> None:
        """Waits for all steps but `left`, and looks at their metrics."""
        while len(self._pending) > left:
            step, metrics = self._pending.popleft()
            values = jax.device_get(metrics)
            self._check_finite(step, values)
            if self._is_due(step, self._schedule.log_every) or step == self._schedule.steps:
                self._log(step, {**values, **self._speed(step)})

    def _busy(self) -> float:
        """A clock that stands while nothing is trained."""
        return time.perf_counter() - self.seconds.validation - self.seconds.checkpoints

    def _speed(self, step: int) -> dict[str, float]:
        """Since the last line; nothing at the first step, which was compiled."""
        before, since = self._mark
        self._mark = (step, self._busy())
        steps, seconds = step - before, self._mark[1] - since
        if not steps:
            return {}
        return {
            "step_seconds": seconds / steps,
            "tokens_per_s": self.tokens_per_step * steps / seconds,
        }

    def _check_finite(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        is_bad = ~np.isfinite(values["loss"]) | (values["first_bad"] >= 0)
        if not np.any(is_bad):
            return
        number = int(np.argmax(is_bad))
        loss, bad = (float(np.ravel(values[name])[number]) for name in ("loss", "first_bad"))
        whose = f" of {self._experts[number]}" if self._experts is not None else ""
        leaf = f"; the first leaf whose gradient is not finite is {self._leaf_names[int(bad)]}"
        raise TrainingError(
            f"step {step}{whose}: the loss is {loss:g}{leaf if bad >= 0 else ''}. {self._kept()} Try a lower learning rate,"
            " a lower CLIP_NORM or wider DTYPE"
        )

    def _kept(self) -> str:
        steps = [] if self._checkpoints is None else self._checkpoints.steps()
        if not steps:
            return "No checkpoint had been saved."
        return f"The last good checkpoint, of step {steps[-1]}, is kept."

    def _validated(self, state: TrainState, progress: Progress) -> float | None:
        with self.seconds.of("validation"):
            values = self._validate(state)
        self._log(progress.step, values)
        if self._judge is None:
            return None
        metric = self._judge(values)
        if progress.best is None or metric < progress.best[0]:
            progress.best, progress.bad_validations = (metric, progress.step), 0
        else:
            progress.bad_validations += 1
        return metric
