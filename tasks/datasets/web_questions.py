"""WebQuestions (Berant et al. 2013): what people ask a search engine. Stands in for a set of the study."""

from __future__ import annotations

from tasks.dataset import Dataset, Generated, Row
from tasks.sources import JsonLines


def view(row: Row) -> Row:
    """The first answer is learnt; all count as right."""
    return {
        "question": row["question"].rstrip("?") + "?",
        "answer": row["target"],
        "all_answers": tuple(row["targets"]),
    }


DATASETS = (
    Dataset(
        name="web_questions",
        category="closed_book_qa",
        metric="squad",
        link="https://nlp.stanford.edu/software/sempre/",
        fields=("question", "target", "targets"),
        view=view,
        view_fields=("answer", "all_answers"),
        prompts={
            "plain": Generated(
                inputs="{question}\nAnswer in a few words:",
                targets="{answer}",
                references="all_answers",
            ),
            "quiz": Generated(
                inputs="You are in a quiz, and no book may be opened. The question is: {question}",
                targets="{answer}",
                references="all_answers",
            ),
            "facts": Generated(
                inputs="Question: {question}\nAnswer:", targets="{answer}", references="all_answers"
            ),
        },
        sources={"local": JsonLines(files="web_questions.jsonl.gz", columns="fields")},
    ),
)
