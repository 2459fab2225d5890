"""`launch.evaluate`, from gin and flags to tables and files, on a small model with random parameters."""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
import signal
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from launch import devices, evaluate, exit_codes
from launch.pod.local import run_local
from merging import evaluate as stage
from tests import score_files
from tests.launch import small_palm

REPOSITORY = pathlib.Path(__file__).parents[2]
ALONE = devices.Processes()

# Choices and a text that is written, five examples each: an odd number, and fewer than there are devices.
ASKED = {
    "MIXTURE_OR_TASK_NAME": ["causes_choose_mini", "opposites_which_mini"],
    "TASK_FEATURE_LENGTHS": {"inputs": 160, "targets": 8},
    "LIMIT": 5,
    "SHAPES": 1,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A model with random parameters."""
    return small_palm.written(tmp_path_factory.mktemp("models") / "small")


def bindings(checkpoint: pathlib.Path, output: pathlib.Path, **changes: Any) -> list[str]:
    given = {"INITIAL_CHECKPOINT_PATH": str(checkpoint), "OUTPUT_DIR": str(output)}
    return [f"{name} = {value!r}" for name, value in (given | ASKED | changes).items()]


def run(*where: pathlib.Path, is_dry_run: bool = False, **changes: Any) -> Any:
    resolved = evaluate.configured([evaluate.RUN_FILE], bindings(*where, **changes))
    return evaluate.evaluate(resolved, ALONE, is_dry_run=is_dry_run)


def records(output: pathlib.Path, model: str = "small") -> dict[str, list[dict[str, Any]]]:
    """Every example by the name of its file."""
    found = {}
    for path in sorted((output / "examples" / model).iterdir()):
        with gzip.open(path, "rt") as file:
            found[path.name] = [json.loads(line) for line in file]
    return found


@pytest.fixture(scope="module")
def whole(checkpoint: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The output of a run that wrote its examples."""
    output = tmp_path_factory.mktemp("scores") / "whole"
    report = run(checkpoint, output, WRITE_EXAMPLES=True)
    assert report.examples == 10
    return output


def test_scores_are_the_metrics_of_the_examples_that_are_written(whole: pathlib.Path):
    ranked, written = records(whole).values()
    assert list(records(whole)) == ["causes_mini_choose.jsonl.gz", "opposites_mini_which.jsonl.gz"]
    right = [each["prediction"] == each["target"] for each in ranked]
    exact = [each["prediction"] in each["target"] for each in written]
    found = {(line["task"], line["metric"]): line for line in score_files.read(whole)}
    accuracy = found["causes_mini", "accuracy"]
    assert (accuracy["value"], accuracy["count"], accuracy["chance"]) == (np.mean(right), 5, 0.5)
    assert found["opposites_mini", "exact_match"]["value"] == np.mean(exact)
    for each in ranked:
        assert len(each["choices"]) == len(each["choice_scores"]) == 2
        assert each["prediction"] == int(np.argmax(each["choice_scores"]))
        assert all(choice in each["inputs"] for choice in each["choices"])


def test_an_answer_that_is_right_counts_one(checkpoint: pathlib.Path, tmp_path: pathlib.Path):
    """Of a model that writes the first example's answer behind every prompt's last mark, a colon, and then ends."""
    from launch.evaluation import Examples, evaluation_tasks
    from tasks.miniature import vocabulary

    only = {
        "mixture_or_task_name": "opposites_which_mini",
        "lengths": {"inputs": 160, "targets": 8},
    }
    ((task,), _) = evaluation_tasks(Examples(**only, limit=5), {})
    colon, (answer,) = vocabulary().encode(":")[0], vocabulary().encode(task.examples[0].truth[0])
    assert {each.prompt[-1] for each in task.examples} == {colon}
    one, other = np.eye(16, dtype=np.float32)[[0, 2]] - np.eye(16, dtype=np.float32)[[1, 3]]
    # A token's distribution is its row times all rows: the colon's is nearest the answer's, the answer's nearest the end's.
    rows = {colon: 10 * one, answer: 20 * one + 10 * other, vocabulary().eos_id: 100 * other}
    folder = small_palm.written(tmp_path / "answering", rows)
    run(folder, tmp_path / "out", MIXTURE_OR_TASK_NAME="opposites_which_mini", WRITE_EXAMPLES=True)
    (examples,) = records(tmp_path / "out", "answering").values()
    said = task.examples[0].truth[0]
    assert [each["prediction"] for each in examples] == [said] * 5
    right = [said in each["target"] for each in examples]
    assert right[0] and not all(right)
    found = {line["metric"]: line["value"] for line in score_files.read(tmp_path / "out")}
    assert found["exact_match"] == found["f1"] == np.mean(right)


def test_few_shot_examples_stand_before_the_same_inputs(
    checkpoint: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path
):
    name = "causes_mini_choose.jsonl.gz"
    run(
        checkpoint, tmp_path / "few", FEW_SHOT=2, MIXTURE_OR_TASK_NAME="causes_choose_mini", WRITE_EXAMPLES=True
    )  # fmt: skip
    before = {each["id"]: each for each in records(whole)[name]}
    after = records(tmp_path / "few")[name]
    assert [each["id"] for each in after] == list(before)
    for each in after:
        *shots, inputs = each["inputs"].split("\n\n")
        assert inputs == before[each["id"]]["inputs"]
        assert len(shots) == 2 and len({*shots, inputs}) == 3
        assert each["choice_scores"] != before[each["id"]]["choice_scores"]


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    assert run(checkpoint, tmp_path / "out", is_dry_run=True) is None
    printed = capsys.readouterr().out
    assert "1 model on 2 tasks (1 ranked, 1 generated), 10 examples each" in printed
    assert "named_checkpoints.initial_checkpoint_path = " in printed
    assert not list(tmp_path.iterdir())


def test_the_table_has_the_spread_over_prompts_beside_their_mean():
    from merging.evaluate import Report
    from merging.evaluation.collect import Score

    scores = [
        Score(
            model="m", task="t", prompt=prompt, metric="accuracy", value=value, stderr=0.3, count=100, chance=0.5, seconds=1.0
        )
        for prompt, value in [("a", 0.25), ("b", 0.75)]
    ]  # fmt: skip
    shown = evaluate.described(
        Report(scores=scores, ties=3, examples=200, seconds=2.0), FakePlan()
    ).splitlines()
    assert shown[1].split() == "m t accuracy 0.5000 0.2121 2 0.3536 0.5000 200".split()
    assert shown[2].startswith("200 examples in 2.0 s (100/s")
    assert shown[3].startswith("3 examples had several best choices")
    cut = [dataclasses.replace(each, cut_inputs=n, cut_targets=2) for n, each in enumerate(scores)]
    shown = evaluate.described(Report(scores=cut, ties=3, was_done=True), FakePlan()).splitlines()
    assert shown[0].endswith("examples  cut inputs  cut targets")
    assert shown[1].split()[-3:] == ["200", "1", "4"]
    assert [line.split(":")[0] for line in shown[2:]] == [
        "Nothing to do", "cut inputs, cut targets", "3 examples had several best choices of equal score",
    ]  # fmt: skip


class FakePlan:
    """As much of a plan as the table needs."""

    class settings:  # noqa: N801
        output_dir = "/out"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"CHECKPOINTS": ["/a"]}, "INITIAL_CHECKPOINT_PATH, or CHECKPOINTS, and not both"),
        ({"MEASURE": "accuracy"}, "MEASURE is 'accuracy'"),
        ({"MIXTURE_OR_TASK_NAME": []}, r"MIXTURE_OR_TASK_NAME is \[\]: name at least one"),
        ({"LIMIT": 0}, "LIMIT is 0: it must be at least 1"),
        ({"TASK_FEATURE_LENGTHS": {"inputs": 8}}, "give 'inputs' and 'targets', and nothing else"),
        ({"SPLIT": "other"}, "has no split 'other'"),
        ({"ROW_LENGTH": 8}, "task causes_mini, prompt choose, example .* don't fit into 8"),
    ],
)
def test_what_can_not_be_is_told(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path, changes: dict[str, Any], told: str
):
    with pytest.raises(ValueError, match=told) as caught:
        run(checkpoint, tmp_path / "out", **changes)
    assert "In call to configurable" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_two_folders_of_one_name_need_names():
    with pytest.raises(ValueError, match="have one name: give CHECKPOINTS as {name: folder}"):
        evaluate.named_checkpoints(None, ["/a/model", "/b/model"])
    assert evaluate.named_checkpoints(None, {"x": "/a/model"}) == {"x": "/a/model"}
    assert evaluate.named_checkpoints("/a/model", None) == {"model": "/a/model"}


