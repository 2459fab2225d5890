"""What the examples of some tasks depend on, as JSON: it changes with whatever changes them."""

from __future__ import annotations

import functools
import hashlib
import pathlib
from collections.abc import Iterable
from typing import Any

import seqio

import tasks
from tasks import registry, vocabularies


def of_tasks(names: Iterable[str]) -> dict[str, Any]:
    """Sources, files, vocabularies and code of registered tasks.

    Args:
      names: of tasks, ours or registered by others.
    """
    infos = registry.task_infos()
    providers = {name: seqio.TaskRegistry.get(name) for name in names}
    features = [each.output_features for each in providers.values()]
    return {
        "tasks": {
            name: str(infos[name].source if name in infos else each.source)
            for name, each in providers.items()
        },
        "vocabularies": {
            part: list(  # each once, in the order of the tasks
                dict.fromkeys(vocabularies.digest(each[part].vocabulary) for each in features)
            )
            for part in ("inputs", "targets")
        },
        "data": {name: _files(each) for name, each in providers.items()},
        "code": _code(),
    }


def _files(task: Any) -> list[list[Any]]:
    """Name, size and time of the files that a task reads, where they are known."""
    stats = [(file, file.stat()) for file in getattr(task.source, "files", [])]
    return [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in stats]


@functools.cache
def _code() -> str:
    """Of this package: a prompt that was changed makes other examples."""
    package = pathlib.Path(tasks.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\n".encode() + file.read_bytes())
    return digest.hexdigest()
