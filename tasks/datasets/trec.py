"""TREC-6 (Li and Roth 2002): what does a question ask for? Stands in for a set of the study."""

from __future__ import annotations

from tasks.dataset import Dataset, Ranked
from tasks.sources import JsonLines

ASKED = ("a description", "a thing", "an abbreviation", "a person", "a number", "a place")

DATASETS = (
    Dataset(
        name="trec",
        category="topic_classification",
        metric="accuracy",
        link="https://cogcomp.seas.upenn.edu/Data/QA/QC/",
        fields=("text", "label_coarse"),
        prompts={
            "asks": Ranked(
                inputs="{text}\nWhat kind of answer does this question ask for: "
                + ", ".join(ASKED)
                + "?",
                choices=ASKED,
                label="label_coarse",
            ),
            "answer": Ranked(
                inputs='The answer to "{text}" would be', choices=ASKED, label="label_coarse"
            ),
            "label": Ranked(
                inputs="Question: {text}\nKind of answer:",
                choices=("Description", "Entity", "Abbreviation", "Person", "Quantity", "Location"),
                label="label_coarse",
            ),
        },
        sources={"local": JsonLines(files="trec.jsonl.gz", columns="fields")},
    ),
)
