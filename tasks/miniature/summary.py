"""What the miniature holds, in numbers: sizes, balance of labels, majority and chance, lengths, words."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator

from tasks.datasets.miniature import CORPUS, DATASETS, TABLE
from tasks.miniature import corpus, generators
from tasks.miniature.vocabulary import TOKEN, words


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """One dataset, by its test split.

    Attributes:
      labels: how often each position is right, of all rows; empty where answers are written.
      majority: share of the rows that the most frequent answer gets right: of the answers, or of the positions,
      whichever
        is more; of the written answers where answers are written.
      chance: share that a random choice gets right; 0 where answers are written.
      distinct: share of the test rows that are not a repetition of another.
      mean_tokens, most_tokens: of inputs and targets with the end of sequence, over all prompts.
    """

    name: str
    category: str
    stands_for: str
    metric: str
    prompts: int
    sizes: dict[str, int]
    labels: tuple[float, ...]
    majority: float
    chance: float
    distinct: float
    mean_tokens: float
    most_tokens: int


def summary(name: str) -> Summary:
    """Reads the whole test split of a dataset."""
    dataset = next(each for each in DATASETS if each.name == name)
    rows = list(dataset.sources["mini"].rows("test"))
    prompts = list(dataset.prompts)
    examples = [[dataset.render(prompt, row) for prompt in prompts] for row in rows]
    first = [each[0] for each in examples]
    tokens = [len(TOKEN.findall(f"{e.inputs} {e.targets}")) + 1 for each in examples for e in each]
    positions = collections.Counter(e.label for e in first if e.choices)
    answers = collections.Counter(e.targets for e in first)
    return Summary(
        name=name,
        category=dataset.category,
        stands_for=TABLE[name][2],
        metric=dataset.metric,
        prompts=len(prompts),
        sizes=dict(generators.SIZES),
        labels=tuple(positions[label] / len(rows) for label in sorted(positions)),
        majority=max([*answers.values(), *positions.values()]) / len(rows),
        chance=sum(1 / len(e.choices) for e in first if e.choices) / len(rows),
        distinct=len({e.inputs for e in first}) / len(rows),
        mean_tokens=sum(tokens) / len(tokens),
        most_tokens=max(tokens),
    )


def lines() -> Iterator[str]:
    """The summary of every dataset, of the corpus and of the vocabulary."""
    yield (
        f"{'dataset':<12}{'category':<28}{'stands for':<16}{'metric':<17}{'train/val/test':<16}"
        f"{'chance':>7}{'majority':>9}{'distinct':>9}{'tokens':>8}{'most':>5}  labels"
    )
    for name in TABLE:
        s = summary(name)
        labels = " ".join(f"{share:.2f}" for share in s.labels) or "written"
        yield (
            f"{s.name:<12}{s.category:<28}{s.stands_for or '-':<16}{s.metric:<17}"
            f"{'/'.join(str(size) for size in s.sizes.values()):<16}{s.chance:>7.3f}{s.majority:>9.3f}"
            f"{s.distinct:>9.2f}{s.mean_tokens:>8.1f}{s.most_tokens:>5}  {labels}"
        )
    texts = [row["text"] for row in CORPUS.sources["mini"].rows("validation")]
    lengths = [len(TOKEN.findall(text)) + 1 for text in texts]
    mean = sum(lengths) / len(lengths)
    sizes = "/".join(str(size) for size in corpus.SIZES.values())
    yield (
        f"corpus: {sizes} documents (train/validation) of {mean:.1f} tokens, at most {max(lengths)};"
        f" {mean * corpus.SIZES['train'] / 1e6:.1f} M tokens to train on"
    )
    marks = sum(not re.match(r"\w", word) for word in words())
    yield f"vocabulary: {len(words()) - marks} words, {marks} marks, padding, end and unknown"
