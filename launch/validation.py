"""Where tasks and training meet once more: registered tasks as what a run is validated by."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launch.evaluation import Examples, evaluation_tasks

if TYPE_CHECKING:  # brings what --help does without
    from merging.finetune import Validation


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationTasks:
    """Which tasks, and how many examples of each.

    Attributes:
      names: of mixtures or tasks; None: a run is validated by its loss alone.
      lengths: {"inputs": tokens, "targets": tokens}; what is longer is cut.
      limit: examples of each task, a sample that the seed decides; None: all.
      split: whose examples are taken.
      seed: of samples.
      truncation: what inputs that are too long lose, "end" or "start".
    """

    names: str | Sequence[str] | None
    lengths: Mapping[str, int]
    limit: int | None = 100
    split: str | None = "validation"
    seed: int = 0
    truncation: str = "end"


def validation(asked: ValidationTasks, registered: Mapping[str, Any]) -> Validation | None:
    """The tasks with their examples; None where none is named.

    Args:
      asked: which.
      registered: arguments of `tasks.register`.

    Raises ValueError for names that aren't known, held-out datasets, a split that is missing, and tasks without examples.
    """
    if asked.names is None:
        return None
    if asked.split is None:
        raise ValueError("VALIDATION_TASKS are given, and VALIDATION_SPLIT is None: name a split")
    import tasks
    from merging.finetune import Validation
    from tasks import registry, stream
    from tasks.metrics import METRICS

    tasks.register(**registered)
    names = [asked.names] if isinstance(asked.names, str) else asked.names
    for name in names:  # a run chooses by them
        stream.refuse_held_out(name, registry.task_names(name), use="validated on")
    examples = Examples(
        mixture_or_task_name=names,
        lengths=asked.lengths,
        split=asked.split,
        limit=asked.limit,
        seed=asked.seed,
        truncation=asked.truncation,
    )
    found, identity = evaluation_tasks(examples, registered)
    digests = identity["vocabularies"]["targets"]
    if len(digests) > 1:
        raise ValueError(
            f"VALIDATION_TASKS are in {len(digests)} vocabularies: take tasks of one collection, or give VOCABULARY"
        )
    infos = [registry.task_infos()[name] for name in identity["tasks"]]
    return Validation(
        tasks=found,
        main={
            task.name: METRICS[info.dataset.metric].main
            for task, info in zip(found, infos, strict=True)
            if task.metric is not None
        },
        vocabulary_digest=digests[0],
        row_length=sum(asked.lengths.values()) + 1,
        identity=identity,
    )
