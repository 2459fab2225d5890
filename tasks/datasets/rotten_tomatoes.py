"""Rotten Tomatoes (Pang and Lee 2005): sentences of film reviews. Stands in for a set of the study."""

from __future__ import annotations

from tasks import wordings
from tasks.dataset import Dataset
from tasks.sources import JsonLines

DATASETS = (
    Dataset(
        name="rotten_tomatoes",
        category="sentiment",
        metric="accuracy",
        link="https://www.cs.cornell.edu/people/pabo/movie-review-data/",
        fields=("text", "label"),
        prompts=wordings.REVIEW,
        sources={"local": JsonLines(files="rotten_tomatoes.jsonl.gz", columns="fields")},
    ),
)
