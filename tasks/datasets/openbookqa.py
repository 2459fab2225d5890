"""OpenBookQA (Mihaylov et al. 2018): school science, with four answers to choose from. Stands in for a set of the study."""

from __future__ import annotations

from tasks.dataset import Dataset, Ranked, Row, listed
from tasks.sources import JsonLines


def view(row: Row) -> Row:
    """The choices, and the right letter as an index."""
    choices = row["choices"]
    return {
        "stem": row["question_stem"],
        "options": tuple(choices["text"]),
        "options_listed": listed(choices["text"]),
        "label": list(choices["label"]).index(row["answerKey"]),
    }


DATASETS = (
    Dataset(
        name="openbookqa",
        category="multiple_choice_qa",
        metric="accuracy",
        link="https://allenai.org/data/open-book-qa",
        fields=("question_stem", "choices", "answerKey"),
        view=view,
        view_fields=("stem", "options", "options_listed", "label"),
        prompts={
            "complete": Ranked(inputs="{stem}", choices="options"),
            "options": Ranked(
                inputs="{stem}\n\nChoose what is right.\n{options_listed}\nRight:",
                choices="options",
            ),
            "test": Ranked(
                inputs="A test in science has these answers:\n{options_listed}\nThey belong to: {stem}\nAnswer:",
                choices="options",
            ),
        },
        sources={"local": JsonLines(files="openbookqa.jsonl.gz", columns="fields")},
    ),
)
