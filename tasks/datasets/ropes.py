"""ROPES (Lin et al. 2019): what a background implies for a situation."""

from __future__ import annotations

from tasks.dataset import Dataset, Generated, Row
from tasks.sources import HuggingFace


def view(row: Row) -> Row:
    """The first answer is learnt; all count as right."""
    answers = tuple(dict.fromkeys(row["answers"]["text"]))
    return {**row, "answer": answers[0], "all_answers": answers}


DATASETS = (
    Dataset(
        name="ropes",
        p3="ropes",
        category="extractive_qa",
        metric="squad",
        link="https://huggingface.co/datasets/allenai/ropes",
        fields=("background", "situation", "question", "answers"),
        view=view,
        view_fields=("answer", "all_answers"),
        prompts={
            "apply": Generated(
                inputs="What is known: {background}\n\nWhat happens: {situation}\n\nApply what is known. {question}",
                targets="{answer}",
                references="all_answers",
            ),
            "situation_first": Generated(
                inputs="{situation}\n\n{question}\nThis paragraph helps:\n{background}\n\nAnswer:",
                targets="{answer}",
                references="all_answers",
            ),
            "question_first": Generated(
                inputs="Question: {question}\n\nBackground: {background}\n\nSituation: {situation}\n\nAnswer in a few words:",
                targets="{answer}",
                references="all_answers",
            ),
        },
        sources={
            "": HuggingFace(
                repository="allenai/ropes",
                config="plain_text",
                splits={"train": "train", "validation": "validation"},
                sizes={"train": 10_924, "validation": 1_688},
            ),
        },
    ),
)
