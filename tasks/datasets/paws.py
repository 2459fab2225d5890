"""PAWS (Zhang et al. 2019): sentences that share their words, and may not share their meaning. Stands in for a set of the study."""

from __future__ import annotations

from tasks.dataset import Dataset, Ranked
from tasks.sources import JsonLines

DATASETS = (
    Dataset(
        name="paws",
        category="paraphrase",
        metric="accuracy",
        link="https://github.com/google-research-datasets/paws",
        fields=("sentence1", "sentence2", "label"),
        prompts={
            "same": Ranked(
                inputs="First: {sentence1}\nSecond: {sentence2}\nDo the two sentences say the same?",
                choices=("no", "yes"),
            ),
            "replace": Ranked(
                inputs='Could "{sentence1}" be replaced with "{sentence2}" without a change of meaning?',
                choices=("No", "Yes"),
            ),
            "label": Ranked(
                inputs="A: {sentence1}\nB: {sentence2}\nA and B are equivalent or different:",
                choices=("different", "equivalent"),
            ),
        },
        sources={"local": JsonLines(files="paws.jsonl.gz", columns="fields")},
    ),
)
