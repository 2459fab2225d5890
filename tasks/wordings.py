"""Wordings and views of rows that several datasets have in common."""

from __future__ import annotations

from tasks.dataset import Generated, Ranked, Row

# A question on a text that holds its answer: `context`, `question`, `answer`, `all_answers`.
PASSAGE = {
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
}

# A question without a text: `question`, `answer`, `all_answers`.
CLOSED_BOOK = {
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
}

# A sentence of a review, bad or good: `text`.
REVIEW = {
    "tone": Ranked(
        inputs="Review: {text}\nThe tone of this review is", choices=("negative", "positive")
    ),
    "liked": Ranked(
        inputs="{text}\n\nDid the writer of this review like it?", choices=("no", "yes")
    ),
    "recommend": Ranked(
        inputs="This is what a reviewer says.\n{text}\nWould this reviewer rather warn of it or recommend it?",
        choices=("warn of it", "recommend it"),
    ),
}

# Two sentences, different or equivalent: `sentence1`, `sentence2`.
SAME_MEANING = {
    "same": Ranked(
        inputs="First: {sentence1}\nSecond: {sentence2}\nDo the two sentences say the same?",
        choices=("no", "yes"),
    ),
    "replace": Ranked(
        inputs='Could "{sentence1}" be replaced with "{sentence2}" without a change of meaning?',
        choices=("No", "Yes"),
    ),
    "label": Ranked(
        inputs="A: {sentence1}\nB: {sentence2}\nA and B are equivalent or different:",
        choices=("different", "equivalent"),
    ),
}


def answered(row: Row) -> Row:
    """The first answer is learnt; all count as right."""
    return {**row, "answer": row["target"], "all_answers": tuple(row["targets"])}


def asked(row: Row) -> Row:
    """The same of a question that is asked without a text."""
    return {**answered(row), "question": row["question"].rstrip("?") + "?"}


def stated(row: Row) -> Row:
    """The hypothesis without its full stop."""
    return {**row, "hypothesis": row["hypothesis"].rstrip(".")}
