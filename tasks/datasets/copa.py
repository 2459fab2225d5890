"""COPA (Roemmele et al. 2011), as SuperGLUE has it: the likelier cause or effect of what is told."""

from __future__ import annotations

from tasks.dataset import Dataset, Ranked, Row
from tasks.sources import JsonLines, Tfds


def view(row: Row) -> Row:
    """What is asked for is a word of the row (HF: "cause" or "effect")."""
    is_cause = row["question"] == "cause"
    return {
        **row,
        "link": "because" if is_cause else "so",
        "asked": "the cause of this" if is_cause else "the effect of this",
        "when": "before" if is_cause else "afterwards",
        "stem": row["premise"].strip().rstrip("."),
        "endings": tuple(row[choice].strip() for choice in ("choice1", "choice2")),
    }


DATASETS = (
    Dataset(
        name="copa",
        p3="super_glue/copa",
        category="sentence_completion",
        metric="accuracy",
        link="https://people.ict.usc.edu/~gordon/copa.html",
        aliases=("super_glue/copa", "balanced_copa"),
        fields=("premise", "choice1", "choice2", "question", "label"),
        view=view,
        view_fields=("link", "asked", "when", "stem", "endings"),
        prompts={
            "link": Ranked(inputs="{stem}, {link}...", choices="endings"),
            "which": Ranked(
                inputs="{premise}\n\nWhat is {asked}?\n- {choice1}\n- {choice2}\n\nAnswer:",
                choices="endings",
            ),
            "story": Ranked(
                inputs="This happened: {premise} Which of two things happened {when}:"
                ' "{choice1}" or "{choice2}"?',
                choices="endings",
            ),
        },
        sources={
            "": Tfds(
                name="super_glue/copa:1.0.2",
                splits={"train": "train", "validation": "validation"},
                sizes={"train": 400, "validation": 100},
            ),
            "local": JsonLines(files="copa.jsonl.gz", columns="fields"),
        },
    ),
)
