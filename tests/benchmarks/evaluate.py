"""How many examples a second are scored on this machine's CPU, beside lm-evaluation-harness' `hf` backend (extra `peers`).

    MERGING_REAL_DATA=/data/real python -m tests.benchmarks.evaluate --checkpoint=/data/SmolLM2-135M-Instruct
    python -m tests.benchmarks.evaluate --tasks=trec --limit=8 --runs=1 --no_peer

Both score the same tokens, in float32, in turn, in one process, after one turn that is not counted; the peer at the fastest of some
batch sizes in that turn. Medians are printed as a Markdown table; what is going on goes to stderr.

  saved     tokens of all prompts with each of their choices, over tokens where a prompt is counted once: what sharing it can give
  of saved  the speed beside the peer's, over that
  of bound  the seconds that the model's forward pass takes for the same tokens without padding, in rows of their mean length, over ours
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from launch.evaluation import Examples, evaluation_tasks
from merging.evaluation.evaluator import Evaluator, Options
from merging.evaluation.examples import Task
from merging.evaluation.score import Choices, score
from merging.models import huggingface
from merging.models.config import DecoderConfig
from merging.models.families import model_of
from merging.models.parameters import read_params
from merging.partitioning import MeshShape
from tasks import catalog

TASKS = ("openbookqa", "trec", "dream")
BATCH_SIZES = (4, 16)
# Of the machines that this is for: more tokens fall out of the last-level cache.
BATCH_TOKENS = 2_048


def main() -> None:
    arguments = parse()
    config = huggingface.read_config(arguments.checkpoint, param_dtype="float32", dtype="float32")
    mesh = MeshShape().mesh(jax.devices()[:1])
    params = read_params(arguments.checkpoint, config, mesh)
    peer = None if arguments.no_peer else harness(arguments.checkpoint)
    print("| task | examples | hf examples/s | here examples/s | here / hf | saved | of saved | of bound |")  # fmt: skip
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in arguments.tasks.split(","):
        task = examples_of(name, arguments)
        options = Options(batch_tokens=BATCH_TOKENS)
        evaluator = Evaluator(model_of(config), [task], mesh=mesh, options=options)
        programs = {
            "here": lambda evaluator=evaluator: evaluator(params, "model"),
            "bound": forward(config, params, task, evaluator.tokens()),
        }
        if peer is not None:
            programs |= {
                f"hf {size}": lambda task=task, size=size: peer(task, size) for size in BATCH_SIZES
            }
        seconds = alternate(programs, name, runs=arguments.runs)
        print(row(name, task, evaluator.tokens(), seconds), flush=True)


def row(name: str, task: Task, tokens: int, seconds: dict[str, float]) -> str:
    """A line of the table."""
    count, here = len(task.examples), seconds["here"]
    alone = sum(
        len(each.prompt) + len(choice) - 1 for each in task.examples for choice in each.choices
    )
    saved = alone / tokens
    peers = [value for who, value in seconds.items() if who.startswith("hf")]
    theirs = ("-", "-", "-")
    if peers:
        speedup = min(peers) / here
        theirs = (f"{count / min(peers):.2f}", f"{speedup:.2f}", f"{speedup / saved:.2f}")
    return (
        f"| {name} | {count} | {theirs[0]} | {count / here:.2f} | {theirs[1]} | {saved:.2f} | {theirs[2]}"
        f" | {seconds['bound'] / here:.2f} |"
    )


def examples_of(name: str, arguments: argparse.Namespace) -> Task:
    """A dataset in its first words, as real rows."""
    dataset = catalog.datasets()[name]
    (task,), _ = evaluation_tasks(
        Examples(
            mixture_or_task_name=catalog.task_name(dataset, next(iter(dataset.prompts)), "local"),
            lengths={"inputs": 1024, "targets": 256},
            limit=arguments.limit,
        ),
        {
            "vocabulary": str(arguments.checkpoint / "tokenizer.json"),
            "local_data": str(arguments.real_data / "tasks"),
        },
    )
    return task


def forward(config: DecoderConfig, params: Any, task: Task, tokens: int) -> Callable[[], None]:
    """The model on as many tokens in full rows, reading out as many as are asked for."""
    reads = sum(len(choice) for each in task.examples for choice in each.choices)
    rows = len(task.examples)
    length = -(-tokens // rows)
    each = -(-reads // rows)
    size = min(rows, max(1, BATCH_TOKENS // length))
    rng = np.random.default_rng(0)
    batch = Choices(
        tokens=rng.integers(1, 1_000, (size, length), np.int32),
        segment_ids=np.ones((size, length), np.int32),
        positions=np.tile(np.arange(length, dtype=np.int32), (size, 1)),
        reads=rng.integers(0, length, (size, each), np.int32),
        targets=rng.integers(1, 1_000, (size, each), np.int32),
    )
    model = model_of(config)
    step = jax.jit(lambda params, batch: score(model, params, batch))
    batch = jax.device_put(batch)
    times, rest = divmod(rows, size)

    def run() -> float:
        started = time.perf_counter()
        jax.block_until_ready([step(params, batch) for _ in range(times)])
        taken = time.perf_counter() - started
        return taken * (1 + rest / size / times)

    return run


def harness(checkpoint: pathlib.Path) -> Callable[[Task, int], None]:
    """The harness's own backend on a task's requests, by batch size."""
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=1)

    def run(task: Task, size: int) -> None:
        model.batch_size_per_gpu = size
        requests = [
            ((each.id, str(number)), each.prompt.tolist(), choice.tolist())
            for each in task.examples
            for number, choice in enumerate(each.choices)
        ]
        model._loglikelihood_tokens(requests, disable_tqdm=True)

    return run


def alternate(
    programs: dict[str, Callable[[], float | None]], name: str, *, runs: int
) -> dict[str, float]:
    """Median seconds of each program, run in turns after one turn that is not counted."""
    seconds: dict[str, list[float]] = {}
    for turn in range(runs + 1):
        for who, run in programs.items():
            started = time.perf_counter()
            told = run()
            taken = told if isinstance(told, float) else time.perf_counter() - started
            print(f"turn {turn}: {name}, {who} {taken:.2f} s", file=sys.stderr)
            seconds.setdefault(who, []).append(taken)
        if not turn:  # of the peer's batch sizes the fastest goes on
            peers = sorted((who for who in programs if who.startswith("hf")), key=seconds.get)
            programs = {who: run for who, run in programs.items() if who not in peers[1:]}
            seconds = {}
    return {who: statistics.median(each) for who, each in seconds.items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    real = os.environ.get("MERGING_REAL_CHECKPOINTS", str(cache / "merging-at-scale" / "real"))
    data = os.environ.get("MERGING_REAL_DATA", "../shared/real")
    parser.add_argument("--checkpoint", type=pathlib.Path, default=pathlib.Path(real) / "smollm2")
    parser.add_argument("--real_data", type=pathlib.Path, default=pathlib.Path(data))
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--limit", type=int, default=32, help="examples of each task")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no_peer", action="store_true", help="without the harness")
    return parser.parse_args()


if __name__ == "__main__":
    main()