# ---- several processes, and one that is killed ----------------------------------------------------------------------


def command(*where: pathlib.Path, module: str = "launch.evaluate", **changes: Any) -> list[str]:
    given = bindings(*where, **changes)
    return [sys.executable, "-m", module, f"--gin_file={evaluate.RUN_FILE}"] + [
        f"--gin_bindings={each}" for each in given
    ]


@pytest.mark.slow
def test_two_processes_of_four_devices_give_the_same(
    checkpoint: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path
):
    shared = command(checkpoint, tmp_path / "out", WRITE_EXAMPLES=True)
    outputs = run_local(shared, processes=2, devices=4, timeout_s=300, echo=lambda _: None)
    assert ["10 examples in" in each for each in outputs] == [True, False]
    assert score_files.read(tmp_path / "out") == score_files.read(whole)
    for name, wanted in records(whole).items():
        for mine, theirs in zip(records(tmp_path / "out")[name], wanted, strict=True):
            scores = mine.pop("choice_scores", []), theirs.pop("choice_scores", [])
            np.testing.assert_allclose(*scores, atol=1e-5)
            assert mine == theirs


def test_sigterm_keeps_the_scores_and_the_same_command_goes_on(
    checkpoint: pathlib.Path,
    whole: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(stage, "SAVE_TOKENS", 1)  # after each task
    write, before = stage._write, signal.getsignal(signal.SIGTERM)

    def write_and_send(*arguments: Any) -> None:
        write(*arguments)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "_write", write_and_send)
        with pytest.raises(SystemExit) as ended:
            run(checkpoint, tmp_path / "out")
    assert ended.value.code == exit_codes.PREEMPTED
    assert {line["task"] for line in score_files.read(tmp_path / "out.partial")} == {"causes_mini"}
    assert run(checkpoint, tmp_path / "out").examples == 5
    assert score_files.read(tmp_path / "out") == score_files.read(whole)
    signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_and_gives_the_same(
    checkpoint: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path
):
    both = {"a": str(checkpoint), "b": str(checkpoint)}
    given = {"INITIAL_CHECKPOINT_PATH": None, "CHECKPOINTS": both}
    ended, partial = tmp_path / "ended", tmp_path / "ended.partial"
    # Of four saves, two tasks of two models, the third dies with its file written and not yet in place.
    killed = subprocess.run(
        command(checkpoint, ended, module="tests.launch.killed_evaluate", **given), cwd=REPOSITORY
    )
    assert killed.returncode == -signal.SIGKILL
    assert not ended.exists() and any(partial.glob("scores.jsonl.*.tmp"))
    assert {line["model"] for line in score_files.read(partial)} == {"a"}
    again = run(checkpoint, ended, **given)
    assert again.examples == 10  # the second model's
    assert score_files.read(ended) == [
        line | {"model": name} for name in both for line in score_files.read(whole)
    ]
    assert not any(ended.glob("*.tmp"))
