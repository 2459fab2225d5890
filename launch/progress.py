"""How far a stage is: a bar with bytes per second on a terminal, a plain line every few seconds in a log.

A stage calls `progress(phase, done_bytes, total_bytes)` as often as it likes, and knows nothing of who shows it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Self, TextIO

# Between two lines of a log. Shorter fills the log of an hour's run, longer leaves a short run without a sign.
LINE_PERIOD_S = 5.0


class _Shown:
    """Words on a stream, of one process of all. Use as a context manager."""

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        is_shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Shows on `stream` (default stderr); nothing where `is_shown` is False, as in all processes but the first."""
        self._stream = stream or sys.stderr
        self._is_shown = is_shown
        self._clock = clock

    def log(self, text: str) -> None:
        """A line of words."""
        if self._is_shown:
            print(text, file=self._stream, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        pass


class Progress(_Shown):
    """A progress callback. Use as a context manager: leaving it ends the bar or prints the last line."""

    def __init__(self, stream: TextIO | None = None, **how: Any):
        """As of `_Shown`."""
        super().__init__(stream, **how)
        self._phase: str | None = None
        self._bar: Any = None
        self._started = self._told = 0.0
        self._done = self._total = 0

    def __call__(self, phase: str, done_bytes: int, total_bytes: int) -> None:
        if not self._is_shown:
            return
        if phase != self._phase:
            self._end_phase()
            self._begin_phase(phase, total_bytes)
        self._done, self._total = done_bytes, total_bytes
        if self._bar is not None:
            self._bar.update(done_bytes - self._bar.n)
        elif self._clock() - self._told >= LINE_PERIOD_S:
            self._print_line()

    def log(self, text: str) -> None:
        """A line of words, above the bar where there is one."""
        if self._bar is not None and self._is_shown:
            self._bar.write(text, file=self._stream)
        else:
            super().log(text)

    def __exit__(self, *error: Any) -> None:
        self._end_phase()

    def _begin_phase(self, phase: str, total_bytes: int) -> None:
        self._phase = phase
        self._started = self._told = self._clock()
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_bytes, desc=phase, unit="B", unit_scale=True, file=self._stream
            )

    def _end_phase(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._phase is not None:
            self._print_line()
        self._phase = None

    def _print_line(self) -> None:
        from merging.engine.plan import size_text  # here, since it brings jax

        self._told = self._clock()
        seconds = self._told - self._started
        rate = f", {size_text(self._done / seconds)}/s" if seconds > 0 else ""
        share = f" ({self._done / self._total:.0%})" if self._total else ""
        done = f"{size_text(self._done)} of {size_text(self._total)}{share}"
        print(f"{self._phase}: {done} in {seconds:.1f} s{rate}", file=self._stream, flush=True)


class Training(_Shown):
    """Lines of a run that trains: step, loss, speed and the time left. Called with (name, step, metrics by name)."""

    def __init__(self, stream: TextIO | None = None, *, steps: int, **how: Any):
        """`steps`: of each expert. The other arguments are those of `_Shown`."""
        super().__init__(stream, **how)
        self._steps = steps
        self._told: float | None = None
        self._told_step: int | None = None
        # When, and at which step, this run was first heard of; the step that was heard of last.
        self._first: tuple[float, int] | None = None
        self._last = 0

    def __call__(self, name: str, step: int, values: Mapping[str, float]) -> None:
        if not self._is_shown:
            return
        now = self._clock()
        if self._first is None or step < self._last:  # the first expert's run, or the next one's
            self._first = (now, step)
        self._last = step
        is_due = self._told is None or now - self._told >= LINE_PERIOD_S or step == self._steps
        is_due |= step == self._told_step  # of other experts that are trained by the same step
        if not is_due and not any(key.startswith("validation/") for key in values):
            return
        self._told, self._told_step = now, step
        shown = [
            f"{label} {values[key]:{form}}"
            for key, label, form in (
                ("loss", "loss", ".4f"),
                ("accuracy", "accuracy", ".3f"),
                ("validation/loss", "validation loss", ".4f"),
                ("validation/accuracy", "accuracy", ".3f"),
                ("validation/score", "score", ".3f"),
                ("tokens_per_s", "tokens/s", ",.0f"),
                ("mfu", "MFU", ".1%"),
            )
            if key in values
        ]
        since, first = self._first
        if step > first and step < self._steps:
            left = (now - since) / (step - first) * (self._steps - step)
            shown.append(f"{duration(left)} left")
        self.log(f"{name} {step:,}/{self._steps:,}: {', '.join(shown)}")


class Evaluating(_Shown):
    """Lines of a run that evaluates: examples, speed and the time left. Called with (model, examples done, of how many)."""

    def __init__(self, stream: TextIO | None = None, *, models: int, **how: Any):
        """`models`: that are evaluated in all. The other arguments are those of `_Shown`."""
        super().__init__(stream, **how)
        self._models = models
        self._seen: dict[
            str, int
        ] = {}  # model -> examples that were done when it was first heard of
        self._started = self._told = self._clock()
        self._before = 0  # examples that this run did for earlier models

    def __call__(self, model: str, done: int, total: int) -> None:
        if not self._is_shown:
            return
        if model not in self._seen:
            self._before += sum(total - first for first in list(self._seen.values())[-1:])
            self._seen[model] = done
        now = self._clock()
        if now - self._told < LINE_PERIOD_S and done < total:
            return
        self._told = now
        told = f"{model} ({len(self._seen)}/{self._models}): {done:,}/{total:,} examples"
        rate = (self._before + done - self._seen[model]) / max(now - self._started, 1e-9)
        if rate > 0:
            left = (total - done + (self._models - len(self._seen)) * total) / rate
            told += f", {rate:,.0f} examples/s" + (f", {duration(left)} left" if left else "")
        self.log(told)


class Studying(_Shown):
    """Lines of a study: items of a phase, and between them how training gets on. Called with (phase, items done, of how many, the last)."""

    def __init__(self, stream: TextIO | None = None, **how: Any):
        """As of `_Shown`."""
        super().__init__(stream, **how)
        self._phase: str | None = None
        self._started = self._told = self._clock()
        self._before = 0

    def __call__(self, phase: str, done: int, total: int, name: str) -> None:
        now = self._clock()
        if phase != self._phase:
            self._phase, self._started, self._before = phase, now, done
            self.log(f"{phase}: {done:,} of {total:,} done")
            return
        spent = now - self._started
        text = f"{phase} {done:,}/{total:,}: {name}"
        if done < total:
            text += f", {duration(spent / (done - self._before) * (total - done))} left"
        self.log(text)

    def metrics(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """What a training run tells of itself."""
        now = self._clock()
        if now - self._told >= LINE_PERIOD_S:
            self._told = now
            loss, accuracy = values["loss"], values["accuracy"]
            self.log(f"  {name} step {step:,}: loss {loss:.4f}, accuracy {accuracy:.3f}")


def duration(seconds: float) -> str:
    """`12 s`, `3 min 20 s`, `2 h 5 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
