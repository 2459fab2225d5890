"""Progress in a log and on a terminal; the clock is the test's own."""

from __future__ import annotations

import io

from launch.progress import LINE_PERIOD_S, Evaluating, Progress, Training


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_every_few_seconds_and_one_at_the_end_of_each_phase():
    stream, clock = io.StringIO(), Clock()
    with Progress(stream, clock=clock) as progress:
        progress("survey", 0, 4_000_000)
        progress("survey", 1_000_000, 4_000_000)
        clock.now += LINE_PERIOD_S
        progress("survey", 2_000_000, 4_000_000)
        progress("survey", 4_000_000, 4_000_000)
        clock.now += LINE_PERIOD_S
        progress("merge", 0, 0)
        progress.log("in words")
    assert stream.getvalue().splitlines() == [
        "survey: 2 MB of 4 MB (50%) in 5.0 s, 400 kB/s",
        "survey: 4 MB of 4 MB (100%) in 10.0 s, 400 kB/s",
        "in words",
        "merge: 0 B of 0 B in 0.0 s",
    ]


def test_a_terminal_gets_a_bar_with_bytes_per_second():
    stream = Terminal()
    with Progress(stream) as progress:
        progress("merge", 0, 4_000_000)
        progress.log("in words")
        progress("merge", 4_000_000, 4_000_000)
    shown = stream.getvalue()
    assert "merge: 100%" in shown and "4.00M/4.00M" in shown and "B/s" in shown
    assert "in words" in shown


def test_only_the_first_process_shows():
    stream = Terminal()
    with Progress(stream, is_shown=False) as progress:
        progress("merge", 1, 2)
        progress.log("in words")
    assert stream.getvalue() == ""


def test_training_tells_step_loss_and_the_time_left():
    stream, clock = io.StringIO(), Clock()
    shown = Training(stream, steps=10, clock=clock)
    shown("expert", 1, {"loss": 2.0})
    clock.now += LINE_PERIOD_S - 1
    shown("expert", 3, {"loss": 1.5})
    clock.now += 2
    shown("expert", 4, {"loss": 1.0})  # 3 steps in 6 s, 6 to go
    shown("expert", 5, {"loss": 0.9, "validation/loss": 0.8})  # told although a line has just been
    shown("expert", 6, {"validation/score": 0.75})
    shown("expert", 10, {"loss": 0.5})
    assert stream.getvalue().splitlines() == [
        "expert 1/10: loss 2.0000",
        "expert 4/10: loss 1.0000, 12 s left",
        "expert 5/10: loss 0.9000, validation loss 0.8000, 8 s left",
        "expert 6/10: score 0.750, 5 s left",
        "expert 10/10: loss 0.5000",
    ]


def test_the_next_expert_has_a_time_of_its_own():
    stream, clock = io.StringIO(), Clock()
    shown = Training(stream, steps=20, clock=clock)
    for name in ("one", "two"):
        for step in (10, 15, 20):
            shown(name, step, {"loss": 1.0})
            clock.now += LINE_PERIOD_S
    told = [f"15/20: loss 1.0000, {int(LINE_PERIOD_S)} s left", "20/20: loss 1.0000"]
    assert stream.getvalue().splitlines() == [
        f"{name} {line}" for name in ("one", "two") for line in ("10/20: loss 1.0000", *told)
    ]


def test_evaluating_tells_examples_and_the_time_left_of_all_models():
    stream, clock = io.StringIO(), Clock()
    shown = Evaluating(stream, models=2, clock=clock)
    shown("a", 0, 100)
    clock.now += 10
    shown("a", 50, 100)  # 5 a second, 50 and another 100 to go
    clock.now += 10
    shown("a", 100, 100)
    shown("b", 20, 100)  # 20 of them were done before
    clock.now += 16
    shown("b", 100, 100)
    assert stream.getvalue().splitlines() == [
        "a (1/2): 50/100 examples, 5 examples/s, 30 s left",
        "a (1/2): 100/100 examples, 5 examples/s, 20 s left",
        "b (2/2): 100/100 examples, 5 examples/s",
    ]
