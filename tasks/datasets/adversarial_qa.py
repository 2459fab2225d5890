"""AdversarialQA (Bartolo et al. 2020): questions on a passage, made to fool three readers; one dataset for each."""

from __future__ import annotations

from tasks import wordings
from tasks.dataset import Dataset, Row
from tasks.sources import HuggingFace


def view(row: Row) -> Row:
    """The first answer is learnt; all count as right."""
    answers = tuple(dict.fromkeys(row["answers"]["text"]))
    return {**row, "answer": answers[0], "all_answers": answers}


def against(reader: str) -> Dataset:
    """The part whose questions were made against one reader."""
    return Dataset(
        name=f"adversarial_qa_{reader}",
        part_of="adversarial_qa",
        p3=f"adversarial_qa/{reader}",
        category="extractive_qa",
        metric="squad",
        link="https://adversarialqa.github.io/",
        fields=("context", "question", "answers"),
        view=view,
        view_fields=("answer", "all_answers"),
        prompts=wordings.PASSAGE,
        sources={
            "": HuggingFace(
                repository="UCLNLP/adversarial_qa",
                config=reader,
                splits={"train": "train", "validation": "validation"},
                sizes={"train": 10_000, "validation": 1_000},
            ),
        },
    )


DATASETS = tuple(against(reader) for reader in ("dbidaf", "dbert", "droberta"))
