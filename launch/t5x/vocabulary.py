"""The vocabulary of a task, for T5X's model: T5X wants both, and refuses two that differ."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import seqio


def vocabulary_of(mixture_or_task_name: str, module: str | None) -> seqio.Vocabulary:
    """The vocabulary of a task's or mixture's targets.

    Args:
      mixture_or_task_name: as registered.
      module: what registers it when it is imported; None: it is registered.

    Raises ValueError where there is no such task.
    """
    import seqio

    if module is not None:
        importlib.import_module(module)
    provider = seqio.get_mixture_or_task(mixture_or_task_name)
    return provider.output_features["targets"].vocabulary
