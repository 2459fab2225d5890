"""SQuAD (Rajpurkar et al. 2016): questions on a paragraph. Stands in for a set of the study."""

from __future__ import annotations

from tasks import wordings
from tasks.dataset import Dataset
from tasks.sources import JsonLines

DATASETS = (
    Dataset(
        name="squad",
        category="extractive_qa",
        metric="squad",
        link="https://rajpurkar.github.io/SQuAD-explorer/",
        fields=("context", "question", "target", "targets"),
        view=wordings.answered,
        view_fields=("answer", "all_answers"),
        prompts=wordings.PASSAGE,
        sources={"local": JsonLines(files="squad.jsonl.gz", columns="fields")},
    ),
)
