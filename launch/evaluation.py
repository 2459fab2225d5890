"""Where tasks and evaluation meet: registered tasks as what the evaluate stage scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launch import allocation

if TYPE_CHECKING:  # both bring what --help does without
    from merging.evaluation.examples import Task
    from tasks.evaluation import EvaluationSet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """Which examples of which tasks.

    Attributes:
      mixture_or_task_name: one name, or several.
      lengths: {"inputs": tokens, "targets": tokens}; what is longer is cut and counted.
      split: the split.
      limit: examples of each task, a sample that the seed decides; None: all.
      skip: of each task so many are left out first: those that a run with this limit takes.
      seed: of samples and of few-shot examples.
      num_prompts: of each dataset, the first so many; None: all.
      few_shot: examples of the training split before each, with their answers.
      measure: "metric": the dataset's own; "loss": nats per token and bits per byte of the right answer, on any text.
      truncation: what inputs that are too long lose, "end" or "start".
    """

    mixture_or_task_name: str | Sequence[str]
    lengths: Mapping[str, int]
    split: str = "validation"
    limit: int | None = None
    skip: int = 0
    seed: int = 0
    num_prompts: int | None = None
    few_shot: int = 0
    measure: str = "metric"
    truncation: str = "end"

    def __post_init__(self) -> None:
        if not self.mixture_or_task_name:
            raise ValueError(
                f"MIXTURE_OR_TASK_NAME is {self.mixture_or_task_name!r}: name at least one mixture or task"
            )
        if self.measure not in ("metric", "loss"):
            raise ValueError(f"MEASURE is {self.measure!r}: it must be 'metric' or 'loss'")
        for name in ("limit", "num_prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name.upper()} is {value}: it must be at least 1, or None")
        for name in ("few_shot", "skip"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name.upper()} is {getattr(self, name)}: it must be at least 0")


def evaluation_tasks(
    asked: Examples, registered: Mapping[str, Any]
) -> tuple[list[Task], dict[str, Any]]:
    """The tasks with their examples, and JSON that says all that they depend on.

    Args:
      asked: which.
      registered: arguments of `tasks.register`.

    Raises ValueError for names that aren't known, a split that is missing, and tasks without examples.
    """
    import tasks
    from tasks import evaluation, identity, packing

    tasks.register(**registered)
    sets = [
        evaluation.evaluation_set(
            name,
            lengths=packing.Lengths.of(asked.lengths),
            split=asked.split,
            limit=asked.limit,
            skip=asked.skip,
            seed=asked.seed,
            truncation=asked.truncation,
            few_shot=asked.few_shot,
        )
        for name in task_names(asked)
    ]
    depends_on = {
        **dataclasses.asdict(asked),
        "lengths": dict(asked.lengths),
        **identity.of_tasks(each.info.name for each in sets),
    }
    allocation.keep_freed_memory()  # TensorFlow, which has read rows, has set it otherwise
    return [_task(each, asked) for each in sets], depends_on


def task_names(asked: Examples) -> list[str]:
    """The registered tasks that are meant, each once, without those prompts that are too many."""
    from tasks import registry

    names = asked.mixture_or_task_name
    names = [names] if isinstance(names, str) else names
    every = dict.fromkeys(task for name in names for task in registry.task_names(name))
    infos = registry.task_infos()
    foreign = [task for task in every if task not in infos]
    if foreign:
        raise ValueError(
            f"{', '.join(foreign)} were registered by others and have no metric here: name tasks of `launch.tasks`"
        )
    kept, prompts = [], {}
    for task in every:
        info = infos[task]
        of_dataset = prompts.setdefault((info.dataset.name, info.collection), [])
        if asked.num_prompts is None or len(of_dataset) < asked.num_prompts:
            of_dataset.append(info.prompt)
            kept.append(task)
    return kept


def _task(found: EvaluationSet, asked: Examples) -> Task:
    import numpy as np

    from merging.evaluation.examples import Example, Task

    start = np.array([found.start_id], np.int32)
    is_loss = asked.measure == "loss" or found.info.dataset.category == "plain_text"
    is_ranked = found.metric.is_ranked
    examples = []
    for each, truth in zip(found.examples, found.truths, strict=True):
        choices, texts = each.choices, each.choices_text
        if is_loss:
            choices, texts = (each.targets,), (each.targets_text,)
        examples.append(
            Example(
                id=each.id,
                prompt=np.concatenate([start, each.inputs]),
                choices=choices,
                truth=truth,
                prompt_text=each.inputs_text,
                choices_text=texts,
            )
        )
    suffix = f"_{found.info.collection}" if found.info.collection else ""
    return Task(
        name=found.info.dataset.name + suffix,
        prompt=found.info.prompt,
        kind="loss" if is_loss else "rank" if is_ranked else "generate",
        examples=examples,
        metric=None if is_loss else found.metric.function,
        chance=None if is_loss else found.chance,
        decode=found.vocabulary.decode,
        eos_id=found.vocabulary.eos_id,
        max_new_tokens=asked.lengths["targets"],
        cut_inputs=found.cut_inputs,
        cut_targets=found.cut_targets,
    )
