"""The rows of every dataset of the miniature, by number: any row of any split is made when it is asked for."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tasks.miniature import (
    closed_book,
    completion,
    coreference,
    extractive,
    inference,
    instructions,
    multiple_choice,
    paraphrase,
    sentiment,
    structure,
    summaries,
    topics,
    word_sense,
)
from tasks.miniature.draws import SPLITS, Draw, Split, split_of
from tasks.miniature.world import World, world

Row = dict[str, Any]

SIZES: dict[Split, int] = {"train": 8_000, "validation": 200, "test": 500}

MOST_DRAWS = 1000  # a tenth of all contents is validation's: 1e-45 that so many draws miss it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generator:
    """How a dataset's rows are made.

    Attributes:
      make: a row from the world, a draw and the row's number; labels go round with the number, so they are balanced.
      content: the fields that make two rows the same example; their hash decides the split.
    """

    make: Callable[[World, Draw, int], Row]
    content: tuple[str, ...]


GENERATORS: dict[str, Generator] = {
    # Held-in, two a category.
    "dialogues": Generator(make=multiple_choice.dialogue, content=("dialogue",)),
    "motives": Generator(make=multiple_choice.motives, content=("passage",)),
    "belongings": Generator(make=extractive.belongings, content=("passage",)),
    "rules": Generator(make=extractive.rules, content=("background", "situation")),
    "facts": Generator(make=closed_book.facts, content=("fact",)),
    "answers": Generator(make=closed_book.answers, content=("fact",)),
    "products": Generator(make=sentiment.products, content=("review",)),
    "plays": Generator(make=sentiment.plays, content=("review",)),
    "news": Generator(make=topics.news, content=("text",)),
    "kinds": Generator(make=topics.kinds, content=("text",)),
    "concepts": Generator(make=structure.concepts, content=("target",)),
    "lives": Generator(make=structure.lives, content=("target",)),
    "highlights": Generator(make=summaries.highlights, content=("story",)),
    "gist": Generator(make=summaries.gist, content=("story",)),
    "sentences": Generator(make=paraphrase.sentences, content=("sentence1",)),
    "questions": Generator(make=paraphrase.questions, content=("question1", "question2")),
    # Held-out, seven in all.
    "causes": Generator(make=completion.causes, content=("begun", "choices")),
    "endings": Generator(make=completion.endings, content=("story",)),
    "statements": Generator(make=inference.statements, content=("passage",)),
    "entailment": Generator(make=inference.entailment, content=("premise",)),
    "pronouns": Generator(make=coreference.pronouns, content=("text",)),
    "gaps": Generator(make=coreference.gaps, content=("sentence",)),
    "senses": Generator(make=word_sense.senses, content=("text",)),
    # Of no category: the instruction mixture.
    **{
        name: Generator(make=make, content=content)
        for name, (make, content) in instructions.MAKERS.items()
    },
}


class Rows(Sequence[Row]):
    """The rows of one split of one dataset, made when asked for.

    The same for the same (dataset, split, seed, index).
    """

    def __init__(self, dataset: str, split: Split, seed: int, size: int) -> None:
        self._generator = GENERATORS[dataset]
        self._path = (dataset, split, seed)
        self._split = split
        self._world = world(seed)
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self._size:
            raise IndexError(
                f"row {index} of {self._path[0]}, {self._split}, which has {self._size} rows"
            )
        draw = Draw("row", *self._path, index)
        for _ in range(MOST_DRAWS):
            row = self._generator.make(self._world, draw, index)
            content = [str(row[field]) for field in self._generator.content]
            if split_of(content) == self._split:
                return row
        raise AssertionError(
            f"{self._path[0]} has no row {index} for {self._split} in {MOST_DRAWS} draws: too few contents"
        )

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(self._size))


def rows(dataset: str, split: Split, seed: int = 0) -> Rows:
    """The rows of a split of a dataset of the miniature, dicts of strings, numbers and lists of strings.

    Raises:
      ValueError: there is no such dataset or split.
    """
    if dataset not in GENERATORS:
        near = difflib.get_close_matches(dataset, GENERATORS, n=3) or sorted(GENERATORS)
        raise ValueError(f"the miniature has no dataset {dataset!r}; nearest: {', '.join(near)}")
    if split not in SPLITS:
        raise ValueError(f"{dataset} has no split {split!r}; it has {', '.join(SPLITS)}")
    return Rows(dataset, split, seed, SIZES[split])
