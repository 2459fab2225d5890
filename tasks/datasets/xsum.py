"""XSum (Narayan et al. 2018): one sentence that says what an article is about."""

from __future__ import annotations

from tasks.dataset import Dataset, Generated
from tasks.sources import HuggingFace

DATASETS = (
    Dataset(
        name="xsum",
        p3="xsum",
        category="summarization",
        metric="rouge",
        link="https://huggingface.co/datasets/EdinburghNLP/xsum",
        fields=("document", "summary"),
        prompts={
            "one_sentence": Generated(
                inputs="{document}\n\nWhat is this article about? Say it in one sentence.",
                targets="{summary}",
            ),
            "lead": Generated(
                inputs="Write the sentence that should stand above this article.\n\n{document}\n\nSentence:",
                targets="{summary}",
            ),
            "summary": Generated(
                inputs="Article: {document}\n\nSummary in one sentence:", targets="{summary}"
            ),
        },
        sources={
            "": HuggingFace(
                repository="EdinburghNLP/xsum",
                splits={"train": "train", "validation": "validation"},
                sizes={"train": 204_045, "validation": 11_332},
            ),
        },
    ),
)
