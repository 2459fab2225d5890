r"""How much of the bare step's speed the finetune stage keeps, with its input, metrics and checkpoints.

  python -m tests.benchmarks.finetune --model=mini_l
  python -m tests.benchmarks.finetune --checkpoint=/data/SmolLM2-135M-Instruct --mixture=rotten_tomatoes_local --local_data=/data/tasks \
    --rows=4 --inputs=48 --targets=16 --steps=4

The stage and its own compiled step on one batch that lies on the device take turns; both are compiled before. A turn is of so many
steps, the first of which is not counted; the stage logs each fifth and saves its state once a turn. Medians are printed as a
Markdown table; what is going on goes to stderr.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np

from launch.mixtures import Mixtures, mixtures
from merging import finetune, partitioning
from merging.models.config import named
from merging.training.feed import Placement
from merging.training.initial import initial_params
from merging.training.trainer import recipe, trainer


def main() -> None:
    """Measures and prints."""
    asked = parse()
    with tempfile.TemporaryDirectory() as work:
        rates = measure(asked, pathlib.Path(work))
    of = asked.checkpoint.name if asked.checkpoint else asked.model
    stage, bare = (statistics.median(rates[who]) for who in ("stage", "bare"))
    pairs = [a / b for a, b in zip(rates["stage"], rates["bare"], strict=True)]
    print("| model | rows x length | stage tokens/s | bare step tokens/s | stage / bare | pairs |")
    print("|---|---|---:|---:|---:|---|")
    print(
        f"| {of} | {asked.rows} x {asked.inputs + asked.targets} | {stage:,.0f} | {bare:,.0f} | {statistics.median(pairs):.3f} |"
        f" {min(pairs):.3f} to {max(pairs):.3f} |"
    )


def measure(asked: argparse.Namespace, work: pathlib.Path) -> dict[str, list[float]]:
    """Tokens/s of each turn, by who took it."""
    vocabulary = str(asked.checkpoint / "tokenizer.json") if asked.checkpoint else None
    registered = {
        "vocabulary": vocabulary,
        "local_data": asked.local_data,
        "prompts": "own",
        "instruction_tasks": (),
        "rate_cap": 500_000,
    }
    (mixture,) = mixtures(
        Mixtures(
            name=asked.mixture,
            names=None,
            lengths={"inputs": asked.inputs, "targets": asked.targets},
            cache_dir=str(work / "packed"),
            validation_split=None,
        ),
        registered,
        train_rows=asked.steps * asked.rows,
    )
    rates: dict[str, list[float]] = {"stage": [], "bare": []}
    for turn in range(asked.turns + 1):
        planned = finetune.plan(settings(asked, work / f"out_{turn}"), [mixture])
        for who, run in (("stage", stage), ("bare", bare)):
            rate = run(planned)
            print(f"turn {turn}: {who} {rate:,.0f} tokens/s", file=sys.stderr, flush=True)
            if turn:
                rates[who].append(rate)
    return rates


def settings(asked: argparse.Namespace, output: pathlib.Path) -> finetune.Settings:
    """Of one turn of the stage."""
    return finetune.Settings(
        output_dir=output,
        train_steps=asked.steps,
        batch_size=asked.rows,
        model=None if asked.checkpoint else named(asked.model),
        initial_checkpoint_path=asked.checkpoint,
        param_dtype="float32",
        dtype="float32",
        log_every=5,
        checkpoint_every=max(1, asked.steps // 2),
        keep_checkpoints=1,
        mesh=partitioning.MeshShape().mesh(jax.devices()[:1]),
    )


def stage(planned: finetune.Plan) -> float:
    """Of the stage; all of the time that goes by while it trains counts, but for the first step."""
    spent = finetune.run(planned).spent
    return _tokens(planned) / (spent.steps + spent.input + spent.checkpoints)


def bare(planned: finetune.Plan) -> float:
    """Of its step alone."""
    s, mesh = planned.settings, planned.mesh
    program = trainer(recipe(s, planned.config, mesh, experts=None))
    (mixture,) = planned.mixtures.values()
    place = Placement(mesh, rows=s.batch_size, length=mixture.length)
    arrays, _ = next(mixture.train(s.batch_size, place.host, place.hosts).read(None))
    batch, seed = place([arrays]), np.int32(s.seed)
    state = program.start(initial_params(s.initial_checkpoint_path, planned.config, mesh, seed=0))
    metrics: Any = None
    with partitioning.use(mesh):
        for number in range(s.train_steps):
            state, metrics = program.step(state, batch, seed)
            if number == 0:
                jax.block_until_ready(metrics)
                started = time.perf_counter()
        jax.block_until_ready((state, metrics))
    return _tokens(planned) / (time.perf_counter() - started)


def _tokens(planned: finetune.Plan) -> int:
    (mixture,) = planned.mixtures.values()
    return (planned.settings.train_steps - 1) * planned.settings.batch_size * mixture.length


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mini_l", help="a named size, from random parameters")
    parser.add_argument("--checkpoint", type=pathlib.Path, help="in place of it")
    parser.add_argument("--mixture", default="plain_text_mini")
    parser.add_argument("--local_data")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--inputs", type=int, default=0)
    parser.add_argument("--targets", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--turns", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
