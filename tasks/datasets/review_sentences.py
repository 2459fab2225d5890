"""Sentences of reviews (Kotzias et al. 2015) of products, films and restaurants. Stands in for a set of the study."""

from __future__ import annotations

from tasks.dataset import Dataset, Ranked
from tasks.sources import JsonLines

DATASETS = (
    Dataset(
        name="review_sentences",
        category="sentiment",
        metric="accuracy",
        link="https://archive.ics.uci.edu/dataset/331/",
        fields=("text", "label"),
        prompts={
            "liked": Ranked(
                inputs="{text}\n\nDid the writer of this review like it?", choices=("no", "yes")
            ),
            "tone": Ranked(
                inputs="Review: {text}\nIs its tone negative or positive?",
                choices=("negative", "positive"),
            ),
            "recommend": Ranked(
                inputs="This is what a reviewer says.\n{text}\nWould this reviewer rather warn of it or recommend it?",
                choices=("warn of it", "recommend it"),
            ),
        },
        sources={"local": JsonLines(files="review_sentences.jsonl.gz", columns="fields")},
    ),
)
