"""PAWS (Zhang et al. 2019): sentences that share their words, and may not share their meaning. Stands in for a set of the study."""

from __future__ import annotations

from tasks import wordings
from tasks.dataset import Dataset
from tasks.sources import JsonLines

DATASETS = (
    Dataset(
        name="paws",
        category="paraphrase",
        metric="accuracy",
        link="https://github.com/google-research-datasets/paws",
        fields=("sentence1", "sentence2", "label"),
        prompts=wordings.SAME_MEANING,
        sources={"local": JsonLines(files="paws.jsonl.gz", columns="fields")},
    ),
)
