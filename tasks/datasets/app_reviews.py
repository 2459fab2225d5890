"""App Reviews (Grano et al. 2017): how many stars go with the review of an app?

It has no split but train; its last twentieth, whose apps are others, is validation here (T0 evaluates on none).
"""

from __future__ import annotations

from tasks.dataset import Dataset, Ranked, Row
from tasks.sources import HuggingFace


def view(row: Row) -> Row:
    """One to five stars as an index."""
    return {**row, "label": row["star"] - 1}


DATASETS = (
    Dataset(
        name="app_reviews",
        p3="app_reviews",
        category="sentiment",
        metric="accuracy",
        link="https://huggingface.co/datasets/sealuzh/app_reviews",
        fields=("review", "package_name", "star"),
        view=view,
        view_fields=("label",),
        prompts={
            "stars": Ranked(
                inputs="Review of an app: {review}\nHow many stars, from one to five, come with it?",
                choices=("one", "two", "three", "four", "five"),
            ),
            "pleased": Ranked(
                inputs='A user of {package_name} writes: "{review}" How pleased is this user?',
                choices=("not at all", "hardly", "so so", "pleased", "very pleased"),
            ),
            "score": Ranked(
                inputs="{review}\n\nScore that this review gives, where 1 is worst and 5 is best:",
                choices=("1", "2", "3", "4", "5"),
            ),
        },
        sources={
            "": HuggingFace(
                repository="sealuzh/app_reviews",
                splits={"train": "train[:95%]", "validation": "train[95%:]"},
                sizes={"train": 273_662, "validation": 14_403},
            ),
        },
    ),
)
