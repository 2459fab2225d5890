"""NQ-open (Lee et al. 2019): questions without a text. Stands in for a set of the study."""

from __future__ import annotations

from tasks import wordings
from tasks.dataset import Dataset
from tasks.sources import JsonLines

DATASETS = (
    Dataset(
        name="nq_open",
        category="closed_book_qa",
        metric="squad",
        link="https://github.com/google-research-datasets/natural-questions",
        fields=("question", "target", "targets"),
        view=wordings.asked,
        view_fields=("answer", "all_answers"),
        prompts=wordings.CLOSED_BOOK,
        sources={"local": JsonLines(files="nq_open.jsonl.gz", columns="fields")},
    ),
)
