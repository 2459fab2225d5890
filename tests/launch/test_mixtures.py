"""Mixtures of files of one's own, and how a configuration says what is trained and validated on."""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib

import pytest

from launch import finetune
from launch.mixtures import Mixtures, mixtures
from tests.tasks.conftest import row


def test_rows_to_train_on_alone(tmp_path: pathlib.Path):
    lines = [json.dumps({"split": "train", "fields": row(number)}) for number in range(8)]
    content = gzip.compress("\n".join(lines).encode())
    (tmp_path / "rotten_tomatoes.jsonl.gz").write_bytes(content)
    asked = Mixtures(
        name="rotten_tomatoes_tone_local",
        names=None,
        lengths={"inputs": 180, "targets": 20},
        cache_dir=str(tmp_path / "packed"),
    )
    registered = {"vocabulary": "bytes", "local_data": str(tmp_path), "rate_cap": 500_000}
    with pytest.raises(ValueError, match=r"no validation example: .*or VALIDATION_SPLIT=None"):
        mixtures(asked, registered, train_rows=4)
    trained = dataclasses.replace(asked, validation_split=None)
    (made,) = mixtures(trained, registered, train_rows=4)
    assert made.validation is None
    batch, _ = next(made.train(2, 0, 1).read(None))
    assert batch["tokens"].shape == (2, 200)


def test_macros_say_how_examples_become_rows():
    bindings = [
        "MIXTURE_OR_TASK_NAME = 'sentiment_mini'",
        "INITIAL_CHECKPOINT_PATH = '/base'",
        "OUTPUT_DIR = '/out'",
        "TRUNCATION = 'start'",
        "VALIDATION_SPLIT = 'test'",
        "VALIDATION_ROWS = 7",
        "VALIDATION_TASKS = 'paraphrase_mini'",
        "VALIDATION_LIMIT = 3",
        "CHOOSE = 'best'",
        "BEST_METRIC = 'score'",
    ]
    found = finetune.configured(["gin_configs/runs/expert.gin"], bindings).arguments
    rows, scored, settings = found["mixtures"], found["validation"], found["settings"]
    assert (rows.truncation, rows.validation_split, rows.validation_rows) == ("start", "test", 7)
    assert (scored.names, scored.limit, scored.split) == ("paraphrase_mini", 3, "test")
    assert scored.truncation == "start" and scored.lengths == rows.lengths
    assert settings.best_metric == "score" and settings.is_judged and not settings.is_lowest_best
    with pytest.raises(ValueError, match="VALIDATION_ROWS is 0"):
        dataclasses.replace(rows, validation_rows=0)
