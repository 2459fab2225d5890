"""DBpedia (Zhang et al. 2015): which of 14 kinds of thing is an article about?"""

from __future__ import annotations

from tasks.dataset import Dataset, Ranked
from tasks.sources import HuggingFace

KINDS = (
    "company",
    "school",
    "artist",
    "athlete",
    "politician",
    "vehicle",
    "building",
    "natural place",
    "village",
    "animal",
    "plant",
    "album",
    "film",
    "book",
)

DATASETS = (
    Dataset(
        name="dbpedia_14",
        p3="dbpedia_14",
        category="topic_classification",
        metric="accuracy",
        link="https://huggingface.co/datasets/fancyzhx/dbpedia_14",
        fields=("title", "content", "label"),
        prompts={
            "kind": Ranked(
                inputs="{title}: {content}\n\nWhat kind of thing is {title}? Choose from "
                + ", ".join(KINDS)
                + ".",
                choices=KINDS,
            ),
            "is_a": Ranked(inputs="{content}\nIn short, {title} is a kind of", choices=KINDS),
            "label": Ranked(
                inputs="Kinds: " + ", ".join(KINDS) + ".\n\nTitle: {title}\nText: {content}\nKind:",
                choices=KINDS,
            ),
        },
        sources={
            "": HuggingFace(
                repository="fancyzhx/dbpedia_14",
                config="dbpedia_14",
                splits={"train": "train", "validation": "test"},
                sizes={"train": 560_000, "validation": 70_000},
            ),
        },
    ),
)
