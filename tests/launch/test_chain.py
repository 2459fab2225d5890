"""The commands behind one another, as README has them: a base, two experts by one step, their merge, scores of both."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from launch import devices
from merging import manifest

REPOSITORY = pathlib.Path(__file__).parents[2]
TINY = (
    "--gin.TRAIN_STEPS=2",
    "--gin.BATCH_SIZE=2",
    "--gin.LOG_EVERY=1",
    "--gin.VALIDATION_BATCHES=1",
    "--gin.VALIDATION_ROWS=2",
    "--gin.MODEL=@named()",
    "--gin.named.name='mini_xs'",
    "--gin.named.num_layers=1",
)


def run(command: str, cache: pathlib.Path, *flags: str) -> str:
    """What a command prints; programs and packed mixtures that it shares with others lie in `cache`."""
    line = [sys.executable, "-m", f"launch.{command}", f"--compilation_cache_dir={cache}", *flags]
    environment = os.environ | devices.cpu_environment(os.environ, devices=1)
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_base_experts_merge_scores(tmp_path: pathlib.Path):
    cache = tmp_path / "cache"
    packed = f"--gin.CACHE_DIR='{cache}'"
    base, experts = tmp_path / "base", tmp_path / "experts"
    told = run(
        "finetune",
        cache,
        "--gin_file=gin_configs/runs/pretrain.gin",
        *TINY,
        packed,
        f"--gin.OUTPUT_DIR='{base}'",
        f"--gin.TENSORBOARD_DIR='{tmp_path / 'events'}'",
        f"--gin.PROFILE_DIR='{tmp_path / 'trace'}'",
        "--gin.PROFILE_STEPS=(1, 2)",
    )
    assert "plain_text_mini 2/2: loss " in told and "goodput " in told
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
    assert scalars(tmp_path / "events/plain_text_mini")["loss"] == pytest.approx(losses(base))

    names = ["sentiment_mini", "topic_classification_mini"]
    told = run(
        "finetune",
        cache,
        "--gin_file=gin_configs/runs/expert.gin",
        *TINY[:5],
        packed,
        f"--gin.INITIAL_CHECKPOINT_PATH='{base}'",
        f"--gin.MIXTURES={names}",
        "--gin.EXPERTS_AT_ONCE=2",
        f"--gin.VALIDATION_TASKS={names[:1]}",
        "--gin.VALIDATION_LIMIT=2",
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 48, 'targets': 16}",
        f"--gin.OUTPUT_DIR='{experts}'",
    )
    for name in names:
        assert f"{name} 2/2: loss " in told
        how = manifest.read(experts / name)
        assert 0 <= how["metrics"][name]["validation/score"] <= 1
        assert how["inputs"]["base"]["path"] == str(base)

    merged, scores = tmp_path / "merged", tmp_path / "scores"
    run(
        "merge",
        cache,
        f"--base={base}",
        f"--experts={','.join(str(experts / name) for name in names)}",
        "--method=averaging",
        f"--output={merged}",
    )
    told = run(
        "evaluate",
        cache,
        f"--checkpoint={merged},{base}",
        "--tasks=sentiment_mini",
        f"--output={scores}",
        "--gin.LIMIT=2",
        "--gin.NUM_PROMPTS=1",
        "--gin.SHAPES=1",
    )
    found = [json.loads(line) for line in (scores / "scores.jsonl").read_text().splitlines()]
    assert {score["model"] for score in found} == {"merged", "base"}
    for score in found:
        assert score["count"] == 2 and 0 <= score["value"] <= 1
        assert f"{score['value']:.4f}" in told


def losses(folder: pathlib.Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def scalars(folder: pathlib.Path) -> dict[str, list[float]]:
    """What TensorBoard reads, by name."""
    from tensorboard.backend.event_processing import event_accumulator
    from tensorboard.util import tensor_util

    found = event_accumulator.EventAccumulator(str(folder))
    found.Reload()
    return {
        name: [float(tensor_util.make_ndarray(event.tensor_proto)) for event in found.Tensors(name)]
        for name in found.Tags()["tensors"]
    }
