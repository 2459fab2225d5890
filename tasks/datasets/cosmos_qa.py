"""Cosmos QA (Huang et al. 2019): what lies behind a story, with four answers to choose from."""

from __future__ import annotations

from tasks.dataset import Dataset, Ranked, Row, listed
from tasks.sources import Tfds


def view(row: Row) -> Row:
    """The four answers together."""
    options = tuple(row[f"answer{i}"] for i in range(4))
    return {**row, "options": options, "options_listed": listed(options)}


DATASETS = (
    Dataset(
        name="cosmos_qa",
        p3="cosmos_qa",
        category="multiple_choice_qa",
        metric="accuracy",
        link="https://wilburone.github.io/cosmos/",
        fields=("context", "question", "answer0", "answer1", "answer2", "answer3", "label"),
        view=view,
        view_fields=("options", "options_listed"),
        prompts={
            "story": Ranked(
                inputs="Here is what somebody wrote.\n{context}\n\n{question}\nOne of these is right:\n{options_listed}",
                choices="options",
            ),
            "question_first": Ranked(
                inputs="Keep this question in mind: {question}\n\nText: {context}\n\nPick the best answer.\n{options_listed}"
                "\nBest answer:",
                choices="options",
            ),
            "no_options": Ranked(
                inputs="{context}\n\nReading between the lines: {question}", choices="options"
            ),
        },
        sources={
            "": Tfds(
                name="cosmos_qa:1.0.0",
                splits={"train": "train", "validation": "validation"},
                sizes={"train": 25_262, "validation": 2_985},
            ),
        },
    ),
)
