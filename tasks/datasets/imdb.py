"""IMDB reviews (Maas et al. 2011): negative or positive?"""

from __future__ import annotations

from tasks.dataset import Dataset, Ranked
from tasks.sources import Tfds

DATASETS = (
    Dataset(
        name="imdb",
        p3="imdb",
        category="sentiment",
        metric="accuracy",
        link="https://ai.stanford.edu/~amaas/data/sentiment/",
        fields=("text", "label"),
        prompts={
            "verdict": Ranked(
                inputs="{text}\n\nIs the verdict of this film review negative or positive?",
                choices=("negative", "positive"),
            ),
            "enjoyed": Ranked(
                inputs="Film review: {text}\nDid its writer enjoy the film?", choices=("no", "yes")
            ),
            "word": Ranked(
                inputs="Sum up in one word, bad or good, what is thought of the film here.\n\n{text}\n\nWord:",
                choices=("bad", "good"),
            ),
        },
        sources={
            "": Tfds(
                name="imdb_reviews/plain_text:1.0.0",
                splits={"train": "train", "validation": "test"},
                sizes={"train": 25_000, "validation": 25_000},
            ),
        },
    ),
)
