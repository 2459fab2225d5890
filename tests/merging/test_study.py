"""The study stage on a tiny world: everything once, whatever ends it or shares it, and merges that are those from disk to disk."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import optax
import pytest
from etils import epath

import merging
from merging import manifest, study
from merging.evaluation.collect import SCORES, ScoresFile
from merging.grid import study_file, tuning
from merging.grid.relative import relative
from merging.grid.results import read as read_results
from merging.grid.study_file import Category, Dataset
from merging.interrupted import Interrupted
from merging.manifest import OutputError
from merging.methods.averaging import Averaging
from merging.methods.dare_ties import DareTies
from merging.methods.ties import Ties
from merging.partitioning import MeshShape
from merging.study import Data, InputMissing, Settings, Training
from merging.study_models import SHARE_OF_MEMORY, StudyModels
from merging.training.optimizer import adamw
from tests.merging.evaluation.test_evaluator import TASKS
from tests.merging.training import runs

pytestmark = pytest.mark.usefixtures("optax_promotes")

CATEGORIES = {
    "ones": Category(
        role="held_in", datasets={"many": Dataset(tasks=("many",), metric="accuracy")}
    ),
    "twos": Category(
        role="held_in", datasets={"written": Dataset(tasks=("written",), metric="exact")}
    ),
    "threes": Category(
        role="held_out", datasets={"few": Dataset(tasks=("few",), metric="accuracy")}
    ),
}
SEEDS = {"text": 5, "tuning": 6, "ones_tiny": 0, "twos_tiny": 1, "both": 2}
METHODS = {"averaging": Averaging(), "ties": Ties(density=0.3), "dare_ties": DareTies()}


def mixture(how: Training, name: str) -> Any:
    return dataclasses.replace(runs.mixture(name, SEEDS[name]), validation=None)


DATA = Data(
    categories=CATEGORIES,
    mixture=mixture,
    tasks=lambda is_tuned: (TASKS, {"of": "test", "is_tuned": is_tuned}),
    tuning_tasks=lambda: (TASKS[:-1], {"of": "tuning"}),
    depends_on=lambda is_tuned: {"limit": 5},
)


def training(name: str, **changes: Any) -> Training:
    standard = {"train_steps": 3, "batch_size": runs.ROWS, "learning_rate": 1e-2}
    return Training(mixture=name, lengths={}, **standard | changes)


def settings(output: pathlib.Path, **changes: Any) -> Settings:
    standard: dict[str, Any] = {
        "name": "tiny",
        "question": "Does it run?",
        "sizes": {"tiny": runs.CONFIG},
        "bases": {
            "pretrained": training("text"),
            "instruction_tuned": training("tuning", start="pretrained"),
        },
        "expert": training("{category}_tiny"),
        "multitask": training("both"),
        "methods": METHODS,
        "num_experts": (1, 2),
        "seeds": (0, 1),
        "mesh": MeshShape().mesh(jax.devices()[:1]),
        "row_length": 48,
        "batch_tokens": 160,
        "shapes": 1,
    }
    return Settings(output_dir=output, **standard | changes)


SMALL = {
    "bases": {"pretrained": training("text")},
    "multitask": None,
    "methods": {"averaging": Averaging()},
    "num_experts": (2,),
    "seeds": (0,),
}


def run(output: pathlib.Path, *, options: dict[str, Any] | None = None, **arguments: Any):
    return study.run(study.plan(settings(output, **options or {}), DATA), **arguments)


def models_of(planned: study.Plan, base: str) -> StudyModels:
    making = study._Making(planned, "", print, lambda *args: None, lambda: False)
    return making._models_of("tiny", base)


def scores(output: pathlib.Path) -> dict[str, Any]:
    found = {}
    for path in sorted(output.rglob(SCORES)):
        lines = [dataclasses.replace(s, seconds=0.0) for s in ScoresFile(path).scores]
        found[str(path.parent.relative_to(output))] = [line.line() for line in lines]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    output = tmp_path_factory.mktemp("whole") / "study"
    told = []
    report = run(
        output, progress=lambda phase, done, total, name: told.append((phase, done, total))
    )
    # Two experts, base and multitask of each base; averaging and TIES of 2 do not depend on the seed.
    assert report.made == {"bases": 1, "experts": 6, "cells": 2 * (4 + 3 * 2 + 1 + 1 + 2)}
    assert told[-1] == ("cells", 28, 28)
    return output


@pytest.mark.slow
def test_everything_is_there_once_and_is_not_made_again(whole: pathlib.Path):
    found = scores(whole)
    assert len(found) == 28
    for place, lines in found.items():
        size, base, model = pathlib.Path(place).parts[1:]
        assert {json.loads(line)["model"] for line in lines} == {f"{size}/{base}/{model}"}
        assert {json.loads(line)["task"] for line in lines} == {task.name for task in TASKS}
    assert run(whole).made == {"bases": 0, "experts": 0, "cells": 0}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["ties_n2_s0", "dare_ties_n2_s1", "averaging_n1_s1"])
def test_a_cell_s_merge_is_that_from_disk_to_disk(
    whole: pathlib.Path, tmp_path: pathlib.Path, model: str
):
    planned = study.plan(settings(whole), DATA)
    cell = planned.merges("tiny", "instruction_tuned")[model]
    in_memory = models_of(planned, "instruction_tuned").params(model)
    merging.merge_checkpoints(
        base=planned.base_folder("tiny", "instruction_tuned"),
        experts=[
            planned.expert_folder("tiny", "instruction_tuned", category)
            for category in cell.categories
        ],
        output_dir=tmp_path / "merged",
        method=METHODS[cell.method],
        seed=cell.seed,
    )
    from_disk = runs.params(tmp_path / "merged")
    flat = flax.traverse_util.flatten_dict(in_memory, sep="/")
    leaves = {name: np.asarray(leaf) for name, leaf in flat.items()}
    assert leaves.keys() == from_disk.keys()
    for name, leaf in leaves.items():
        assert leaf.tobytes() == from_disk[name].tobytes(), name


@pytest.mark.slow
def test_ended_anywhere_it_goes_on_to_the_same_scores(whole: pathlib.Path, tmp_path: pathlib.Path):
    output = tmp_path / "study"
    shutil.copytree(whole / "models", output / "models")  # whose resuming is tested with finetune

    class Ended(Exception):
        pass

    def end_after(number: int):
        def progress(phase: str, done: int, total: int, name: str) -> None:
            if phase == "cells" and done == number:
                raise Ended

        return progress

    for number in (3, 17):
        with pytest.raises(Ended):
            run(output, progress=end_after(number))
    asked = []

    def ask() -> bool:  # before each model
        asked.append(None)
        return len(asked) == 3

    with pytest.raises(Interrupted):
        run(output, should_stop=ask)
    # A model whose scores are there and whose manifest is not was ended between the two.
    (output / "scores/tiny/pretrained/base" / manifest.MANIFEST).unlink()
    assert run(output).made["cells"] == 28 - 17 - 2 + 1
    assert scores(output) == scores(whole)


@pytest.mark.slow
def test_two_workers_give_the_scores_of_one(whole: pathlib.Path, tmp_path: pathlib.Path):
    output = tmp_path / "study"
    run(output, phases=["bases"])
    for phase in ("experts", "cells"):
        made = [run(output, phases=[phase], worker=i, num_workers=2).made[phase] for i in (1, 0)]
        assert made == ([3, 3] if phase == "experts" else [14, 14])
    assert scores(output) == scores(whole)


@pytest.mark.slow
def test_what_another_process_is_making_is_waited_for(tmp_path: pathlib.Path):
    def worker(name: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "tests.merging.study_job", str(tmp_path / "study"), name]
        return stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )

    with contextlib.ExitStack() as stack:
        first = worker("first")
        assert first.stdout.readline() == "training\n"
        second = worker("second")
        passed_over = second.stdout.readline()
        assert passed_over.startswith("tiny/bases is being made by another worker")
        assert "waiting for tiny/bases" in second.stdout.readline()
        assert first.communicate("go on\n", timeout=300) == ("1\n", None)
        assert second.communicate(timeout=300) == ("0\n", None)
    assert (first.returncode, second.returncode) == (0, 0)
    assert manifest.read(tmp_path / "study/models/tiny/pretrained/base") is not None
    assert not any(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
def test_experts_that_do_not_fit_are_streamed_to_the_same_scores(
    whole: pathlib.Path, tmp_path: pathlib.Path
):
    output = tmp_path / "study"
    shutil.copytree(whole / "models", output / "models")
    told = []
    run(output, options={"experts_in_memory": False}, log=told.append)
    assert "merges are streamed from disk" in told[0]
    assert scores(output) == scores(whole)
    assert not any((output / "streamed").iterdir())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """One base, two experts, their average, and no multitask model."""
    output = tmp_path_factory.mktemp("small") / "study"
    report = run(output, options=SMALL)
    assert report.made == {"bases": 1, "experts": 2, "cells": 4}
    parts = dataclasses.astuple(report.spent)
    assert min(parts) >= 0 and 0 < report.spent.work <= sum(parts) <= report.seconds
    return output


@pytest.mark.slow
def test_what_was_cut_and_where_the_time_went_is_kept(small: pathlib.Path):
    found = read_results(small)
    assert found.is_there.all() and not found.study.has_multitask
    counts = {task.name: {"examples": 0, "inputs": 0, "targets": 0} for task in TASKS}
    for task in TASKS:
        counts[task.name]["examples"] += len(task.examples)
        counts[task.name]["inputs"] += task.cut_inputs
        counts[task.name]["targets"] += task.cut_targets
    for name in ("base", "averaging_n2_s0"):
        how = found.manifests[f"scores/tiny/pretrained/{name}"]
        assert how["cut"] == counts
        assert (how["merge_seconds"] > 0) == (name != "base")
        assert 0 < how["forward_seconds"] <= how["evaluate_seconds"]
    trained = found.manifests["models/tiny/pretrained/experts_0"]
    assert 0 < trained["step_seconds"] < trained["seconds"]


@pytest.mark.slow
def test_merged_checkpoints_are_kept_where_asked_for(small: pathlib.Path, tmp_path: pathlib.Path):
    output = tmp_path / "study"
    shutil.copytree(small, output)
    assert not (output / "merged").exists()
    options = {**SMALL, "keep_merged": True}
    assert run(output, options=options).made["cells"] == 1
    assert scores(output) == scores(small)
    planned = study.plan(settings(small, **SMALL), DATA)
    in_memory = models_of(planned, "pretrained").params("averaging_n2_s0")
    on_disk = runs.params(output / "merged/tiny/pretrained/averaging_n2_s0")
    for name, leaf in flax.traverse_util.flatten_dict(in_memory, sep="/").items():
        assert np.asarray(leaf).tobytes() == on_disk[name].tobytes(), name

    # The same merge again is scored from what was kept.
    made = manifest.read(output / "merged/tiny/pretrained/averaging_n2_s0")
    (output / "scores/tiny/pretrained/averaging_n2_s0" / manifest.MANIFEST).unlink()
    assert run(output, options=options).made["cells"] == 1
    assert scores(output) == scores(small)
    assert manifest.read(output / "merged/tiny/pretrained/averaging_n2_s0") == made
    assert run(output, options=options).made["cells"] == 0


@pytest.mark.slow
def test_what_does_not_fit_is_streamed(whole: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    planned = study.plan(settings(whole), DATA)
    nbytes = 4 * runs.CONFIG.num_params() * (2 + 2)  # base, two experts, their merge
    for room, streams in ((nbytes, False), (nbytes - 1, True)):
        monkeypatch.setattr(
            "merging.study_models.memory_bytes", lambda mesh, room=room: room / SHARE_OF_MEMORY
        )
        assert models_of(planned, "pretrained").streams == streams


@pytest.mark.slow
def test_settings_are_chosen_by_what_judges_nobody(whole: pathlib.Path, tmp_path: pathlib.Path):
    output = tmp_path / "study"
    shutil.copytree(whole / "models", output / "models")
    options = {"tune": True, "methods": {"averaging": Averaging(), "ties": Ties()}, "seeds": (0,)}
    options["bases"] = {"pretrained": settings(output).bases["pretrained"]}
    run(output, options=options)
    planned = study.plan(settings(output, **options), DATA)
    names = {(c.method, c.num_experts, c.setting): c.model for c in planned.cells}
    # Averaging has nothing to choose.
    assert names["averaging", 2, "tuned"] == names["averaging", 2, "fixed"] == "averaging_n2_s0"
    assert names["ties", 2, "tuned"] == "ties_n2_s0_tuned"

    # The choice is the best of all by the tuning tasks, each merged and scored here once more.
    of_tuned = models_of(planned, "pretrained")
    found = json.loads((output / "tuned/tiny/pretrained/ties_n2.json").read_text())
    wanted = {
        repr(option): of_tuned._judge(
            of_tuned.merged(option, ("ones", "twos"), seed=0), ("ones", "twos")
        )
        for option in tuning.candidates(Ties())
    }
    assert found["options"] == wanted
    best = tuning.candidates(Ties())[found["chosen"]]
    assert wanted[repr(best)] == max(wanted.values())
    how = manifest.read(output / "scores/tiny/pretrained/ties_n2_s0_tuned")
    assert how["identity"]["method"] == repr(best)

    # It is read, not made again, while it depends on the same.
    of_tuned._judge = None
    (cell,) = (c for c in planned.cells if (c.model, c.seed) == ("ties_n2_s0_tuned", 0))
    assert of_tuned.method(cell) == best


@pytest.mark.slow
def test_experts_of_fewer_steps_are_merged_too(whole: pathlib.Path, tmp_path: pathlib.Path):
    output = tmp_path / "study"
    shutil.copytree(whole / "models", output / "models")
    options = {"expert_steps": (1,), "methods": {"averaging": Averaging()}, "num_experts": (2,)}
    assert run(output, options=options).made["experts"] == 4  # two of each base
    found, before = scores(output), scores(whole)
    assert {place: lines for place, lines in found.items() if "at_1" not in place} == {
        place: before[place] for place in found if "at_1" not in place
    }
    place = "scores/tiny/pretrained"
    merged = found[f"{place}/averaging_n2_s0_at_1_steps"]
    assert merged != before[f"{place}/averaging_n2_s0"]
    assert found[f"{place}/expert_ones_at_1"] != before[f"{place}/expert_ones"]

    # The report's ratios stand on the experts of the same steps.
    results = read_results(output)
    at = [each.name for each in results.study.datasets].index("many")
    for setting, model in (("fixed", "expert_ones"), ("at_1_steps", "expert_ones_at_1")):
        row = results.rows["tiny", "pretrained", model]
        assert relative(results, setting).reference[0, 0, at] == results.raw[row, at]


@pytest.mark.slow
def test_several_models_by_one_step(whole: pathlib.Path, tmp_path: pathlib.Path):
    output = tmp_path / "study"
    shutil.copytree(whole / "models", output / "models")
    run(output, options={"models_at_once": 3})
    found, wanted = scores(output), scores(whole)
    assert found.keys() == wanted.keys()
    for place in wanted:
        for one, other in zip(found[place], wanted[place], strict=True):
            a, b = json.loads(one), json.loads(other)
            assert a["value"] == pytest.approx(b["value"], abs=1e-5), (place, a["task"])


@pytest.mark.slow
def test_task_vectors_are_compared(whole: pathlib.Path):
    found = json.loads((whole / "vectors/tiny/pretrained.json").read_text())
    planned = study.plan(settings(whole), DATA)
    base = runs.params(planned.base_folder("tiny", "pretrained"))
    flat = []
    for category in found["experts"]:
        expert = runs.params(planned.expert_folder("tiny", "pretrained", category))
        flat.append(np.concatenate([(expert[k] - base[k]).ravel() for k in base]).astype(float))
    assert found["experts"] == ["ones", "twos"]
    np.testing.assert_allclose(found["norms"], [np.linalg.norm(v) for v in flat], rtol=1e-5)
    cosine = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    np.testing.assert_allclose(found["cosines"], [[1, cosine], [cosine, 1]], atol=1e-5)
    both = (flat[0] != 0) & (flat[1] != 0)
    conflict = np.mean(flat[0][both] * flat[1][both] < 0)
    np.testing.assert_allclose(found["sign_conflict"], [[0, conflict], [conflict, 0]], atol=1e-6)


def test_the_share_of_time_outside_of_work_is_told():
    spent = study.Seconds(steps=4.0, merge=1.0, forward=3.5, read=1.0)
    told = study.Report(made={"cells": 4}, seconds=10.0, spent=spent).describe()
    assert "rest 0.5" in told
    assert told.endswith("15.0% of the time outside training steps, merges and forward passes")


def test_a_phase_names_what_an_earlier_one_lacks(tmp_path: pathlib.Path):
    with pytest.raises(InputMissing, match="the phase experts needs .*\n.*tiny/pretrained/base"):
        run(tmp_path / "study", phases=["experts"])
    with pytest.raises(InputMissing, match="the phase cells needs"):
        run(tmp_path / "study", phases=["cells"])


@pytest.mark.slow
def test_another_study_in_the_same_folder_is_refused(whole: pathlib.Path):
    with pytest.raises(OutputError, match="another study, which differs in:\n  cells\n  seeds\n"):
        run(whole, options={"seeds": (0, 1, 2)})


def described(folder: pathlib.Path, limit: int = 5, **changes: Any) -> dict[str, Any]:
    data = dataclasses.replace(DATA, depends_on=lambda is_tuned: {"limit": limit})
    return study._description(study.plan(settings(folder, **changes), data))


def test_what_results_depend_on_stays_as_it_was_begun(tmp_path: pathlib.Path):
    first, other = epath.Path(tmp_path) / "first", epath.Path(tmp_path) / "other"
    study_file.write(first, described(first))
    rate = {"learning_rate": optax.linear_schedule(1e-2, 0.0, 3)}
    small = {"by_size": {"tiny": {"train_steps": 4}, "huge": {"train_steps": 9}}}
    for changes, names in (
        ({"limit": 6}, ["data.limit was 5, is 6"]),
        (
            {"expert": training("{category}_tiny", batch_size=2, **rate)},
            [
                "expert.batch_size was 8, is 2",
                'expert.learning_rate was "0.01", is "0.01 0.006667 0.003333"',
            ],
        ),
        (
            {"multitask": training("ones", optimizer=optax.lion, clip_norm=None)},
            [
                'multitask.mixture was "both", is "ones"',
                'multitask.optimizer was "',
                "multitask.clip_norm was 1.0, is null",
            ],
        ),
        (
            {"expert": training("{category}_tiny", **small)},
            ['expert.by_size.tiny was null, is {"train_steps": 4'],
        ),
        (
            {"normalization": "tokens", "seed": 1},
            ["seed was 0, is 1", 'normalization was "sum", is "tokens"'],
        ),
    ):
        with pytest.raises(OutputError) as refused:
            study_file.write(first, described(first, **changes))
        found = str(refused.value).split("\n  ")[1:]
        assert len(found) == len(names)
        for line, wanted in zip(found, names, strict=True):
            assert line.startswith(wanted)

    # On another device functions give other last digits.
    elsewhere = described(first)
    elsewhere["depends_on"]["expert"]["learning_rate"] = "0.01000001"
    study_file.write(first, elsewhere)

    # Elsewhere, cut otherwise and saved more often it is the same study.
    more = {"checkpoint_every": 1, "optimizer": lambda rate: adamw(rate)}
    study_file.write(
        first,
        described(
            other,
            batch_tokens=99,
            row_length=96,
            models_at_once=2,
            experts_in_memory=False,
            mesh=None,
            expert=training("{category}_tiny", **more),
        ),
    )


def test_a_study_that_does_not_say_what_it_depends_on_is_refused(tmp_path: pathlib.Path):
    wanted = described(tmp_path)
    old = {name: value for name, value in wanted.items() if name != "depends_on"}
    (tmp_path / "study.json").write_text(json.dumps(old))
    with pytest.raises(OutputError, match="is of an earlier version and does not say .* LIMIT"):
        study_file.write(epath.Path(tmp_path), wanted)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_experts": (1, 3)}, "NUM_EXPERTS has 3: there are 2 held-in categories"),
        ({"sizes": {"tiny": None}}, "SIZES gives no model for tiny"),
        ({"bases": {"mine": training("text")}}, "BASES has 'mine': a base is one of pretrained"),
        ({"expert": training("ones")}, "the experts' mixture is 'ones': it must have"),
        ({"methods": {}}, "METHODS is empty"),
        ({"expert_steps": (2, 3)}, "EXPERT_STEPS has 3: the experts of tiny are trained for 3"),
        (
            {"methods": {"a": Averaging(weights=(1.0, 2.0, 3.0))}},
            "Averaging.weights has 3 numbers for 1 experts",
        ),
    ],
)
def test_what_makes_no_study_is_refused(tmp_path: pathlib.Path, options: dict, match: str):
    with pytest.raises(ValueError, match=match):
        study.plan(settings(tmp_path / "study", **options), DATA)
    assert not (tmp_path / "study").exists()
