"""AG News (Zhang et al. 2015): which of four sections does a news item belong to?"""

from __future__ import annotations

from tasks.dataset import Dataset, Ranked
from tasks.sources import HuggingFace, JsonLines

SECTIONS = ("World", "Sports", "Business", "Science and technology")

DATASETS = (
    Dataset(
        name="ag_news",
        p3="ag_news",
        category="topic_classification",
        metric="accuracy",
        link="https://huggingface.co/datasets/fancyzhx/ag_news",
        fields=("text", "label"),
        prompts={
            "section": Ranked(
                inputs="{text}\n\nIn which section of the newspaper would this item be printed?"
                " World, Sports, Business, or Science and technology?",
                choices=SECTIONS,
            ),
            "about": Ranked(
                inputs="News item: {text}\nThe news above is mainly about",
                choices=("world politics", "sports", "business", "science and technology"),
            ),
            "label": Ranked(
                inputs="Sort this item by its topic.\n\nItem: {text}\nTopic:", choices=SECTIONS
            ),
        },
        sources={
            "": HuggingFace(
                repository="fancyzhx/ag_news",
                splits={"train": "train", "validation": "test"},
                sizes={"train": 120_000, "validation": 7_600},
            ),
            "local": JsonLines(files="ag_news.jsonl.gz", columns="fields"),
        },
    ),
)
