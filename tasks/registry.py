"""Tasks and mixtures in seqio's registries, under the names of the catalog.

One task per (dataset, prompt, collection), `<dataset>_<prompt>` and the collection's suffix; for ranked datasets a
second one in T5's rank_classification form, which ends with `_rank`. One mixture per dataset (its prompts), one per
category, one of all held-in, one of all held-out, each with the suffix; and each once more in the form that seqio.Evaluator
ranks, which ends with `_rank`. Mixing rates are T0's. `tasks.register` is the way in.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pathlib
import sys
from collections.abc import Sequence

import seqio

from tasks import (
    catalog,
    instructions,
    metrics,
    mixing,
    p3,
    preprocessors,
    row_source,
    sources,
    vocabularies,
)
from tasks.dataset import Dataset, nearest

RANK = "_rank"
OWN, P3 = "own", "p3"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskInfo:
    """What a registered task of ours is made of."""

    name: str
    dataset: Dataset
    prompt: str
    collection: str

    @property
    def source(self) -> sources.Source:
        return self.dataset.sources[self.collection]


_TASKS: dict[str, TaskInfo] = {}
_MIXTURES: dict[str, tuple[str, ...]] = {}
_registered_with: list[tuple] = []


def register(
    *,
    vocabulary: str | seqio.Vocabulary | None = None,
    local_data: str | pathlib.Path | None = None,
    instruction_tasks: Sequence[str] = (),
    rate_cap: int = mixing.RATE_CAP,
    prompts: str = OWN,
    tasks_module: str | Sequence[str] = (),
) -> None:
    """See `tasks.register`."""
    if prompts not in (OWN, P3):
        raise ValueError(f"prompts are {OWN!r} or {P3!r}; found {prompts!r}")
    if isinstance(vocabulary, str):
        vocabulary = vocabularies.load(vocabulary)
    modules = (tasks_module,) if isinstance(tasks_module, str) else tuple(tasks_module)
    asked = (
        vocabulary,
        local_data and str(local_data),
        tuple(instruction_tasks),
        rate_cap,
        prompts,
        modules,
    )
    if asked in _registered_with:
        return
    _forget()
    every = catalog.datasets().values()
    if prompts == P3:
        every = p3.with_p3_prompts(every)
    collections = [
        each for each in catalog.COLLECTIONS if each != "local" or local_data is not None
    ]
    for collection in collections:
        for dataset in every:
            if collection in dataset.sources:
                data = row_source.data_source(dataset.sources[collection], folder=local_data)
                features = vocabularies.features(vocabulary or _own_vocabulary(collection))
                for prompt in dataset.prompts:
                    _add_tasks(dataset, prompt, collection, data, features)
                name = dataset.name + catalog.suffix(collection)
                _add_mixture(name, catalog.task_names(dataset, collection), rate_cap)
        for name, members in catalog.mixtures(every, collection).items():
            tasks = [task for each in members for task in catalog.task_names(each, collection)]
            _add_mixture(name, tasks, rate_cap)
    for module in modules:
        _import(module)
    if instruction_tasks:
        _add_instructions(instruction_tasks, rate_cap)
    _registered_with.append(asked)


def task_infos() -> dict[str, TaskInfo]:
    """Every registered task of ours by name, in the order of the catalog."""
    return dict(_TASKS)


def mixtures() -> dict[str, tuple[str, ...]]:
    """The tasks of every registered mixture of ours."""
    return dict(_MIXTURES)


def task_names(mixture_or_task: str) -> tuple[str, ...]:
    """The tasks of a mixture, or the task itself.

    Raises:
      ValueError: for an unknown name, with the nearest ones.
    """
    if mixture_or_task in _MIXTURES:
        return _MIXTURES[mixture_or_task]
    if mixture_or_task in _TASKS or mixture_or_task in seqio.TaskRegistry.names():
        return (mixture_or_task,)
    if mixture_or_task in seqio.MixtureRegistry.names():
        return tuple(task.name for task in seqio.MixtureRegistry.get(mixture_or_task).tasks)
    raise ValueError(_unknown(mixture_or_task))


def _unknown(name: str) -> str:
    known = [*_MIXTURES, *_TASKS]
    message = f"there is no mixture or task {name!r};{nearest(name, known)}"
    if not known:
        return f"{message} none is registered: call tasks.register() first"
    if name.endswith("_local") and not any(each.endswith("_local") for each in known):
        return f"{message} those that end with _local need the folder of their files (local_data)"
    return f"{message} mixtures: {', '.join(_MIXTURES)}; tasks of your own are known once TASKS_MODULE names their module"


def _add_tasks(
    dataset: Dataset,
    prompt: str,
    collection: str,
    source: seqio.DataSource,
    features: dict[str, seqio.Feature],
) -> None:
    name = catalog.task_name(dataset, prompt, collection)
    metric = metrics.METRICS[dataset.metric]
    shuffle = None if source.performs_internal_shuffling else SHUFFLE_BUFFER
    seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[
            preprocessors.as_json,
            preprocessors.render(dataset, prompt, features),
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=features,
        postprocess_fn=metric.postprocess,
        metric_fns=[metric.function],
        shuffle_buffer_size=shuffle,
    )
    _TASKS[name] = TaskInfo(name=name, dataset=dataset, prompt=prompt, collection=collection)
    if metric.is_ranked:
        seqio.TaskRegistry.add(
            name + RANK,
            source=source,
            preprocessors=[
                preprocessors.as_json,
                preprocessors.render(dataset, prompt, features, is_rank_form=True),
                seqio.preprocessors.append_eos_after_trim,
            ],
            output_features=features,
            postprocess_fn=metrics.ranked_target,
            metric_fns=[metric.from_scores],
            shuffle_buffer_size=shuffle,
        )


# Elements held to shuffle what is read in order; TFDS shuffles its files besides. At some 2 kB each, 20 MB.
SHUFFLE_BUFFER = 10_000


def _add_mixture(name: str, members: Sequence[str], rate_cap: int) -> None:
    seqio.MixtureRegistry.add(
        name, [(member, functools.partial(_rate, cap=rate_cap)) for member in members]
    )
    _MIXTURES[name] = tuple(members)
    # For seqio's evaluator: choices are ranked where there are choices.
    ranked = [
        each + RANK if each + RANK in seqio.TaskRegistry.names() else each for each in members
    ]
    seqio.MixtureRegistry.add(name + RANK, [(member, 1.0) for member in ranked])


def _import(module: str) -> None:
    """A module of the user's, for what it registers with seqio."""
    is_new, before = module not in sys.modules, _names()
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"TASKS_MODULE: {module!r} can't be imported ({error}): give a module by its dotted name, in the folder that this was"
            " started from, in one of PYTHONPATH, or installed; on a pod, in the image"
        ) from error
    if is_new and _names() == before:
        raise ValueError(
            f"TASKS_MODULE: {module!r} registers no task and no mixture when it is imported: it has to call seqio.TaskRegistry.add"
            " or seqio.MixtureRegistry.add at its top level"
        )


