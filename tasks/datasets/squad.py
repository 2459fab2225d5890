"""SQuAD (Rajpurkar et al. 2016): questions on a paragraph. Stands in for a set of the study."""

from __future__ import annotations

from tasks.dataset import Dataset, Generated, Row
from tasks.sources import JsonLines


def view(row: Row) -> Row:
    """The first answer is learnt; all count as right."""
    return {**row, "answer": row["target"], "all_answers": tuple(row["targets"])}


DATASETS = (
    Dataset(
        name="squad",
        category="extractive_qa",
        metric="squad",
        link="https://rajpurkar.github.io/SQuAD-explorer/",
        fields=("context", "question", "target", "targets"),
        view=view,
        view_fields=("answer", "all_answers"),
        prompts={
            "passage": Generated(
                inputs="{context}\n\nUsing only words of the passage above, answer: {question}",
                targets="{answer}",
                references="all_answers",
            ),
            "question_first": Generated(
                inputs="Question: {question}\nFind the answer in this text.\n\n{context}\n\nAnswer:",
                targets="{answer}",
                references="all_answers",
            ),
            "span": Generated(
                inputs="Copy the part of the text that answers the question.\n\nText: {context}\nQuestion: {question}\nPart:",
                targets="{answer}",
                references="all_answers",
            ),
        },
        sources={"local": JsonLines(files="squad.jsonl.gz", columns="fields")},
    ),
)
