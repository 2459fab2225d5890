"""`launch.evaluate`, killed at its third save: what was to be put in place lies beside it."""

from __future__ import annotations

import os
import signal

from etils import epath

from launch import command, evaluate
from merging import evaluate as stage
from merging.checkpoints import storage
from merging.evaluation import collect

SAVES = 2

_saved: list[epath.Path] = []


def put_whole(path: epath.Path, content: bytes) -> None:
    if len(_saved) == SAVES:
        type(path).replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
    _saved.append(path)
    storage.put_whole(path, content)


if __name__ == "__main__":
    stage.SAVE_TOKENS = 1  # after each task
    collect.put_whole = put_whole
    evaluate.define_flags()
    command.run(evaluate.main)
