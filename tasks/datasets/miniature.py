"""The miniature.

The study's categories in a world of our own, two datasets for each held-in one and seven held-out in all.

Beside them the instruction mixture's tasks and the corpus as plain text. The generators are in `tasks.miniature`;
none of this is downloaded. What each stands for in the study (catalog.STUDY) is said in the table.
"""

from __future__ import annotations

import functools

from tasks.dataset import Dataset, Generated, Row, as_it_is
from tasks.miniature import corpus
from tasks.miniature.draws import SPLITS
from tasks.miniature.generators import rows
from tasks.miniature.prompts import PROMPTS
from tasks.sources import Function

SEED = 0  # of the world that is registered

# name: (category, metric, the dataset it stands for)
TABLE = {
    "dialogues": ("multiple_choice_qa", "accuracy", "dream"),
    "motives": ("multiple_choice_qa", "accuracy", "cosmos_qa"),
    "belongings": ("extractive_qa", "squad", "adversarial_qa"),
    "rules": ("extractive_qa", "squad", "ropes"),
    "facts": ("closed_book_qa", "squad", "hotpotqa"),
    "answers": ("closed_book_qa", "accuracy", "wiki_qa"),
    "products": ("sentiment", "accuracy", "app_reviews"),
    "plays": ("sentiment", "accuracy", "imdb"),
    "news": ("topic_classification", "accuracy", "ag_news"),
    "kinds": ("topic_classification", "accuracy", "dbpedia_14"),
    "concepts": ("structure_to_text", "bleu", "common_gen"),
    "lives": ("structure_to_text", "bleu", "wiki_bio"),
    "highlights": ("summarization", "rouge", "cnn_dailymail"),
    "gist": ("summarization", "rouge", "xsum"),
    "sentences": ("paraphrase", "accuracy_and_f1", "mrpc"),
    "questions": ("paraphrase", "accuracy_and_f1", "qqp"),
    "causes": ("sentence_completion", "accuracy", "copa"),
    "endings": ("sentence_completion", "accuracy", "hellaswag"),
    "statements": ("natural_language_inference", "accuracy", "anli"),
    "entailment": ("natural_language_inference", "accuracy", "rte"),
    "pronouns": ("coreference", "accuracy", "wsc"),
    "gaps": ("coreference", "accuracy", "winogrande"),
    "senses": ("word_sense", "accuracy", "wic"),
    "opposites": ("instruction", "squad", ""),
    "counting": ("instruction", "squad", ""),
    "odd_one": ("instruction", "squad", ""),
    "same_kind": ("instruction", "accuracy", ""),
    "well_made": ("instruction", "accuracy", ""),
    "asking": ("instruction", "rouge", ""),
    "positions": ("instruction", "squad", ""),
    "sequences": ("instruction", "squad", ""),
    "finding": ("instruction", "squad", ""),
    "mentioned": ("instruction", "accuracy", ""),
    "repeating": ("instruction", "rouge", ""),
    "going_on": ("instruction", "rouge", ""),
    "ordering": ("instruction", "rouge", ""),
    "telling": ("instruction", "rouge", ""),
    "naming": ("instruction", "accuracy", ""),
}


def with_choices(row: Row) -> Row:
    """The row's choices, where it has its own, as they stand in a question."""
    return {**row, "listed": " or ".join(row["choices"])}


def declared(name: str) -> Dataset:
    """One line of the table, with its prompts."""
    category, metric, _ = TABLE[name]
    fields = set().union(*(prompt.fields for prompt in PROMPTS[name].values())) - {"listed"}
    has_choices = "choices" in fields
    return Dataset(
        name=name,
        category=category,
        metric=metric,
        fields=tuple(sorted(fields)),
        view=with_choices if has_choices else as_it_is,
        view_fields=("listed",) if has_choices else (),
        prompts=PROMPTS[name],
        sources={
            "mini": Function(
                rows=functools.partial(rows, name, seed=SEED),
                splits=SPLITS,
                description=f"the miniature, seed {SEED}",
            )
        },
    )


CORPUS = Dataset(
    name="corpus",
    category="plain_text",
    metric="rouge",
    fields=("text",),
    prompts={"text": Generated(inputs="", targets="{text}")},
    sources={
        "mini": Function(
            rows=functools.partial(corpus.documents, seed=SEED),
            splits=("train", "validation"),
            description=f"the miniature, seed {SEED}",
        )
    },
)

DATASETS = (*(declared(name) for name in TABLE), CORPUS)
