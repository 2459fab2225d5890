"""WebQuestions (Berant et al. 2013): what people ask a search engine. Stands in for a set of the study."""

from __future__ import annotations

from tasks import wordings
from tasks.dataset import Dataset
from tasks.sources import JsonLines

DATASETS = (
    Dataset(
        name="web_questions",
        category="closed_book_qa",
        metric="squad",
        link="https://nlp.stanford.edu/software/sempre/",
        fields=("question", "target", "targets"),
        view=wordings.asked,
        view_fields=("answer", "all_answers"),
        prompts=wordings.CLOSED_BOOK,
        sources={"local": JsonLines(files="web_questions.jsonl.gz", columns="fields")},
    ),
)
