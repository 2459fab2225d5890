"""CNN / Daily Mail (See et al. 2017), version 3: the highlights of a news article."""

from __future__ import annotations

from tasks.dataset import Dataset, Generated
from tasks.sources import Tfds

DATASETS = (
    Dataset(
        name="cnn_dailymail",
        p3="cnn_dailymail/3.0.0",
        category="summarization",
        metric="rouge",
        link="https://github.com/abisee/cnn-dailymail",
        fields=("article", "highlights"),
        prompts={
            "highlights": Generated(
                inputs="{article}\n\nThe highlights of this article, in a few sentences:",
                targets="{highlights}",
            ),
            "busy": Generated(
                inputs="Tell a reader who has no time what is in this article.\n\n{article}\n\nIn short:",
                targets="{highlights}",
            ),
            "summary": Generated(inputs="Article: {article}\n\nSummary:", targets="{highlights}"),
        },
        sources={
            "": Tfds(
                name="cnn_dailymail:3.4.0",
                splits={"train": "train", "validation": "validation"},
                sizes={"train": 287_113, "validation": 13_368},
            ),
        },
    ),
)
