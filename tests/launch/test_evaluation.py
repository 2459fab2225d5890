"""Registered tasks as what the evaluate and finetune stages take: what their identity depends on."""

from __future__ import annotations

import gzip
import json
import pathlib
from typing import Any

import pytest

from launch.evaluation import Examples, evaluation_tasks
from launch.mixtures import Mixtures, mixtures

LENGTHS = {"inputs": 64, "targets": 8}


def put(folder: pathlib.Path, *texts: str) -> pathlib.Path:
    """A set of reviews: a row of each split for each text."""
    folder.mkdir(exist_ok=True)
    rows = [
        {"id": f"{split}-{number}", "split": split, "fields": {"text": text, "label": number % 2}}
        for split in ("train", "validation")
        for number, text in enumerate(texts)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rotten_tomatoes.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder


def evaluated(folder: pathlib.Path, *more: str) -> dict[str, Any]:
    names = ["rotten_tomatoes_liked_local", *more]
    asked = Examples(mixture_or_task_name=names, lengths=LENGTHS, limit=2)
    return evaluation_tasks(asked, {"local_data": str(folder)})[1]


def streamed(folder: pathlib.Path) -> dict[str, Any]:
    asked = Mixtures(
        name="rotten_tomatoes_liked_local", names=None, lengths=LENGTHS, stream=True, validation_split=None
    )  # fmt: skip
    registered = {"local_data": str(folder), "rate_cap": 10, "vocabulary": None}
    (found,) = mixtures(asked, registered, train_rows=1)
    return dict(found.identity)


@pytest.mark.parametrize("identity", [evaluated, streamed])
def test_a_data_set_that_was_changed_makes_another_identity(identity, tmp_path: pathlib.Path):
    before = identity(put(tmp_path / "a", "a good film", "a bad film"))
    assert identity(tmp_path / "a") == before
    put(tmp_path / "a", "a good film", "a really bad film")
    assert identity(tmp_path / "a") != before
    assert json.loads(json.dumps(before)) == before  # it goes into manifests


def test_bytes_of_a_text_that_is_cut_are_those_of_its_kept_tokens(tmp_path: pathlib.Path):
    folder = put(tmp_path / "a", "a good film", "a bad film")
    asked = Examples(
        mixture_or_task_name="rotten_tomatoes_tone_local", lengths={"inputs": 64, "targets": 4}, measure="loss"
    )  # fmt: skip
    ((task,), _) = evaluation_tasks(asked, {"local_data": str(folder), "vocabulary": "bytes"})
    assert [len(each.choices[0]) for each in task.examples] == [4, 4]  # with the end
    assert [each.choices_text for each in task.examples] == [("neg",), ("pos",)]
    assert [each.nbytes for each in task.examples] == [[3], [3]]


def test_the_vocabulary_of_every_set_counts(tmp_path: pathlib.Path, monkeypatch):
    from tasks import vocabularies

    folder = put(tmp_path / "a", "a good film", "a bad film")
    names = {type(vocabularies.load("bytes")).__name__: "1", "WordVocabulary": "2"}
    monkeypatch.setattr(vocabularies, "digest", lambda each: names[type(each).__name__])
    found = evaluated(folder, "causes_choose_mini")
    assert found["vocabularies"] == {"inputs": ["1", "2"], "targets": ["1", "2"]}
    assert set(found["tasks"]) == {"rotten_tomatoes_liked_local", "causes_choose_mini"}
