"""P3's own prompts (arXiv 2202.01279), by the package `promptsource`, in place of ours.

T0 takes the templates that are marked as the original task; HotpotQA and App Reviews have none so marked, so all of
theirs are taken. Of ranked datasets, templates without choices are left out. promptsource 0.2.3 declares Python below
3.10 but runs on later ones:

  pip install 'merging-at-scale[p3]' && pip install --no-deps --ignore-requires-python promptsource
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterable
from typing import Any

from tasks.dataset import Dataset, Example, Prompt, Row, as_it_is
from tasks.metrics import METRICS


def with_p3_prompts(datasets: Iterable[Dataset]) -> list[Dataset]:
    """The datasets that P3 has, with its prompts, which speak of the columns of a row as they are.

    Raises:
      ValueError: if promptsource is not installed.
    """
    templates = _templates()
    return [
        dataclasses.replace(
            dataset, prompts=_prompts(dataset, templates), view=as_it_is, view_fields=()
        )
        for dataset in datasets
        if dataset.p3
    ]


@dataclasses.dataclass(frozen=True)
class P3Prompt:
    """A template of promptsource as a prompt."""

    template: Any
    is_ranked: bool

    def __call__(self, row: Row) -> Example | None:
        parts = self.template.apply(dict(row))
        if len(parts) != 2 or not all(part.strip() for part in parts):
            return None
        inputs, targets = (part.strip() for part in parts)
        if not self.is_ranked:
            return Example(inputs=inputs, targets=targets)
        choices = tuple(each.strip() for each in self.template.get_answer_choices_list(dict(row)))
        if targets not in choices:
            raise ValueError(
                f"the targets of P3's {self.template.name!r} are none of {choices}: {targets!r}"
            )
        return Example(
            inputs=inputs, targets=targets, choices=choices, label=choices.index(targets)
        )


def _prompts(dataset: Dataset, templates: Any) -> dict[str, Prompt]:
    name, _, subset = dataset.p3.partition("/")
    every = list(templates.DatasetTemplates(name, subset or None).templates.values())
    is_ranked = METRICS[dataset.metric].is_ranked
    if is_ranked:
        every = [each for each in every if each.answer_choices]
    originals = [each for each in every if each.metadata.original_task] or every
    return {_slug(each.name): P3Prompt(each, is_ranked) for each in originals}


def _slug(name: str) -> str:
    """A template's name as a part of a task's: letters, digits and underscores."""
    return re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_")


def _templates() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it imports pkg_resources, which says that it will go
            from promptsource import templates
    except ImportError as error:
        raise ValueError(
            f"P3's prompts need the package promptsource, which can't be imported ({error}):"
            " pip install 'merging-at-scale[p3]' &&"
            " pip install --no-deps --ignore-requires-python promptsource"
        ) from error
    return templates
