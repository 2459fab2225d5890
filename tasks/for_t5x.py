"""Registers all tasks and mixtures when it is imported: T5X's MIXTURE_OR_TASK_MODULE = 'tasks.for_t5x'."""

import tasks

tasks.register()
