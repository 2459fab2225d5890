"""Where tasks and a study meet: a collection's categories, mixtures and evaluation sets as what the study stage takes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from etils import epath

from launch.evaluation import Examples, evaluation_tasks
from launch.mixtures import Mixtures, mixtures

if TYPE_CHECKING:  # these bring what --help does without
    from merging.finetune import Mixture
    from merging.grid.study_file import Category
    from merging.study import Data, Tasks, Training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sources:
    """Where a study's examples come from.

    Attributes:
      collection: "" (the study's datasets), "local" or "mini".
      lengths: {"inputs": tokens, "targets": tokens} of what is evaluated.
      limit: examples of each task; None: all.
      num_prompts: of each dataset; None: all.
      loss_limit: examples of each held-in task whose right answers' cross-entropy is told too; 0: of none.
      tuning_limit: examples of each held-in task that settings are chosen by, where they are; these judge nobody then.
      seed: of samples and of the order of training examples.
      cache_dir: where packed mixtures lie; None: ~/.cache/merging-at-scale/packed.
    """

    collection: str
    lengths: Mapping[str, int]
    limit: int | None = None
    num_prompts: int | None = None
    loss_limit: int = 0
    tuning_limit: int = 25
    seed: int = 0
    cache_dir: str | None = None


def study_data(sources: Sources, registered: Mapping[str, Any]) -> Data:
    """What a study is trained on and judged by; `registered`: arguments of `tasks.register`."""
    from merging.study import Data

    return Data(
        categories=categories(sources.collection),
        mixture=functools.partial(_mixture, sources, registered),
        tasks=functools.partial(_tasks, sources, registered),
        tuning_tasks=functools.partial(_tuning_tasks, sources, registered),
        depends_on=functools.partial(_depends_on, sources, registered),
    )


def check_mixtures(names: Iterable[str], registered: Mapping[str, Any]) -> None:
    """Raises ValueError for mixtures that aren't known, or that hold a held-out dataset."""
    import tasks
    from tasks import registry, stream

    tasks.register(**registered)
    for name in names:
        stream.refuse_held_out(name, registry.task_names(name))


def categories(collection: str) -> dict[str, Category]:
    """The held-in and held-out categories of a collection, with the datasets that count."""
    from merging.grid.study_file import Category, Dataset
    from tasks import catalog
    from tasks.metrics import METRICS

    found: dict[str, dict[str, Dataset]] = {}
    for each in catalog.datasets().values():
        is_judge = catalog.role(each) in (catalog.HELD_IN, catalog.HELD_OUT) and each.is_counted
        if not is_judge or collection not in each.sources:
            continue
        datasets = found.setdefault(each.category, {})
        whole = each.part_of or each.name
        before = datasets[whole].tasks if whole in datasets else ()
        task = each.name + catalog.suffix(collection)
        datasets[whole] = Dataset(tasks=(*before, task), metric=METRICS[each.metric].main)
    if not found:
        known = ", ".join(map(repr, catalog.COLLECTIONS))
        raise ValueError(f"COLLECTION is {collection!r}, which has no dataset: known are {known}")
    return {
        name: Category(role=role, datasets=found[name])
        for name, role in catalog.CATEGORIES.items()
        if name in found
    }


def _mixture(sources: Sources, registered: Mapping[str, Any], how: Training, name: str) -> Mixture:
    asked = Mixtures(
        name=name,
        names=None,
        lengths=how.lengths,
        seed=sources.seed,
        cache_dir=sources.cache_dir,
        validation_split=None,
    )
    (made,) = mixtures(asked, registered, train_rows=how.train_steps * how.batch_size)
    return made


def _judged(sources: Sources, role: str, **changes: Any) -> Examples:
    """The examples of a role's categories."""
    from tasks import catalog

    standard = Examples(
        mixture_or_task_name=role + catalog.suffix(sources.collection),
        lengths=sources.lengths,
        limit=sources.limit,
        seed=sources.seed,
        num_prompts=sources.num_prompts,
    )
    return dataclasses.replace(standard, **changes)


def _tasks(sources: Sources, registered: Mapping[str, Any], is_tuned: bool) -> Tasks:
    from tasks import catalog

    # What settings are chosen by judges nobody.
    skip = sources.tuning_limit if is_tuned else 0
    asked = {
        catalog.HELD_IN: _judged(sources, catalog.HELD_IN, skip=skip),
        catalog.HELD_OUT: _judged(sources, catalog.HELD_OUT),
    }
    found, identities = [], {}
    for role, examples in asked.items():
        of_role, identities[role] = evaluation_tasks(examples, registered)
        found += of_role
    if sources.loss_limit:
        told = dataclasses.replace(
            asked[catalog.HELD_IN], limit=sources.loss_limit, num_prompts=1, measure="loss"
        )
        losses, identities["losses"] = evaluation_tasks(told, registered)
        found += [dataclasses.replace(task, name=f"{task.name}_loss") for task in losses]
    return found, identities


def _tuning_tasks(sources: Sources, registered: Mapping[str, Any]) -> Tasks:
    from tasks import catalog

    asked = _judged(sources, catalog.HELD_IN, limit=sources.tuning_limit)
    return evaluation_tasks(asked, registered)


def _depends_on(sources: Sources, registered: Mapping[str, Any], is_tuned: bool) -> dict[str, Any]:
    """All that is set about examples, but for where they and what is made of them lie."""
    found = {
        **dataclasses.asdict(sources),
        **{name: value for name, value in registered.items() if name != "local_data"},
    }
    del found["cache_dir"]
    if not is_tuned:
        del found["tuning_limit"]
    vocabulary = registered.get("vocabulary")
    if vocabulary not in (None, "bytes"):
        found["vocabulary"] = hashlib.sha256(epath.Path(vocabulary).read_bytes()).hexdigest()
    return found
