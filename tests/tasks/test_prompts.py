"""Every prompt of every dataset turns one row into exactly these inputs, targets and choices (rendered.json).

`python -m tests.tasks.test_prompts` writes the file anew; read the difference before you commit it.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest

from tasks import catalog, sources
from tasks.metrics import METRICS
from tests.tasks.rows import ROWS

GOLDEN = pathlib.Path(__file__).with_name("rendered.json")
REAL = {
    name: dataset
    for name, dataset in catalog.datasets().items()
    if set(dataset.sources) != {"mini"}
}


MINIATURE = {
    name: dataset for name, dataset in catalog.datasets().items() if name not in REAL
}  # of whose rows the first to validate is rendered


def rendered(name: str) -> dict[str, dict]:
    dataset = catalog.datasets()[name]
    row = ROWS[name] if name in REAL else dataset.sources["mini"].rows("validation")[0]
    return {prompt: dataclasses.asdict(dataset.render(prompt, row)) for prompt in dataset.prompts}


@pytest.mark.parametrize("name", [*REAL, *MINIATURE])
def test_renders_exactly(name: str):
    golden = json.loads(GOLDEN.read_text())
    assert json.loads(json.dumps(rendered(name))) == golden[name]
    assert len(golden[name]) >= (1 if name == "corpus" else 3)


def test_the_file_has_no_more():
    assert set(json.loads(GOLDEN.read_text())) == {*REAL, *MINIATURE}


@pytest.mark.parametrize("name", [*REAL, *MINIATURE])
def test_choices_go_with_the_metric(name: str):
    is_ranked = METRICS[catalog.datasets()[name].metric].is_ranked
    for example in rendered(name).values():
        assert bool(example["choices"]) == is_ranked
        assert len(set(example["choices"])) == len(example["choices"])


def test_the_study_has_its_23_datasets():
    counted = {
        dataset.part_of or dataset.name: dataset.category
        for dataset in REAL.values()
        if "" in dataset.sources and dataset.is_counted
    }
    assert counted == {
        name: category for category, names in catalog.STUDY.items() for name in names
    }
    roles = [catalog.CATEGORIES[category] for category in counted.values()]
    assert (roles.count(catalog.HELD_IN), roles.count(catalog.HELD_OUT)) == (16, 7)
    assert len(REAL["dbpedia_14"].render("kind", ROWS["dbpedia_14"]).choices) == 14


def test_a_collection_is_mixed_by_category_and_role():
    found = catalog.mixtures(REAL.values(), "local")
    assert len(found) == 12 + 2
    assert {each.name for each in found["sentiment_local"]} == {
        "rotten_tomatoes",
        "review_sentences",
    }
    assert not set(map(id, found["held_in_local"])) & set(map(id, found["held_out_local"]))


@pytest.mark.real
def test_every_real_row_renders(real_data: pathlib.Path):
    count = 0
    for dataset in REAL.values():
        source = dataset.sources.get("local")
        for split in source.splits if source else ():
            for row in sources.rows(source, split, folder=real_data / "tasks")[:200]:
                for prompt in dataset.prompts:
                    example = dataset.render(prompt, row)
                    assert example.inputs and example.targets
                    count += 1
    assert count > 20_000


if __name__ == "__main__":
    found = {name: rendered(name) for name in (*REAL, *MINIATURE)}
    GOLDEN.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
