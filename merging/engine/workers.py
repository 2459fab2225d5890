"""Threads that work on the pieces of a pass, each for itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent import futures
from typing import TypeVar

from merging.engine.pieces import Piece

SECONDS_BETWEEN_REPORTS = 0.05

Result = TypeVar("Result")


def work_on(
    pieces: Iterable[Piece],
    work: Callable[[Piece], Result],
    take: Callable[[Result], None],
    *,
    workers: int,
    while_running: Callable[[], None],
) -> None:
    """Works on every piece, in threads; `take` gets each result, one at a time but in any order.

    Pieces are begun in their order. `while_running` is called now and then, and at the end, in the caller's thread. After
    an error no further piece is begun, and the error of the earliest piece is raised once all workers have stopped.
    """
    numbered = enumerate(pieces)
    errors: dict[int, BaseException] = {}
    stopped = threading.Event()
    choosing, taking = threading.Lock(), threading.Lock()

    def worker() -> None:
        while not stopped.is_set():
            with choosing:
                number, piece = next(numbered, (-1, None))
            if piece is None:
                return
            try:
                result = work(piece)
                with taking:
                    take(result)
            except BaseException as error:  # raised below, in the thread that waits
                stopped.set()
                errors[number] = error

    with futures.ThreadPoolExecutor(workers, thread_name_prefix="merge") as pool:
        running = [pool.submit(worker) for _ in range(workers)]
        try:
            while futures.wait(running, timeout=SECONDS_BETWEEN_REPORTS).not_done:
                while_running()
        finally:
            stopped.set()
    for future in running:
        future.result()
    if errors:
        raise errors[min(errors)]
    while_running()
