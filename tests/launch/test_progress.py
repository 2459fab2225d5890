"""Progress in a log and on a terminal; the clock is the test's own."""

from __future__ import annotations

import io

from launch.progress import LINE_PERIOD_S, Progress


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
