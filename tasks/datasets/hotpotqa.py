"""HotpotQA (Yang et al. 2018) as KILT has it (Petroni et al. 2021): questions over two facts, without a text."""

from __future__ import annotations

from tasks import wordings
from tasks.dataset import Dataset, Row
from tasks.sources import HuggingFace


def view(row: Row) -> Row:
    """The first answer is learnt; all count as right."""
    answers = tuple(dict.fromkeys(each["answer"] for each in row["output"] if each["answer"]))
    return {"question": row["input"], "answer": answers[0], "all_answers": answers}


DATASETS = (
    Dataset(
        name="hotpotqa",
        p3="kilt_tasks/hotpotqa",
        category="closed_book_qa",
        metric="squad",
        link="https://huggingface.co/datasets/facebook/kilt_tasks",
        fields=("input", "output"),
        view=view,
        view_fields=("question", "answer", "all_answers"),
        prompts=wordings.CLOSED_BOOK,
        sources={
            "": HuggingFace(
                repository="facebook/kilt_tasks",
                config="hotpotqa",
                splits={"train": "train", "validation": "validation"},
                sizes={"train": 88_869, "validation": 5_600},
            ),
        },
    ),
)
