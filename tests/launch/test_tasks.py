"""What `python -m launch.tasks` prints."""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
import subprocess
import sys

import pytest

from launch import tasks as command


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.tasks", *arguments], capture_output=True, text=True
    )


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    row = {"id": "one", "split": "validation", "fields": {"text": "Who sings ?", "label_coarse": 3}}
    (tmp_path / "trec.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    return tmp_path


def test_the_listing():
    lines = [
        " ".join(line.split())
        for line in command.listed({"rate_cap": 500_000}, None, command.painter(False))
    ]
    assert "study: 28 datasets, suffix ''" in lines
    assert (
        "word_sense held_out wic accuracy same dictionary senses 5,428 638 tfds super_glue/wic:1.0.2"
        in lines
    )
    assert "structure_to_text 6 702,165" in lines  # 3 x 67,389 and 3 x (500,000 // 3)
    assert "sentiment_local 6 ?" in lines  # its folder was not given
    with pytest.raises(
        ValueError, match="there is no collection 'loca'; known: study, local, mini"
    ):
        list(command.listed({}, ["loca"], command.painter(False)))


def test_the_listing_has_the_instruction_mixture_and_p3s_prompts(monkeypatch: pytest.MonkeyPatch):
    from tasks import p3

    names = ["opposites_which_mini", "opposites_question_mini"]
    given = {"rate_cap": 10, "instruction_tasks": names}
    told = list(command.listed(given, ["mini"], command.painter(False)))
    assert told[-2].split() == ["instruction", "2", "6"]  # 10 // 3 of each
    assert told[-1] == f"of {', '.join(names)}"

    def one(datasets):
        return [
            dataclasses.replace(d, prompts={"theirs": d.prompts["link"]})
            for d in datasets
            if d.name == "copa"
        ]

    monkeypatch.setattr(p3, "with_p3_prompts", one)
    told = list(command.listed({"prompts": "p3"}, ["study"], command.painter(False)))
    assert told[0].startswith("study: 1 datasets")
    assert " theirs " in told[2]


def test_gin_and_flags_say_what_is_registered():
    found = command.configured(
        [],
        ['INSTRUCTION_TASKS = ["sentiment"]', "RATE_CAP = 10"],
        vocabulary="bytes",
        local_data="/d",
    )
    assert found == {
        "vocabulary": "bytes",
        "local_data": "/d",
        "instruction_tasks": ["sentiment"],
        "rate_cap": 10,
        "prompts": "own",
        "tasks_module": (),
    }
    with pytest.raises(ValueError, match="nothing uses a macro RATE.* Did you mean RATE_CAP"):
        command.configured([], ["RATE = 10"])


def test_an_example_in_colours_and_an_error(folder: pathlib.Path):
    done = run("trec_label_local", f"--local_data={folder}", "--color=always", "--vocabulary=bytes")
    assert done.returncode == 0, done.stderr
    assert (
        "\033[34mQuestion: Who sings ?\nKind of answer:\033[0m\n\033[32mPerson\033[0m\n"
        in done.stdout
    )
    assert (
        "choices: Description | Entity | Abbreviation | Person | Quantity | Location" in done.stdout
    )
    done = run("--collection=loca")
    assert done.returncode == 1
    assert "Error: there is no collection 'loca'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_miniature_is_described_in_numbers(monkeypatch: pytest.MonkeyPatch):
    from tasks.miniature import summary

    monkeypatch.setattr(summary, "TABLE", {"causes": summary.TABLE["causes"]})
    for _ in range(2):
        head, causes, corpus, vocabulary = summary.lines()
        assert "majority" in head and "chance" in head
        assert causes.split()[:5] == [
            "causes",
            "sentence_completion",
            "copa",
            "accuracy",
            "/".join(map(str, summary.generators.SIZES.values())),
        ]
        assert causes.split()[5:7] == [
            "0.500",
            "0.500",
        ]  # two choices, and neither place is preferred
        assert corpus.startswith("corpus: ") and vocabulary.startswith("vocabulary: ")
