"""The mixture that an instruction-tuned base is trained on, kept free of what it will be judged by.

Collections like Flan-2021 hold every held-out dataset of the study under names of their own, so the check knows a
dataset's other names, and looks at the name of a task and at the TFDS set it reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from tasks import catalog
from tasks.dataset import Dataset

MIXTURE = "instruction"


def check(names: Sequence[str], ours: Mapping[str, Dataset]) -> None:
    """Refuses a mixture that holds a held-out dataset.

    Args:
      names: of the tasks, as registered with seqio.
      ours: {name: dataset} of the tasks of this package.

    Raises:
      ValueError: with every task that is or may be one, and the dataset it holds.
    """
    found = [(name, held_out_in(name, ours.get(name))) for name in names]
    bad = [f"{name} (holds {dataset})" for name, dataset in found if dataset]
    if bad:
        raise ValueError(
            "an instruction mixture must hold no held-out dataset, on which the study judges; take out "
            + ", ".join(bad)
        )


def held_out_in(name: str, dataset: Dataset | None = None) -> str | None:
    """The held-out dataset that a task is made of, or None."""
    if dataset is not None:
        return dataset.name if catalog.role(dataset) == catalog.HELD_OUT else None
    texts = [words(name), words(_tfds_name(name))]
    for held_out in catalog.datasets().values():
        if catalog.role(held_out) == catalog.HELD_OUT:
            for alias in (held_out.name, *held_out.aliases):
                if any(f" {words(alias)} " in f" {text} " for text in texts):
                    return held_out.name
    return None


def words(name: str) -> str:
    """Lower case, spaces between runs of letters and digits: "super_glue/wsc.fixed" -> "super glue wsc fixed"."""
    return " ".join(re.findall(r"[a-z0-9]+", name.lower()))


def _tfds_name(task: str) -> str:
    """The TFDS set that a registered task reads, or ""."""
    import seqio

    if task not in seqio.TaskRegistry.names():
        return ""
    loader = getattr(seqio.TaskRegistry.get(task).source, "tfds_dataset", None)
    return loader.name if loader is not None and loader.name else ""
