"""Every real task through seqio, with injected rows and no download."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tasks import catalog
from tests.tasks.rows import ROWS, is_tfds

STUDY = [name for name, dataset in catalog.datasets().items() if "" in dataset.sources]


def element(name: str) -> dict[str, Any]:
    """A row as the source of the study gives it to seqio."""
    row = ROWS[name]
    if is_tfds(catalog.datasets()[name].sources[""]):
        return row
    return {"row": json.dumps(row)}


def ids(text: str) -> list[int]:
    return [3 + byte for byte in text.encode()]


@pytest.mark.parametrize("name", STUDY)
def test_preprocessing(registered, seqio_module: ModuleType, name: str):
    dataset = catalog.datasets()[name]
    for prompt in dataset.prompts:
        task = catalog.task_name(dataset, prompt, "")
        found = seqio_module.test_utils.test_preprocessing_single(task, {"train": element(name)})
        example = dataset.render(prompt, ROWS[name])
        assert found["inputs_pretokenized"].decode() == example.inputs
        assert found["targets_pretokenized"].decode() == example.targets
        assert found["inputs"].tolist() == ids(example.inputs)
        assert found["targets"].tolist() == [*ids(example.targets), 1]
        assert tuple(each.decode() for each in found["choices"]) == example.choices
        assert tuple(each.decode() for each in found["references"]) == example.references
        assert found["label"] == (-1 if example.label is None else example.label)


@pytest.mark.parametrize("task", ["wic_same", "squad_span_local", "common_gen_scene", "xsum_lead"])
def test_the_evaluator_finds_the_right_answer_right(
    registered, seqio_module: ModuleType, task: str
):
    name = task.rsplit("_", 2)[0] if task.endswith("_local") else task.rsplit("_", 1)[0]
    row = {"validation": {"row": json.dumps(ROWS[name])}}
    if "" in catalog.datasets()[name].sources:
        row = {"validation": element(name)}
    target = (
        catalog.datasets()[name]
        .render(task.split("_local")[0].rsplit("_", 1)[1], ROWS[name])
        .targets
    )
    values = seqio_module.test_utils.test_postprocessing(
        task, row, predict_output=[target], sequence_length={"inputs": 400, "targets": 100}
    )
    means = {key: value for key, value in values.items() if not key.endswith("_stderr")}
    assert means
    assert all(value == pytest.approx(1.0) or key == "bleu" for key, value in means.items())


def test_a_mixture_has_a_form_that_ranks_choices_where_there_are_some(
    registered, seqio_module: ModuleType
):
    from tasks import registry

    infos = registry.task_infos()
    for name in ("closed_book_qa", "held_out_mini"):
        ranked = seqio_module.MixtureRegistry.get(f"{name}_rank").tasks
        expected = {
            task + "_rank" if infos[task].dataset.metric.startswith("accuracy") else task
            for task in registry.mixtures()[name]
        }
        assert {task.name for task in ranked} == expected
        assert any(task.endswith("_rank") for task in expected)


def test_a_dataset_is_a_mixture_of_its_prompts(registered):
    from tasks import registry

    assert registry.task_names("rte_local") == (
        *(f"rte_{prompt}_local" for prompt in catalog.datasets()["rte"].prompts),
    )
    assert len(registry.task_names("senses_mini")) == 3


def test_the_rank_form_scores_choices(registered, seqio_module: ModuleType):
    row = {"validation": element("hellaswag")}
    found = list(seqio_module.test_utils.test_preprocessing("hellaswag_plain_rank", row))
    assert [each["targets_pretokenized"].decode() for each in found] == ROWS["hellaswag"]["endings"]
    assert [each["idx"].tolist() for each in found] == [[0, i] for i in range(4)]
    assert [bool(each["is_correct"]) for each in found] == [True, False, False, False]
    for scores, accuracy in (([-1.0, -2, -3, -4], 1.0), ([-3.0, -2, -3, -4], 0.0)):
        values = seqio_module.test_utils.test_postprocessing(
            "hellaswag_plain_rank",
            row,
            score_output=scores,
            sequence_length={"inputs": 100, "targets": 40},
        )
        assert values["accuracy"] == accuracy


def test_registered_twice_is_once(registered: Callable[..., None], seqio_module: ModuleType):
    task = seqio_module.TaskRegistry.get("copa_link")
    registered()
    assert seqio_module.TaskRegistry.get("copa_link") is task
    registered(rate_cap=10)
    assert seqio_module.TaskRegistry.get("copa_link") is not task
    mixture = seqio_module.MixtureRegistry.get("sentiment_local")
    rates = {each.name: mixture.get_rate(each) for each in mixture.tasks}
    assert rates["rotten_tomatoes_liked_local"] == 10 // 3
    registered()
    mixture = seqio_module.MixtureRegistry.get("sentiment_local")
    rates = {each.name: mixture.get_rate(each) for each in mixture.tasks}
    assert rates["rotten_tomatoes_liked_local"] == 60
    assert rates["review_sentences_tone_local"] == 40


def test_t0s_rates_need_no_download(registered, seqio_module: ModuleType):
    mixture = seqio_module.MixtureRegistry.get("structure_to_text")
    rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
    assert rates["common_gen_scene"] == 67_389
    assert rates["wiki_bio_who"] == 500_000 // 3


def test_a_mixture_mixes(registered, seqio_module: ModuleType):
    lengths = {"inputs": 64, "targets": 8}
    dataset = seqio_module.get_mixture_or_task("sentiment_local").get_dataset(
        lengths, split="train", seed=1
    )
    found = [each["targets"].tolist() for each in dataset.take(50).as_numpy_iterator()]
    assert len({tuple(each) for each in found}) == 6 - 0  # no, yes, negative, positive, ...
    assert max(map(len, found)) <= 8


def test_two_shards_add_up(registered, seqio_module: ModuleType):
    task = seqio_module.TaskRegistry.get("rotten_tomatoes_liked_local")

    def read(**arguments) -> list[bytes]:
        dataset = task.get_dataset(None, split="train", shuffle=True, seed=3, **arguments)
        return [each["id"] for each in dataset.as_numpy_iterator()]

    halves = [read(shard_info=seqio_module.ShardInfo(index=i, num_shards=2)) for i in (0, 1)]
    assert [each for pair in zip(*halves, strict=True) for each in pair] == read()
    assert len(set(read())) == 60


def test_unknown_names_and_their_neighbours(registered: Callable[..., None]):
    from tasks import registry

    with pytest.raises(ValueError, match="no mixture or task 'sentimant'; did you mean sentiment"):
        registry.task_names("sentimant")
    registered(local_data=None)
    with pytest.raises(ValueError, match="'sentiment_local'.* need the folder of their files"):
        registry.task_names("sentiment_local")
    with pytest.raises(ValueError, match="prompts are 'own' or 'p3'; found 'mine'"):
        registered(prompts="mine")


class TestInstructions:
    """The instruction mixture holds nothing that the study judges by, whatever it is called."""

    def test_ours(self, registered: Callable[..., None], seqio_module: ModuleType):
        registered(instruction_tasks=["sentiment_local", "trec_label_local"])
        assert len(seqio_module.MixtureRegistry.get("instruction").tasks) == 7
        with pytest.raises(ValueError, match=r"take out wic_same_local \(holds wic\)"):
            registered(instruction_tasks=["sentiment_local", "wic_same_local"])
        with pytest.raises(ValueError, match="holds anli_r1.*holds hellaswag.*holds winogrande"):
            registered(instruction_tasks=["held_out"])
        registered()
        assert "instruction" not in seqio_module.MixtureRegistry.names()

    @pytest.mark.parametrize(
        ("name", "held_out"),
        [
            ("flan_rte_template_3_zero_shot", "rte"),
            ("super_glue_wsc.fixed:1.0.2", "wsc"),
            ("anli_r3_0", "anli_r1"),
            ("glue_wnli_v2", "wsc"),
            ("WinoGrande_xl_debiased", "winogrande"),
            ("commitment_bank_few_shot", "cb"),
            ("starters_and_articles", None),  # "rte" and "art" are parts of words here
            ("snli_10templates", None),
        ],
    )
    def test_others(self, seqio_module: ModuleType, name: str, held_out: str | None):
        from tasks import instructions

        assert instructions.held_out_in(name) == held_out

    def test_by_the_set_that_a_task_reads(
        self, registered: Callable[..., None], seqio_module: ModuleType
    ):
        name = "my_questions"
        seqio_module.TaskRegistry.add(
            name,
            source=seqio_module.TfdsDataSource(tfds_name="super_glue/copa:1.0.2", splits=["train"]),
            preprocessors=[],
            output_features={},
        )
        try:
            with pytest.raises(ValueError, match=r"my_questions \(holds copa\)"):
                registered(instruction_tasks=[name])
        finally:
            seqio_module.TaskRegistry.remove(name)


def test_p3s_prompts_take_the_place_of_ours(
    registered: Callable[..., None], seqio_module: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    """With a stand-in for promptsource that has its interface."""
    import tasks.p3

    @dataclasses.dataclass
    class Template:
        name: str
        answer_choices: str | None = "no ||| yes"
        is_original: bool = True

        @property
        def metadata(self):
            return type("Metadata", (), {"original_task": self.is_original})

        def apply(self, row):
            return (
                [""]
                if row["label"] == 7
                else [f" {self.name}: {row['text']} ", "no yes".split()[row["label"]]]
            )

        def get_answer_choices_list(self, row):
            return self.answer_choices.split(" ||| ")

    given = {
        "imdb": [
            Template("Is it good?"),
            Template("reversed", is_original=False),
            Template("write", None),
        ],
        "app_reviews": [Template("a", is_original=False), Template("b", is_original=False)],
    }

    class DatasetTemplates:
        def __init__(self, name, subset):
            templates = given.get(name, [Template("x", answer_choices="no ||| yes")])
            self.templates = {str(i): each for i, each in enumerate(templates)}

    monkeypatch.setattr(
        tasks.p3, "_templates", lambda: type("t", (), {"DatasetTemplates": DatasetTemplates})
    )
    registered(prompts="p3")
    names = seqio_module.MixtureRegistry.get("sentiment").tasks
    assert {task.name for task in names} == {"imdb_Is_it_good", "app_reviews_a", "app_reviews_b"}
    test = seqio_module.test_utils.test_preprocessing
    (found,) = test("imdb_Is_it_good", {"train": {"text": "fine", "label": 1}})
    assert (found["inputs_pretokenized"], found["targets_pretokenized"]) == (
        b"Is it good?: fine",
        b"yes",
    )
    assert list(test("imdb_Is_it_good", {"train": {"text": "fine", "label": 7}})) == []
    registered()


def test_p3_without_promptsource(registered: Callable[..., None], monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, "promptsource", None)
    with pytest.raises(
        ValueError, match="pip install --no-deps --ignore-requires-python promptsource"
    ):
        registered(prompts="p3")


def test_tokens_are_as_numpy_wants_them(
    registered, seqio_module: ModuleType, local_data: pathlib.Path
):
    task = seqio_module.TaskRegistry.get("rotten_tomatoes_liked_local")
    (first,) = task.get_dataset(None, split="validation", shuffle=False).take(1).as_numpy_iterator()
    assert (first["inputs"].dtype, first["label"].dtype) == (np.int32, np.int32)
    assert first["id"] == b"rotten_tomatoes-60"


# ---- modules of the user's -------------------------------------------------------------------------------------------

OWN_TASKS = """
import seqio
import tasks
from tasks import vocabularies

