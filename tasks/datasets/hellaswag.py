"""HellaSwag (Zellers et al. 2019): how does a scene go on?"""

from __future__ import annotations

from tasks.dataset import Dataset, Ranked, Row, listed
from tasks.sources import HuggingFace


def view(row: Row) -> Row:
    """The endings as choices; the label is a digit as text."""
    endings = tuple(row["endings"])
    return {
        "context": row["ctx"],
        "endings": endings,
        "endings_listed": listed(endings),
        "label": int(row["label"]),
    }


DATASETS = (
    Dataset(
        name="hellaswag",
        p3="hellaswag",
        category="sentence_completion",
        metric="accuracy",
        link="https://rowanzellers.com/hellaswag/",
        fields=("ctx", "endings", "label"),
        view=view,
        view_fields=("context", "endings_listed"),
        prompts={
            "plain": Ranked(inputs="{context}", choices="endings"),
            "continue": Ranked(
                inputs="Here is the beginning of a description: {context}\nThis is how it goes on:",
                choices="endings",
            ),
            "options": Ranked(
                inputs="{context} ...\n\nWhich of these continues it best?\n{endings_listed}\nBest:",
                choices="endings",
            ),
        },
        sources={
            "": HuggingFace(
                repository="Rowan/hellaswag",
                splits={"train": "train", "validation": "validation"},
                sizes={"train": 39_905, "validation": 10_042},
            ),
        },
    ),
)
