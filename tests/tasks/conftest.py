"""Small files in the form of the real ones, and the tasks registered on them."""

from __future__ import annotations

import gzip
import json
import pathlib
import warnings
from collections.abc import Callable
from types import ModuleType

import pytest

WORDS = "quick slow bright dull warm cold happy sad loud calm long short".split()


def row(number: int) -> dict:
    """Row `number` of a set of reviews: its words are a number in base 12, so no two are equal."""
    words = [WORDS[number // 12**place % 12] for place in range(3)]
    return {"text": " ".join(words * (1 + number % 4)), "label": number % 2}


@pytest.fixture(scope="session")
def local_data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Two sets of reviews: 60 and 40 rows to train on, 20 to validate."""
    folder = tmp_path_factory.mktemp("local_data")
    for name, train, first in (("rotten_tomatoes", 60, 0), ("review_sentences", 40, 500)):
        splits = ["train"] * train + ["validation"] * 20
        lines = [
            json.dumps({"id": f"{name}-{i}", "split": split, "fields": row(first + i)})
            for i, split in enumerate(splits)
        ]
        text = "\n".join(lines) + "\n"
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return folder


@pytest.fixture(scope="session")
def seqio_module() -> ModuleType:
    """seqio, whose imports warn of what they will have to change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import seqio
        import seqio.test_utils
    return seqio


@pytest.fixture
def registered(seqio_module: ModuleType, local_data: pathlib.Path) -> Callable[..., None]:
    """Registers all tasks, with bytes as the vocabulary of all."""
    import tasks

    def register(**arguments) -> None:
        tasks.register(**({"vocabulary": "bytes", "local_data": local_data} | arguments))

    register()
    return register
