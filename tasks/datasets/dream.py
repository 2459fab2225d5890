"""DREAM (Sun et al. 2019): a question on a dialogue, with three answers to choose from."""

from __future__ import annotations

from tasks.dataset import Dataset, Ranked, Row, listed
from tasks.sources import HuggingFace, JsonLines


def view(row: Row) -> Row:
    """The dialogue as lines, the label as an index."""
    return {
        **row,
        "dialogue": "\n".join(row["dialogue"]),
        "label": list(row["choice"]).index(row["answer"]),
        "options": listed(row["choice"]),
    }


DATASETS = (
    Dataset(
        name="dream",
        p3="dream",
        category="multiple_choice_qa",
        metric="accuracy",
        link="https://huggingface.co/datasets/dataset-org/dream",
        fields=("dialogue", "question", "choice", "answer"),
        view=view,
        view_fields=("label", "options"),
        prompts={
            "overheard": Ranked(
                inputs="You overhear this talk.\n\n{dialogue}\n\n{question} Choose one of these answers.\n{options}",
                choices="choice",
            ),
            "question_first": Ranked(
                inputs="Question: {question}\nPossible answers:\n{options}\n\nThe dialogue that it is about:"
                "\n{dialogue}\n\nAnswer:",
                choices="choice",
            ),
            "no_options": Ranked(
                inputs="{dialogue}\n\nAfter reading the dialogue above, answer this: {question}",
                choices="choice",
            ),
        },
        sources={
            "": HuggingFace(
                repository="dataset-org/dream",
                config="plain_text",
                splits={"train": "train", "validation": "validation"},
                sizes={"train": 6_116, "validation": 2_040},
            ),
            "local": JsonLines(files="dream.jsonl.gz", columns="fields"),
        },
    ),
)
