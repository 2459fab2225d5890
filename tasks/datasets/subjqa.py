"""SubjQA (Bjerva et al. 2020): questions on a review, answered by a part of it. Stands in for a set of the study."""

from __future__ import annotations

from tasks import wordings
from tasks.dataset import Dataset
from tasks.sources import JsonLines

DATASETS = (
    Dataset(
        name="subjqa",
        category="extractive_qa",
        metric="squad",
        link="https://github.com/megagonlabs/SubjQA",
        fields=("context", "question", "target", "targets"),
        view=wordings.answered,
        view_fields=("answer", "all_answers"),
        prompts=wordings.PASSAGE,
        sources={"local": JsonLines(files="subjqa.jsonl.gz", columns="fields")},
    ),
)
