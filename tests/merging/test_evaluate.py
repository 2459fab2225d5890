"""The evaluate stage: from checkpoints to scores.jsonl, interrupted or not."""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib

import flax.traverse_util
import numpy as np
import pytest
from safetensors.numpy import save_file

from merging import evaluate
from merging.evaluation.collect import ScoresFile
from merging.models import model_file
from tests import score_files
from tests.merging.evaluation.test_evaluator import MODEL, OPTIONS, TASKS, params
from tests.merging.models import families


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {}
    for seed, name in enumerate("ab"):
        folder = tmp_path_factory.mktemp("models") / name
        folder.mkdir()
        leaves = flax.traverse_util.flatten_dict(params(seed), sep="/")
        save_file({k: np.asarray(v) for k, v in leaves.items()}, folder / "model.safetensors")
        model_file.write(folder, MODEL.config, {"layers": 0}, None)
        made[name] = str(folder)
    return made


def settings(checkpoints, output: pathlib.Path, **changes) -> evaluate.Settings:
    options = {k: v for k, v in dataclasses.asdict(OPTIONS).items() if k != "bidirectional"}
    return evaluate.Settings(output_dir=str(output), checkpoints=checkpoints, **options | changes)


def planned(checkpoints, output: pathlib.Path, tasks=TASKS, **changes) -> evaluate.Plan:
    return evaluate.plan(
        settings(checkpoints, output, **changes), tasks, tasks_identity={"of": "test"}
    )


def test_a_run_that_was_ended_goes_on_and_gives_the_same(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "SAVE_TOKENS", 1)  # after each task
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    report = evaluate.run(planned(checkpoints, whole, write_examples=True))
    assert [(s["model"], s["task"], s["metric"]) for s in score_files.read(whole)] == [
        (model, task, metric)
        for model in "ab"
        for task, metric in [
            ("many", "accuracy"), ("few", "accuracy"), ("written", "exact"), ("text", "nats_per_token"),
            ("text", "bits_per_byte"),
        ]
    ]  # fmt: skip
    assert report.examples == 2 * sum(len(task.examples) for task in TASKS)

    def ends(model: str, done: int, total: int) -> None:
        if model == "b" and done > 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate.run(planned(checkpoints, ended, write_examples=True), progress=ends)
    assert not ended.exists()
    partial = ended.with_name("ended.partial")
    before = len(ScoresFile(partial / "scores.jsonl").scores)
    assert 5 < before < 10
    again = evaluate.run(planned(checkpoints, ended, write_examples=True))
    assert 0 < again.examples < report.examples / 2
    assert score_files.read(ended) == score_files.read(whole)
    third = evaluate.run(planned(checkpoints, ended, write_examples=True))
    assert third.was_done and len(third.scores) == 10
    manifests = [json.loads((each / "manifest.json").read_text()) for each in (whole, ended)]
    assert manifests[0]["ties"] == manifests[1]["ties"] == report.ties == again.ties == third.ties

    with gzip.open(ended / "examples" / "b" / "many_a.jsonl.gz", "rt") as file:
        records = [json.loads(line) for line in file]
    assert [record["id"] for record in records] == [each.id for each in TASKS[0].examples]
    for record in records:
        assert record["prediction"] == int(np.argmax(record["choice_scores"]))


def test_another_configuration_in_the_same_folder_is_refused(checkpoints, tmp_path):
    one = {"a": checkpoints["a"]}
    evaluate.run(planned(one, tmp_path / "out", TASKS[1:2]))
    with pytest.raises(ValueError, match="differs in settings"):
        evaluate.run(planned(one, tmp_path / "out", TASKS[1:2], normalization="tokens"))


def test_tokens_that_a_model_lacks_are_refused(checkpoints, tmp_path):
    foreign = dataclasses.replace(
        TASKS[1],
        examples=[dataclasses.replace(TASKS[1].examples[0], prompt=np.array([64], np.int32))],
    )
    with pytest.raises(
        ValueError, match="model a has a vocabulary of 64 and the tasks have a token 64"
    ):
        planned(checkpoints, tmp_path / "out", [foreign])


def test_rows_are_no_longer_than_what_the_model_has_learnt():
    small = evaluate.Settings(output_dir="/out", checkpoints={})

    def row_length(limit: int | None, given: int | None) -> int:
        config = dataclasses.replace(families.CONFIGS["llama"], max_positions=limit)
        return dataclasses.replace(small, row_length=given).options(config).row_length

    assert small.options(MODEL.config).row_length == 2_048
    assert [row_length(limit, None) for limit in (None, 512, 8_192)] == [2_048, 512, 2_048]
    assert [row_length(limit, 512) for limit in (None, 512, 8_192)] == [512] * 3
    with pytest.raises(
        ValueError, match="ROW_LENGTH is 513, and the model has learnt 512 positions"
    ):
        row_length(512, 513)


def test_a_checkpoint_that_is_gone_is_named(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        planned({"a": str(tmp_path / "nowhere")}, tmp_path / "out")
    assert not list(tmp_path.iterdir())
