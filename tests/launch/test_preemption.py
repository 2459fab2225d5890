"""SIGTERM in the midst of a merge: exit code 143, and the same command ends with the same bytes; and what several processes agree on."""

from __future__ import annotations

import pathlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from launch import devices, exit_codes, merge, preemption
from merging.engine import journal, output, pieces
from tests.launch import small_llama
from tests.launch.test_merge import assert_equal


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """SIGTERM ends this process again behind each test."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def merged(folder: pathlib.Path, output_dir: pathlib.Path) -> Any:
    base = small_llama.make_base(folder / "base")
    experts = [small_llama.make_expert(folder / f"expert_{i}", base, number=i) for i in range(2)]
    files, bindings = merge.shorthand(
        base=str(base), experts=[str(e) for e in experts], method="ties", output=str(output_dir), files=[]
    )  # fmt: skip
    return merge.merge(merge.configured(files, bindings), devices.Processes())


def test_a_merge_writes_its_journal_and_goes_on_to_the_same_bytes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    unbroken = merged(tmp_path, tmp_path / "unbroken")
    monkeypatch.setattr(pieces, "PIECE_ELEMENTS", 4096)
    puts, is_sent = iter(range(10**9)), threading.Event()
    put, look = output.Outputs.put, journal.Journal.flush_now_and_then
    is_far = threading.Event()

    def put_and_wait(*arguments: Any) -> None:
        put(*arguments)
        if next(puts) >= 5:  # the rest is for the second run
            is_far.set()
            assert is_sent.wait(60)

    def send(self: journal.Journal) -> None:  # called in the main thread
        look(self)
        if is_far.is_set() and not is_sent.is_set():
            signal.raise_signal(signal.SIGTERM)
            is_sent.set()

    with monkeypatch.context() as patch:
        patch.setattr(output.Outputs, "put", put_and_wait)
        patch.setattr(journal.Journal, "flush_now_and_then", send)
        with pytest.raises(SystemExit) as ended:
            merged(tmp_path, tmp_path / "out")
    assert ended.value.code == exit_codes.PREEMPTED
    assert "the same command goes on from there" in capsys.readouterr().err
    partial = tmp_path / "out.partial"
    assert not (tmp_path / "out").exists()
    there = sum("leaf" in each for each in journal.read(journal.file_of(partial, 0))[1])
    report = merged(tmp_path, tmp_path / "out")
    assert report.pieces_resumed == there >= 5
    assert report.pieces > there and report.reads == unbroken.reads - 1, "the survey was there"
    assert_equal(tmp_path / "unbroken", tmp_path / "out")


def test_a_second_sigterm_ends_one_process():
    is_asked = preemption.should_stop(devices.Processes())
    assert not is_asked()
    signal.raise_signal(signal.SIGTERM)
    assert is_asked() and is_asked()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


class Agreement:
    """What jax's preemption service answers processes: True at one number, which no process has asked with before it was chosen."""

    def __init__(self):
        self.asked: dict[str, int] = {}
        self.at: int | None = None

    def of(self, process: str):
        def reached(number: int) -> bool:
            self.asked[process] = number
            return number == self.at

        return reached

    def notice(self) -> None:
        self.at = 1 + max(self.asked.values())


def test_processes_that_are_not_in_step_all_hear_of_it(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    service = Agreement()
    several = devices.Processes(coordinator="127.0.0.1:1", count=2)
    often, seldom = (preemption.should_stop_soon(several) for _ in range(2))

    def ask(which: Any, name: str) -> bool:
        monkeypatch.setattr(preemption, "_is_agreed", service.of(name))
        return which()

    assert not ask(seldom, "seldom")
    for _ in range(50):  # 7 s, of which the other sees nothing
        now[0] += 0.14
        assert not ask(often, "often")
    service.notice()
    now[0] += preemption.TICK_S
    assert ask(often, "often")
    now[0] += 100.0
    assert ask(seldom, "seldom") and ask(seldom, "seldom"), "however late it asks"


def test_numbers_go_on_where_steps_begin_again(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(preemption, "_is_agreed", lambda number: asked.append(number) or False)
    is_asked = preemption.should_stop(devices.Processes(coordinator="127.0.0.1:1", count=2))
    for _ in ("one training run", "another"):
        assert not any(is_asked() for _ in range(3))
    assert asked == [1, 2, 3, 4, 5, 6]
