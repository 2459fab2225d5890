"""The benchmarks run: at a small size, where their numbers say nothing and are not looked at."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parents[2]


def run(folder: pathlib.Path, *flags: str) -> str:
    """What the benchmark of merges prints for models of some 200,000 parameters."""
    small = ("--parameters=2e5", "--runs=1", "--no_mergekit", f"--work_dir={folder}")
    command = [sys.executable, "-m", "tests.benchmarks.merge", *small, *flags]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (folder / "output").exists()
    return done.stdout


def test_speed(tmp_path: pathlib.Path):
    printed = run(tmp_path, "--methods=ties")
    assert "| method | mergekit s | here s |" in printed
    assert "\n| ties | - | " in printed


@pytest.mark.slow
def test_many_and_memory(tmp_path: pathlib.Path):
    flags = ("--methods=averaging", "--experts=2", "--repetitions=2", "--larger_experts=1")
    printed = run(tmp_path, "--many", "--memory", *flags)
    assert printed.count("| yes |") == 10  # the same bits at once and alone
    assert "\n| 1 M x 1 | averaging | " in printed


@pytest.mark.slow
def test_formats(tmp_path: pathlib.Path):
    printed = run(tmp_path, "--formats", "--methods=averaging", "--experts=1")
    assert "\n| averaging | orbax | " in printed and "\n| averaging | t5x | " in printed


@pytest.mark.slow
def test_finetune():
    flags = ("--model=mini_xs", "--rows=2", "--targets=16", "--steps=3", "--turns=1")
    command = [sys.executable, "-m", "tests.benchmarks.finetune", *flags]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\n| mini_xs | 2 x 16 | " in done.stdout


@pytest.mark.slow
def test_train(tmp_path: pathlib.Path):
    sizes = {
        "model_type": "llama",
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    flags = ("--rows=2", "--length=8", "--runs=1", "--dtypes=float32", "--no_peer")
    command = [sys.executable, "-m", "tests.benchmarks.train", f"--checkpoint={tmp_path}", *flags]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\n| float32 | forward | " in done.stdout
    assert "step / forward: float32 here " in done.stdout


@pytest.mark.real
@pytest.mark.slow
def test_evaluate(real_checkpoints: pathlib.Path, real_data: pathlib.Path):
    folder = real_checkpoints / "smollm2"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    flags = (f"--checkpoint={folder}", f"--real_data={real_data}", "--limit=2", "--runs=1")
    command = [sys.executable, "-m", "tests.benchmarks.evaluate", "--tasks=copa", "--no_peer"]
    done = subprocess.run([*command, *flags], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\n| copa | 2 | - | " in done.stdout
