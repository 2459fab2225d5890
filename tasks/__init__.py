"""Tasks of the study as seqio tasks and mixtures: data, prompts, metrics. Importing it registers nothing.

Importing it loads neither TensorFlow nor seqio, which takes seconds: the functions here do, when they are called.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tasks.mixing import RATE_CAP

if TYPE_CHECKING:
    import seqio


def register(
    *,
    vocabulary: str | seqio.Vocabulary | None = None,
    local_data: str | pathlib.Path | None = None,
    instruction_tasks: Sequence[str] = (),
    rate_cap: int = RATE_CAP,
    prompts: str = "own",
    tasks_module: str | Sequence[str] = (),
) -> None:
    """Registers all tasks and mixtures with seqio. Twice with the same arguments is once; others replace them.

    Args:
      vocabulary: of all tasks: "bytes", a path (.model, .json), or a seqio vocabulary. None: the miniature's own for
        those that end with _mini, bytes for the others.
      local_data: folder of JSON lines; None: no tasks that end with _local.
      instruction_tasks: tasks or mixtures, ours or registered by others, that make the mixture `instruction`.
      rate_cap: the most examples of one dataset that a mixture takes (T0: 500,000).
      prompts: "own", ours; or "p3", P3's by the package promptsource, for the datasets of P3 (the others then have no
        tasks).
      tasks_module: a module, or several, that registers tasks or mixtures of the user's with seqio when it is imported, which is
        behind ours, so that its mixtures may hold them.

    Raises:
      ValueError: for a vocabulary that can't be loaded, instruction tasks that hold a held-out dataset, or a module that can't be
        imported or registers nothing.
    """
    from tasks import registry

    registry.register(
        vocabulary=vocabulary,
        local_data=local_data,
        instruction_tasks=instruction_tasks,
        rate_cap=rate_cap,
        prompts=prompts,
        tasks_module=tasks_module,
    )
