"""Tasks as evaluation wants them: inputs, choices and references of every example, as tokens, and the metric.

Of ranked tasks every example has its choices as tokens, as many as it has; of the others a text is generated and judged
by the references. What is over the lengths is cut by a named rule and counted.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from tasks import preprocessors, registry, vocabularies
from tasks.metrics import METRICS, Metric
from tasks.packing import Lengths, truncate


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationExample:
    """One example.

    Attributes:
      id: of its row, unique within the split of a task.
      inputs: [i] int32, without the start token; may be empty.
      choices: [c_k] int32 each, with the end of sequence; none where the answer is generated.
      targets: [t] int32, the answer that training teaches, with the end of sequence.
      label: the index of the right choice; None where generated.
      references: all right answers.
      inputs_text, choices_text, targets_text: the same in words; the targets' is that of the tokens that were kept.
    """

    id: str
    inputs: np.ndarray
    choices: tuple[np.ndarray, ...]
    targets: np.ndarray
    label: int | None
    references: tuple[str, ...]
    inputs_text: str
    choices_text: tuple[str, ...]
    targets_text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """The examples of one task, a dataset in the words of one prompt.

    Attributes:
      info: dataset, prompt and collection.
      split: where they come from.
      examples: in the order of the source, or a sample.
      metric: `metric.function(truths, predictions)` gives values and standard errors.
      vocabulary: of targets; decodes what is generated.
      start_id: the token that every sequence starts with.
      truncation: the rule by which inputs were cut.
      cut_inputs, cut_targets: how many examples had inputs, or a choice, over the length.
    """

    info: registry.TaskInfo
    split: str
    examples: tuple[EvaluationExample, ...]
    metric: Metric
    vocabulary: seqio.Vocabulary
    start_id: int
    truncation: str
    cut_inputs: int
    cut_targets: int

    @property
    def truths(self) -> list[int] | list[tuple[str, ...]]:
        """What the metric compares predictions with."""
        return [each.label if self.metric.is_ranked else each.references for each in self.examples]

    @property
    def chance(self) -> float | None:
        """Accuracy of guessing; None where answers are generated."""
        if not self.metric.is_ranked:
            return None
        return float(np.mean([1 / len(each.choices) for each in self.examples]))

    @property
    def majority(self) -> float | None:
        """Accuracy of always giving the most frequent answer, in words; None where answers are generated."""
        if not self.metric.is_ranked:
            return None
        answers = collections.Counter(each.choices_text[each.label] for each in self.examples)
        return max(answers.values()) / len(self.examples)


def evaluation_set(
    task: str,
    *,
    lengths: Lengths,
    split: str = "validation",
    limit: int | None = None,
    skip: int = 0,
    seed: int = 0,
    truncation: str = "end",
    few_shot: int = 0,
) -> EvaluationSet:
    """The examples of a registered task of ours.

    Args:
      task: a name, not of a mixture (`registry.task_names` gives the tasks of one).
      lengths: of inputs and targets.
      split: the split.
      limit: take so many, a sample that the seed decides; None: all, in order.
      skip: leave out so many first, a sample too: those that a call with this limit takes.
      seed: of the samples.
      truncation: see `packing.truncate`.
      few_shot: examples of the training split, with their answers, before each; drawn by the seed and the example's id. With them the
        inputs are cut at their start, which loses the first of these first.

    Raises:
      ValueError: for an unknown task, a split that it lacks, a malformed row (with file and line), or no example.
    """
    (name,) = registry.task_names(task)
    info = registry.task_infos()[name]
    provider = seqio.TaskRegistry.get(name)
    if split not in provider.splits:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(provider.splits)}")
    is_sample = limit is not None or skip > 0
    dataset = provider.get_dataset(sequence_length=None, split=split, shuffle=is_sample, seed=seed)
    shots = _Shots(provider, few_shot, seed) if few_shot else None
    metric = METRICS[info.dataset.metric]
    target = provider.output_features["targets"]
    cut = collections.Counter()
    examples = []
    dataset = dataset.skip(skip).take(-1 if limit is None else limit)
    for features in _read(dataset):
        choices_text = _texts(features["choices"])
        ends = [target.vocabulary.eos_id] if target.add_eos else []
        choices = [
            np.array([*target.vocabulary.encode(each), *ends], np.int32) for each in choices_text
        ]
        id_ = features["id"].decode("utf-8")
        inputs = features["inputs"]
        inputs_text = features["inputs_pretokenized"].decode("utf-8")
        if shots is not None:
            inputs_text, inputs = shots.before(id_, inputs_text)
        parts = [
            truncate(inputs, tokens, lengths=lengths, rule="start" if few_shot else truncation)
            for tokens in choices or [features["targets"]]
        ]
        cut.update({part for each in parts for part in each.cut})
        label = int(features["label"]) if choices else None
        answer = parts[label or 0]
        targets_text = features["targets_pretokenized"].decode("utf-8")
        if "targets" in answer.cut:
            targets_text = target.vocabulary.decode(
                answer.targets[: len(answer.targets) - len(ends)].tolist()
            )
        examples.append(
            EvaluationExample(
                id=id_,
                inputs=parts[0].inputs,
                choices=tuple(part.targets for part in parts) if choices else (),
                targets=answer.targets,
                label=label,
                references=_texts(features["references"]),
                inputs_text=inputs_text,
                choices_text=choices_text,
                targets_text=targets_text,
            )
        )
    if not examples:
        more = f" behind the first {skip}" if skip else ""
        raise ValueError(f"{name} has no {split} example{more}")
    return EvaluationSet(
        info=info,
        split=split,
        examples=tuple(examples),
        metric=metric,
        vocabulary=target.vocabulary,
        start_id=vocabularies.start_id(provider.output_features["inputs"].vocabulary),
        truncation=truncation,
        cut_inputs=cut["inputs"],
        cut_targets=cut["targets"],
    )


# Training examples that few-shot ones are drawn from: the first that the seed's order has.
SHOT_POOL = 256


class _Shots:
    """Training examples with their answers, to go before an evaluation example."""

    def __init__(self, provider: seqio.Task, count: int, seed: int) -> None:
        if "train" not in provider.splits:
            raise ValueError(f"{provider.name} has no training split to draw {count} examples from")
        dataset = provider.get_dataset(None, split="train", shuffle=True, seed=seed)
        self.texts = [
            " ".join(
                each[name].decode("utf-8")
                for name in ("inputs_pretokenized", "targets_pretokenized")
            )
            for each in _read(dataset.take(SHOT_POOL))
        ]
        if len(self.texts) < count:
            raise ValueError(
                f"{provider.name} has {len(self.texts)} training examples, {count} wanted"
            )
        self.count, self.seed = count, seed
        self.vocabulary = provider.output_features["inputs"].vocabulary

    def before(self, id_: str, inputs_text: str) -> tuple[str, np.ndarray]:
        """The text of some of them and then the inputs, and its tokens."""
        digest = hashlib.sha256(f"{self.seed} {id_}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        drawn = rng.choice(len(self.texts), self.count, replace=False)
        text = "\n\n".join([*(self.texts[i] for i in drawn), inputs_text])
        return text, np.array(self.vocabulary.encode(text), np.int32)


def _read(dataset: tf.data.Dataset) -> Iterator[dict[str, Any]]:
    with preprocessors.told():
        yield from dataset.as_numpy_iterator()


def _texts(strings: Sequence[bytes]) -> tuple[str, ...]:
    return tuple(each.decode("utf-8") for each in strings)
