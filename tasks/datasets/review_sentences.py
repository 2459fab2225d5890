"""Sentences of reviews (Kotzias et al. 2015) of products, films and restaurants. Stands in for a set of the study."""

from __future__ import annotations

from tasks import wordings
from tasks.dataset import Dataset
from tasks.sources import JsonLines

DATASETS = (
    Dataset(
        name="review_sentences",
        category="sentiment",
        metric="accuracy",
        link="https://archive.ics.uci.edu/dataset/331/",
        fields=("text", "label"),
        prompts=wordings.REVIEW,
        sources={"local": JsonLines(files="review_sentences.jsonl.gz", columns="fields")},
    ),
)
