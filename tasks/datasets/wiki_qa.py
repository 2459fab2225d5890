"""WikiQA (Yang et al. 2015): does a sentence of Wikipedia answer a question?"""

from __future__ import annotations

from tasks.dataset import Dataset, Ranked
from tasks.sources import HuggingFace

DATASETS = (
    Dataset(
        name="wiki_qa",
        p3="wiki_qa",
        category="closed_book_qa",
        metric="accuracy",
        link="https://huggingface.co/datasets/microsoft/wiki_qa",
        fields=("question", "answer", "document_title", "label"),
        prompts={
            "answers": Ranked(
                inputs="Somebody asks: {question}?\nSomebody replies: {answer}\nDoes the reply answer the question?",
                choices=("No", "Yes"),
            ),
            "grade": Ranked(
                inputs="Grade this answer as right or wrong.\nQuestion: {question}?\nAnswer: {answer}\nGrade:",
                choices=("wrong", "right"),
            ),
            "article": Ranked(
                inputs='A sentence of the article "{document_title}" says: {answer}\nWould it do as an answer to'
                ' "{question}?" Yes or no?',
                choices=("no", "yes"),
            ),
        },
        sources={
            "": HuggingFace(
                repository="microsoft/wiki_qa",
                splits={"train": "train", "validation": "validation"},
                sizes={"train": 20_360, "validation": 2_733},
            ),
        },
    ),
)
