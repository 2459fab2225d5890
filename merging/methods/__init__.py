"""The merge methods by name, found by walking this folder: a new file with a `Method` in it is a new method."""

from __future__ import annotations

import importlib
import pkgutil
import re

from merging.methods.method import Method, TaskVectorMethod


def _found() -> dict[str, type[Method]]:
    methods = {}
    for module in pkgutil.iter_modules(__path__):
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Method):
                if value not in (Method, TaskVectorMethod):
                    methods[snake_case(value.__name__)] = value
    return dict(sorted(methods.items()))


def snake_case(name: str) -> str:
    """`DareTies` -> `dare_ties`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


METHODS: dict[str, type[Method]] = _found()  # e.g. {"ties": Ties}
