"""The finetune stage on a tiny model: it learns, goes on exactly, is the same on any mesh, and says what is wrong."""

from __future__ import annotations

import dataclasses
import errno
import json
import pathlib
import shutil
import sys
from typing import Any

import jax
import numpy as np
import optax
import pytest
from orbax.checkpoint._src.serialization import serialization

from launch.pod.local import run_local
from merging import finetune, manifest
from merging.checkpoints.format import CheckpointError
from merging.evaluation.examples import Example, Task
from merging.interrupted import Interrupted
from merging.models import model_file
from merging.models.families import model_of
from merging.models.parameters import read_params
from merging.partitioning import MeshShape
from merging.training import planning
from merging.training.loop import TrainingError
from merging.training.optimizer import WeightAveraging, adamw
from merging.training.validation import Validation
from tests.merging.training import runs

pytestmark = pytest.mark.usefixtures("optax_promotes")

MESHES = {
    "data": MeshShape(data=8),
    "fsdp_model": MeshShape(fsdp=4, model=2),
    "all": MeshShape(data=2, fsdp=2, model=2),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The output of an unbroken run."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    runs.run(folder, checkpoint_every=4, validate_every=6)
    return folder


def test_a_relative_output(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    runs.run(pathlib.Path("some/out"), train_steps=2, checkpoint_every=1)
    assert (tmp_path / "some/out/manifest.json").exists()


def same_bits(one: pathlib.Path, two: pathlib.Path) -> None:
    first, second = runs.params(one), runs.params(two)
    assert first.keys() == second.keys()
    for name in first:
        assert np.array_equal(first[name], second[name]), name


def test_a_run_learns_and_says_how(whole: pathlib.Path):
    losses = runs.losses(whole)
    assert len(losses) == 12 and losses[-1] < 0.9 * losses[0]
    lines = runs.curve(whole)
    assert {"loss", "accuracy", "learning_rate", "gradient_norm", "update_norm"} <= lines[0].keys()
    assert [line["step"] for line in lines if "validation/loss" in line] == [6, 12]
    how = manifest.read(whole)
    assert how["stage"] == "finetune" and how["identity"]["train_steps"] == 12
    assert how["metrics"]["ones"]["loss"] == pytest.approx(losses[-1])
    assert sorted(path.name for path in whole.iterdir()) == [
        "manifest.json",
        "metrics.jsonl",
        "model.json",
        "params",
    ]


def test_the_output_is_read_by_its_folder_alone(whole: pathlib.Path):
    described = model_file.read(whole)
    assert described.config == dataclasses.replace(runs.CONFIG, dropout_rate=0.0)
    found = read_params(whole, described.config, MeshShape(fsdp=8).mesh())
    kernel = np.asarray(found["layers"]["mlp"]["wi_0"]["kernel"])
    assert np.array_equal(kernel, runs.params(whole)["layers/mlp/wi_0/kernel"])


def test_a_second_time_returns_at_once(whole: pathlib.Path):
    before = (whole / "manifest.json").read_bytes()
    assert runs.run(whole, checkpoint_every=4, validate_every=6).was_done
    assert (whole / "manifest.json").read_bytes() == before
    with pytest.raises(manifest.OutputError, match="optimizer"):
        runs.run(whole, checkpoint_every=4, validate_every=6, learning_rate=2e-2)


@pytest.mark.parametrize("stop", [4, 7])
def test_stopped_and_gone_on_gives_the_same_bits(
    stop: int, whole: pathlib.Path, tmp_path: pathlib.Path
):
    told: list[str] = []
    settings = {"checkpoint_every": 4, "validate_every": 6}
    with pytest.raises(Interrupted, match=f"step {stop}"):
        runs.run(tmp_path / "out", should_stop=lambda step: step == stop, **settings)
    assert not (tmp_path / "out").exists()
    runs.run(tmp_path / "out", log=told.append, **settings)
    assert told == [f"going on from step {stop} of 12"]
    assert runs.curve(tmp_path / "out") == runs.curve(whole)
    same_bits(tmp_path / "out", whole)


@pytest.mark.slow
def test_a_run_goes_on_upon_another_mesh(whole: pathlib.Path, tmp_path: pathlib.Path):
    settings: dict[str, Any] = {"checkpoint_every": 4, "validate_every": 6}
    with pytest.raises(Interrupted):
        runs.run(tmp_path / "out", should_stop=lambda step: step == 5, **settings)
    runs.run(tmp_path / "out", mesh=MESHES["fsdp_model"], **settings)
    np.testing.assert_allclose(runs.losses(tmp_path / "out"), runs.losses(whole), rtol=1e-5)
    manifest_says = manifest.read(tmp_path / "out")
    assert manifest_says["mesh"] == "data=1, fsdp=4, model=2"


@pytest.mark.slow
def test_one_curve_on_any_mesh_and_on_two_processes(tmp_path: pathlib.Path):
    asked = {"train_steps": 20, "learning_rate": 2e-3}
    runs.run(tmp_path / "one", **asked)
    wanted = runs.losses(tmp_path / "one")
    assert len(wanted) == 20 and wanted[-1] < wanted[0]
    for name, mesh in MESHES.items():
        runs.run(tmp_path / name, mesh=mesh, **asked)
        np.testing.assert_allclose(runs.losses(tmp_path / name), wanted, rtol=1e-5)
    command = [sys.executable, "-m", "tests.merging.training.job", str(tmp_path / "pod")]
    mesh = json.dumps({"data": 2, "fsdp": 2, "model": 2})
    told = run_local(
        [*command, json.dumps(asked), mesh],
        processes=2,
        devices=4,
        timeout_s=600,
        echo=lambda _: None,
    )
    assert all("whole" in output for output in told)
    np.testing.assert_allclose(runs.losses(tmp_path / "pod"), wanted, rtol=1e-5)


@pytest.mark.slow
def test_four_microbatches_of_eight_are_a_batch_of_thirty_two(tmp_path: pathlib.Path):
    """Without dropout, whose masks are each microbatch's own."""
    config = dataclasses.replace(runs.CONFIG, dropout_rate=0.0)
    asked = {"train_steps": 20, "learning_rate": 2e-3, "batch_size": 32, "model": config}
    runs.run(tmp_path / "whole", **asked)
    runs.run(tmp_path / "parts", microbatches=4, **asked)
    np.testing.assert_allclose(
        runs.losses(tmp_path / "parts"), runs.losses(tmp_path / "whole"), rtol=1e-5
    )


# What tensorstore still has under way when a damaged chunk ends a restore finds asyncio's loop closed.
damages = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@damages
@pytest.mark.slow
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(
    whole: pathlib.Path, tmp_path: pathlib.Path
):
    settings: dict[str, Any] = {"checkpoint_every": 4, "validate_every": 6}
    with pytest.raises(Interrupted):
        runs.run(tmp_path / "out", should_stop=lambda step: step == 9, **settings)
    steps = tmp_path / "out.partial/checkpoints/0"
    assert sorted(path.name for path in steps.iterdir()) == ["8", "9"]
    for data in (steps / "9/state").rglob("d/*"):
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 0x10
        data.write_bytes(content)
    told: list[str] = []
    runs.run(tmp_path / "out", log=told.append, **settings)
    assert told[0].startswith("the checkpoint of step 9 can't be used")
    assert told[1] == "going on from step 8 of 12"
    same_bits(tmp_path / "out", whole)


@damages
@pytest.mark.slow
def test_nothing_but_damaged_checkpoints_is_an_error(tmp_path: pathlib.Path):
    with pytest.raises(Interrupted):
        runs.run(tmp_path / "out", should_stop=lambda step: step == 1)
    shutil.rmtree(tmp_path / "out.partial/checkpoints/0/1/state/d")
    with pytest.raises(CheckpointError, match="no checkpoint can be used"):
        runs.run(tmp_path / "out")


@pytest.mark.slow
def test_an_unfinished_run_with_other_settings_is_refused(tmp_path: pathlib.Path):
    with pytest.raises(Interrupted):
        runs.run(tmp_path / "out", should_stop=lambda step: step == 1)
    with pytest.raises(manifest.OutputError, match=r"seed was 0, is 1.*to begin anew"):
        runs.run(tmp_path / "out", seed=1)


# ---- several experts ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_experts_at_once_are_those_of_runs_of_their_own(tmp_path: pathlib.Path):
    mixtures = [runs.mixture(name, seed) for seed, name in enumerate(("a", "b"))]
    runs.run(tmp_path / "apart", mixtures)
    runs.run(tmp_path / "once", mixtures, experts_at_once=2)
    mesh = MeshShape(experts=2, fsdp=2, model=2)
    runs.run(tmp_path / "cut", mixtures, experts_at_once=2, mesh=mesh)
    runs.run(tmp_path / "alone", [mixtures[1]])
    same_bits(tmp_path / "alone", tmp_path / "apart/b")
    for name in ("a", "b"):
        for other in ("once", "cut"):
            np.testing.assert_allclose(
                runs.losses(tmp_path / other / name),
                runs.losses(tmp_path / "apart" / name),
                rtol=1e-5,
            )
        assert manifest.read(tmp_path / "once" / name)["stage"] == "finetune"
    assert manifest.read(tmp_path / "once")["experts"] == ["a", "b"]
    first, second = (runs.losses(tmp_path / "apart" / name) for name in "ab")
    assert not np.allclose(first, second)


@pytest.mark.slow
def test_experts_that_were_done_are_not_trained_again(tmp_path: pathlib.Path):
    mixtures = [runs.mixture(name, seed) for seed, name in enumerate(("a", "b"))]
    steps = []

    def stop_in_the_second(step: int) -> bool:
        steps.append(step)
        return len(steps) == 12 + 3

    with pytest.raises(Interrupted):
        runs.run(tmp_path / "out", mixtures, should_stop=stop_in_the_second)
    report = runs.run(tmp_path / "out", mixtures)
    assert report.steps == 12 - 3 and set(report.metrics) == {"a", "b"}
    assert report.metrics["a"]["loss"] == runs.losses(tmp_path / "out/a")[-1]


# ---- starts ------------------------------------------------------------------------------------------------------


def test_an_expert_starts_from_its_base(whole: pathlib.Path, tmp_path: pathlib.Path):
    runs.run(
        tmp_path / "out",
        model=None,
        initial_checkpoint_path=whole,
        learning_rate=0.0,
        train_steps=1,
    )
    same_bits(tmp_path / "out", whole)
    how = manifest.read(tmp_path / "out")
    assert how["inputs"]["base"]["path"] == str(whole)


def test_a_checkpoint_of_another_model_is_refused(whole: pathlib.Path, tmp_path: pathlib.Path):
    other = dataclasses.replace(runs.CONFIG, mlp_dim=64)
    with pytest.raises(CheckpointError, match=r"mlp/wo/kernel.*wanted \[2, 64, 16\]"):
        runs.run(tmp_path / "out", model=other, initial_checkpoint_path=whole)


# ---- options -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_frozen_parameters_stay_and_have_no_state(whole: pathlib.Path, tmp_path: pathlib.Path):
    runs.run(
        tmp_path / "out",
        model=None,
        initial_checkpoint_path=whole,
        frozen=("token_embedder/*", "*/attention/*"),
        train_steps=2,
    )
    base, found = runs.params(whole), runs.params(tmp_path / "out")
    moved = {name for name in base if not np.array_equal(base[name], found[name])}
    assert moved == {
        "final_norm/scale",
        "layers/norm/scale",
        *(f"layers/mlp/{kernel}/kernel" for kernel in ("wi_0", "wi_1", "wo")),
    }
    with pytest.raises(ValueError, match="no parameter is like 'tokens'"):
        runs.run(tmp_path / "wrong", frozen=("tokens",))


@pytest.mark.slow
def test_averages_are_those_of_the_steps(tmp_path: pathlib.Path):
    each = []
    for steps in (1, 2, 3):
        runs.run(tmp_path / str(steps), train_steps=steps)
        each.append(runs.params(tmp_path / str(steps)))
    runs.run(tmp_path / "mean", train_steps=3, averaging=WeightAveraging(start=1))
    runs.run(tmp_path / "ema", train_steps=3, averaging=WeightAveraging(decay=0.75))
    for name, found in runs.params(tmp_path / "mean").items():
        np.testing.assert_allclose(found, (each[1][name] + each[2][name]) / 2, atol=1e-6)
    for name, found in runs.params(tmp_path / "ema").items():
        one, two, three = (x[name] for x in each)
        wanted = 0.75 * (0.75 * one + 0.25 * two) + 0.25 * three
        np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.slow
def test_the_best_on_validation_is_taken_and_a_run_without_hope_ends(tmp_path: pathlib.Path):
    found = iter([3.0, 1.0, 2.0, 2.5, 9.0])
    schedule = optax.constant_schedule(1e-2)
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        original = finetune._Run._validation

        def validation(self: Any, *arguments: Any) -> Any:
            judge = original(self, *arguments)
            return lambda state: {**judge(state), "validation/loss": np.float32(next(found))}

        patch.setattr(finetune._Run, "_validation", validation)
        runs.run(
            tmp_path / "out",
            validate_every=2,
            choose="best",
            patience=2,
            learning_rate=schedule,
            log=told.append,
        )
    assert told == ["taking step 4, the best on validation"]
    assert manifest.read(tmp_path / "out")["metrics"]["ones"]["steps"] == 8
    runs.run(tmp_path / "four", train_steps=4)
    same_bits(tmp_path / "out", tmp_path / "four")


def example(number: int) -> Example:
    """A prompt and two choices of one token each."""
    tokens = np.random.default_rng(number).permutation(np.arange(2, runs.V)).astype(np.int32)
    choices = (tokens[:1], tokens[1:2])
    prompt = np.concatenate([[0], tokens[2:6]]).astype(np.int32)
    return Example(
        id=str(number), prompt=prompt, choices=choices, truth=number % 2, choices_text=("a", "b")
    )


def right(truths: Any, predictions: Any) -> dict[str, float]:
    return {"accuracy": float(np.mean(np.equal(truths, predictions))), "accuracy_stderr": 0.0}


TASKS = [
    Task(name="words", prompt=prompt, kind="rank", metric=right, examples=[*map(example, numbers)])
    for prompt, numbers in (("first", range(7)), ("second", range(7, 12)))
]
BY_TASKS = Validation(
    tasks=TASKS, main={"words": "accuracy"}, vocabulary_digest="", identity={"tasks": ["words"]}
)


def test_a_run_is_validated_by_tasks(tmp_path: pathlib.Path):
    """Against the likelier of both choices by the whole forward pass of one prompt at a time."""
    runs.run(tmp_path / "out", train_steps=2, validation=BY_TASKS)
    config = model_file.read(tmp_path / "out").config
    model, mesh = model_of(config), MeshShape().mesh(jax.devices()[:1])
    params = {"params": read_params(tmp_path / "out", config, mesh)}

    @jax.jit
    def logits(prompt: Any) -> Any:
        sees_all = jax.numpy.ones((1, len(prompt)), bool)
        return model.apply(params, prompt[None], prefix_mask=sees_all)[0, -1]

    shares = []
    for task in TASKS:
        scores = [(np.asarray(logits(each.prompt)), each) for each in task.examples]
        picked = [int(found[e.choices[1][0]] > found[e.choices[0][0]]) for found, e in scores]
        shares.append(np.mean([p == e.truth for p, (_, e) in zip(picked, scores, strict=True)]))
    (line,) = (line for line in runs.curve(tmp_path / "out") if "validation/loss" in line)
    assert line["validation/words/accuracy"] == pytest.approx(np.mean(shares))
    assert line["validation/score"] == pytest.approx(np.mean(shares))
    assert manifest.read(tmp_path / "out")["identity"]["validation"] == {"tasks": ["words"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metric", "found"),
    [("score", [0.3, 0.9, 0.5, 0.4, 1.0]), ("words/nats_per_token", [3.0, 1.0, 2.0, 2.5, 0.1])],
)
def test_a_metric_of_tasks_chooses(metric: str, found: list[float], tmp_path: pathlib.Path):
    class Told(Validation):
        metrics = (metric,)

        def evaluator(self, *arguments: Any, **more: Any) -> Any:
            values = iter(found)
            return lambda params, name: {metric: next(values)}

    told: list[str] = []
    runs.run(
        tmp_path / "out",
        validate_every=2,
        choose="best",
        best_metric=metric,
        patience=2,
        log=told.append,
        validation=Told(tasks=TASKS, main={}, vocabulary_digest=""),
    )
    assert told == ["taking step 4, the best on validation"]
    assert manifest.read(tmp_path / "out")["metrics"]["ones"]["steps"] == 8


# ---- what is wrong -----------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: pathlib.Path):
    def spoilt(count: Any) -> Any:
        return jax.numpy.where(count == 6, jax.numpy.inf, 1e-2)

    with pytest.raises(TrainingError) as told:
        runs.run(tmp_path / "out", learning_rate=spoilt, checkpoint_every=2)
    message = str(told.value)
    assert (
        "step 8: the loss is nan; the first leaf whose gradient is not finite is final_norm/scale"
        in message
    )
    assert "checkpoint, of step 6, is kept" in message
    assert (tmp_path / "out.partial/checkpoints/0/6").is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": MeshShape(data=8), "batch_size": 12}, r"axis 0 \(batch, 12\) by data x fsdp = 8"),
        ({"mesh": MeshShape(model=8)}, r"mlp/wi_0/kernel.*|heads"),
        ({"microbatches": 3}, "MICROBATCHES=3 don't divide BATCH_SIZE=8"),
        ({"choose": "best"}, "need VALIDATE_EVERY"),
        (
            {"patience": 2, "validate_every": 1, "best_metric": "f1"},
            "BEST_METRIC is 'f1', wanted one of loss, accuracy, score, words/accuracy$",
        ),
        ({"best_metric": "score"}, "decide nothing without CHOOSE"),
        ({"best_is": "least"}, "BEST_IS is 'least', wanted 'lowest' or 'highest'"),
        ({"train_steps": 0}, "TRAIN_STEPS is 0"),
        ({"model": None}, "give MODEL"),
        ({"format": "safetensors"}, "Hugging Face has no PaLM"),
        ({"experts_at_once": 2}, "EXPERTS_AT_ONCE=2, and there are 1 mixtures"),
        ({"model": dataclasses.replace(runs.CONFIG, vocab_size=32)}, "64 tokens and the model 32"),
    ],
)
def test_what_can_be_known_before_is_refused(
    changes: dict[str, Any], message: str, tmp_path: pathlib.Path
):
    with pytest.raises(ValueError, match=message):
        settings = runs.settings(tmp_path / "out", **changes)
        finetune.plan(settings, [runs.mixture()], validation=BY_TASKS)
    assert not any(tmp_path.iterdir())


def test_a_validation_without_anything_to_validate_on_is_refused(tmp_path: pathlib.Path):
    mixture = dataclasses.replace(runs.mixture(), validation=None)
    with pytest.raises(ValueError, match="nothing to validate on"):
        finetune.plan(runs.settings(tmp_path / "out", validate_every=2), [mixture])


def test_tasks_in_another_vocabulary_are_refused(tmp_path: pathlib.Path):
    known = model_file.Vocabulary(name="bytes", digest="b" * 64)
    mixture = dataclasses.replace(runs.mixture(), vocabulary=known)
    with pytest.raises(ValueError, match="VALIDATION_TASKS are in another vocabulary"):
        finetune.plan(runs.settings(tmp_path / "out"), [mixture], validation=BY_TASKS)


def test_a_full_disk_is_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(manifest.OutputError, match="1,000 free"):
        finetune.plan(runs.settings(tmp_path / "out"), [runs.mixture()])


@pytest.mark.slow
def test_a_disk_that_fills_up_while_a_state_is_saved(
    whole: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    """Saved behind the run's back: told when the next one is due, and what is on disk is gone on from."""
    settings: dict[str, Any] = {"checkpoint_every": 4, "validate_every": 6}
    at = []
    write = serialization.async_serialize_from_host

    async def full(*arguments: Any, **more: Any) -> None:
        if at and at[-1] >= 7:  # as tensorstore tells of a full tmpfs
            raise ValueError(
                "RESOURCE_EXHAUSTED: Failed to write 889305 bytes to file 4: No space left on device"
            )
        await write(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(serialization, "async_serialize_from_host", full)
        with pytest.raises(OSError, match="the one of step 4 is kept.*No space left") as told:
            runs.run(
                tmp_path / "out",
                write_metrics=lambda name, step, values: at.append(step),
                **settings,
            )
    assert told.value.errno == errno.ENOSPC
    assert told.value.filename == str(tmp_path / "out.partial/checkpoints/0")
    assert at[-1] > 8 and not (tmp_path / "out").exists()
    said: list[str] = []
    runs.run(tmp_path / "out", log=said.append, **settings)
    assert said == ["going on from step 4 of 12"]
    same_bits(tmp_path / "out", whole)


def test_optimizers_are_known_by_what_they_do():
    def digest(**changes: Any) -> str:
        return planning._behaviour(runs.settings(pathlib.Path("out"), **changes))

    assert digest() == digest(optimizer=lambda rate: adamw(rate))
    others = [
        digest(learning_rate=2e-2),
        digest(learning_rate=optax.linear_schedule(1e-2, 0.0, 12)),
        digest(optimizer=lambda rate: adamw(rate, weight_decay=0.1)),
        digest(optimizer=lambda rate: adamw(rate, b2=0.95)),
        digest(optimizer=optax.lion),
    ]
    assert len({digest(), *others}) == 6