seqio.TaskRegistry.add(
    "own_text",
    source=seqio.FunctionDataSource(lambda split, shuffle_files, seed=None: None, splits=["train"]),
    preprocessors=[],
    output_features=vocabularies.features(seqio.ByteVocabulary()),
)
seqio.MixtureRegistry.add("own_mixture", ["own_text", "topics_local"], default_rate=1)
"""


def test_a_module_of_the_user_s_is_imported_behind_ours(
    registered, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    from tasks import registry

    ours = next(name for name in registry.task_infos() if name.startswith("rotten_tomatoes"))
    (tmp_path / "own_tasks.py").write_text(OWN_TASKS.replace("topics_local", ours))
    (tmp_path / "own_nothing.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="'own_mixture'.*known once TASKS_MODULE names"):
        registry.task_names("own_mixture")
    try:
        for _ in range(2):  # ours are registered anew, the module is imported once
            registered(tasks_module="own_tasks", instruction_tasks=["own_text"])
            assert registry.task_names("own_mixture") == ("own_text", ours)
            assert registry.mixtures()["instruction"] == ("own_text",)
            registered()
        with pytest.raises(ValueError, match="'no_such.module' can't be imported"):
            registered(tasks_module=["own_tasks", "no_such.module"])
        with pytest.raises(ValueError, match="'own_nothing' registers no task and no mixture"):
            registered(tasks_module=["own_nothing"])
    finally:
        registry.seqio.MixtureRegistry.remove("own_mixture")
        registry.seqio.TaskRegistry.remove("own_text")
