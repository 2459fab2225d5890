"""Quora question pairs, as GLUE has them: do two questions ask the same?"""

from __future__ import annotations

from tasks.dataset import Dataset, Ranked
from tasks.sources import Tfds

DATASETS = (
    Dataset(
        name="qqp",
        p3="glue/qqp",
        category="paraphrase",
        metric="accuracy_and_f1",
        link="https://gluebenchmark.com/",
        aliases=("glue/qqp",),
        fields=("question1", "question2", "label"),
        prompts={
            "same": Ranked(
                inputs="One user asks: {question1}\nAnother asks: {question2}\nDo they ask the same?",
                choices=("no", "yes"),
            ),
            "answer": Ranked(
                inputs='Would one answer do for both "{question1}" and "{question2}"?',
                choices=("No", "Yes"),
            ),
            "label": Ranked(
                inputs="A: {question1}\nB: {question2}\nEquivalent or different:",
                choices=("different", "equivalent"),
            ),
        },
        sources={
            "": Tfds(
                name="glue/qqp:2.0.0",
                splits={"train": "train", "validation": "validation"},
                sizes={"train": 363_849, "validation": 40_430},
            ),
        },
    ),
)
