"""The table of categories: which are held in, which are held out, and the datasets of each.

Held-in categories train experts; held-out ones only ever judge. What a dataset is, its sources, prompts and metric,
stands in its own file of `tasks/datasets`; this page is the one that says what the study counts (arXiv 2410.03617,
after T0, arXiv 2110.08207). `launch.tasks` prints it with sources and sizes.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterable, Mapping

from tasks.dataset import Dataset

HELD_IN, HELD_OUT, INSTRUCTION, PRETRAINING = "held_in", "held_out", "instruction", "pretraining"

# The category that a dataset names, and its role.
CATEGORIES: Mapping[str, str] = {
    "multiple_choice_qa": HELD_IN,
    "extractive_qa": HELD_IN,
    "closed_book_qa": HELD_IN,
    "sentiment": HELD_IN,
    "topic_classification": HELD_IN,
    "structure_to_text": HELD_IN,
    "summarization": HELD_IN,
    "paraphrase": HELD_IN,
    "sentence_completion": HELD_OUT,
    "natural_language_inference": HELD_OUT,
    "coreference": HELD_OUT,
    "word_sense": HELD_OUT,
    "instruction": INSTRUCTION,  # what an instruction-tuned base may see: none of the above
    "plain_text": PRETRAINING,  # what a base learns the language from: empty inputs, the text as targets
}

# The study's 23 datasets; those with parts are scored part by part and count once.
STUDY: Mapping[str, tuple[str, ...]] = {
    "multiple_choice_qa": ("dream", "cosmos_qa"),
    "extractive_qa": ("adversarial_qa", "ropes"),
    "closed_book_qa": ("hotpotqa", "wiki_qa"),
    "sentiment": ("app_reviews", "imdb"),
    "topic_classification": ("ag_news", "dbpedia_14"),
    "structure_to_text": ("common_gen", "wiki_bio"),
    "summarization": ("cnn_dailymail", "xsum"),
    "paraphrase": ("mrpc", "qqp"),
    "sentence_completion": ("copa", "hellaswag"),
    "natural_language_inference": ("anli", "rte"),
    "coreference": ("wsc", "winogrande"),
    "word_sense": ("wic",),
}

# Suffixes of names by where the rows come from.
COLLECTIONS = ("", "local", "mini")


@functools.cache
def datasets() -> Mapping[str, Dataset]:
    """Every dataset by name, found by walking `tasks.datasets`.

    Raises:
      ValueError: for two of one name, or a category that the table lacks.
    """
    import tasks.datasets as package

    found: dict[str, Dataset] = {}
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        for dataset in getattr(importlib.import_module(module.name), "DATASETS", ()):
            if dataset.name in found:
                raise ValueError(f"two datasets are called {dataset.name}; one is in {module.name}")
            if dataset.category not in CATEGORIES:
                raise ValueError(
                    f"{dataset.name} is of category {dataset.category!r}; known: {', '.join(CATEGORIES)}"
                )
            found[dataset.name] = dataset
    return found


def role(dataset: Dataset) -> str:
    """Whether it trains experts (held_in), judges (held_out) or trains an instruction-tuned base (instruction)."""
    return CATEGORIES[dataset.category]


def mixtures(every: Iterable[Dataset], collection: str) -> dict[str, list[Dataset]]:
    """A collection's mixtures of several datasets.

    One for each category, one of all held-in, one of all held-out; none without a dataset.
    """
    members = [dataset for dataset in every if collection in dataset.sources]
    found = {
        category: [dataset for dataset in members if dataset.category == category]
        for category in CATEGORIES
    }
    for whole in (HELD_IN, HELD_OUT):
        found[whole] = [dataset for dataset in members if role(dataset) == whole]
    return {name + suffix(collection): inside for name, inside in found.items() if inside}


def suffix(collection: str) -> str:
    """What ends the names of a collection's tasks and mixtures."""
    return f"_{collection}" if collection else ""


def task_names(dataset: Dataset, collection: str) -> list[str]:
    """One for each prompt."""
    return [task_name(dataset, prompt, collection) for prompt in dataset.prompts]


def task_name(dataset: Dataset, prompt: str, collection: str) -> str:
    """`<dataset>_<prompt>` and the collection's suffix."""
    return f"{dataset.name}_{prompt}{suffix(collection)}"
