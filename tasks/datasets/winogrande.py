"""WinoGrande XL (Sakaguchi et al. 2020): which of two fills the blank?"""

from __future__ import annotations

from tasks.dataset import Dataset, Ranked, Row
from tasks.sources import HuggingFace


def view(row: Row) -> Row:
    """The sentence up to the blank, both fillings, and the answer ("1" or "2") as an index."""
    before, _, after = row["sentence"].partition("_")
    return {
        **row,
        "label": int(row["answer"]) - 1,
        "options": (row["option1"], row["option2"]),
        "before": before.strip(),
        "after": after.strip(),
    }


DATASETS = (
    Dataset(
        name="winogrande",
        p3="winogrande/winogrande_xl",
        category="coreference",
        metric="accuracy",
        link="https://winogrande.allenai.org/",
        aliases=("winogrande_xl",),
        fields=("sentence", "option1", "option2", "answer"),
        view=view,
        view_fields=("label", "options", "before", "after"),
        prompts={
            "blank": Ranked(
                inputs="{sentence}\n\nWhat belongs where the _ is, {option1} or {option2}?",
                choices="options",
            ),
            "who": Ranked(
                inputs="Fill the gap with one of two.\nText: {before} ___ {after}\nEither: {option1}\nOr: {option2}\nGap:",
                choices="options",
            ),
            "refers": Ranked(
                inputs="In the sentence below, the _ stands for\n- {option1}\n- {option2}\n\n{sentence}\n\nIt stands for",
                choices="options",
            ),
        },
        sources={
            "": HuggingFace(
                repository="allenai/winogrande",
                config="winogrande_xl",
                splits={"train": "train", "validation": "validation"},
                sizes={"train": 40_398, "validation": 1_267},
            ),
        },
    ),
)