def _names() -> set[str]:
    return {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}


def _add_instructions(names: Sequence[str], rate_cap: int) -> None:
    """The instruction mixture of tasks named by the user, ours or anybody's."""
    members = tuple(dict.fromkeys(task for name in names for task in task_names(name)))
    instructions.check(members, {name: info.dataset for name, info in _TASKS.items()})
    _add_mixture(instructions.MIXTURE, members, rate_cap)


def _rate(task: seqio.Task, *, cap: int) -> int:
    """seqio's rate function. A task that only evaluates is weighed by what it has."""
    split = "train" if "train" in task.splits else next(iter(task.splits))
    prompts = len(_TASKS[task.name].dataset.prompts) if task.name in _TASKS else 1
    return mixing.examples_per_epoch(task.num_input_examples(split), prompts=prompts, cap=cap)


def _own_vocabulary(collection: str) -> seqio.Vocabulary:
    if collection == "mini":
        from tasks.miniature import vocabulary

        return vocabulary()
    return vocabularies.load(vocabularies.BYTES)


def _forget() -> None:
    """Takes our own out of seqio's registries."""
    for name in _TASKS:
        seqio.TaskRegistry.remove(name)
        seqio.TaskRegistry.remove(name + RANK)
    for name in _MIXTURES:
        seqio.MixtureRegistry.remove(name)
        seqio.MixtureRegistry.remove(name + RANK)
    _TASKS.clear()
    _MIXTURES.clear()
    _registered_with.clear()
