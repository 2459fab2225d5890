"""SubjQA (Bjerva et al. 2020): questions on a review, answered by a part of it. Stands in for a set of the study."""

from __future__ import annotations

from tasks.dataset import Dataset, Generated, Row
from tasks.sources import JsonLines


def view(row: Row) -> Row:
    """The first answer is learnt; all count as right."""
    return {**row, "answer": row["target"], "all_answers": tuple(row["targets"])}


DATASETS = (
    Dataset(
        name="subjqa",
        category="extractive_qa",
        metric="squad",
        link="https://github.com/megagonlabs/SubjQA",
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
        sources={"local": JsonLines(files="subjqa.jsonl.gz", columns="fields")},
    ),
)
