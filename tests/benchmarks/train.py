"""How fast a train step and a forward pass are on this machine's CPU; beside PyTorch (extra `peers`).

    python -m tests.benchmarks.train --checkpoint=/data/SmolLM2-135M-Instruct
    python -m tests.benchmarks.train --rows=2 --length=16 --runs=1 --layers=2 --no_peer

A llama in the checkpoint's sizes with random weights, on random tokens, the same for both. A forward pass ends with the
mean cross entropy, a step is that, its gradients and AdamW's update. Both are compiled or warm before they are
timed, the two programs take turns, each a process of its own that waits in between, and medians are printed as a Markdown
table; what is going on goes to stderr. In bfloat16 parameters,
activations and gradients are bfloat16 in both. The ratio step / forward is 3 where gradients cost twice their forward pass and
the optimizer nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from merging.models.gated import Llama
from merging.models.huggingface import read_config
from merging.training.batch import Batch, batch_scores
from merging.training.loss import loss_sums
from merging.training.optimizer import adamw
from merging.training.step import init_state, train_step

LEARNING_RATE = 1e-5
PASSES = ("forward", "step")

Passes = Mapping[str, Callable[[], None]]


def main() -> None:
    arguments = parse()
    if arguments.serve:
        serve(PROGRAMS[arguments.serve], arguments)
        return
    count = arguments.rows * arguments.length
    names = ["here"] if arguments.no_peer else ["here", "PyTorch"]
    print("| dtype | pass | here tokens/s | PyTorch tokens/s | here / PyTorch |")
    print("|---|---|---:|---:|---:|")
    ratios = []
    for dtype in arguments.dtypes.split(","):
        with contextlib.ExitStack() as stack:
            servers = {name: stack.enter_context(server(name, dtype)) for name in names}
            seconds = alternate(servers, runs=arguments.runs)
        for one in PASSES:
            here, peer = (seconds.get((who, one)) for who in ("here", "PyTorch"))
            told = ("-", "-") if peer is None else (f"{count / peer:.0f}", f"{peer / here:.2f}")
            print(f"| {dtype} | {one} | {count / here:.0f} | {told[0]} | {told[1]} |", flush=True)
        for who in names:
            ratios.append(f"{dtype} {who} {seconds[who, 'step'] / seconds[who, 'forward']:.2f}")
    print(f"\nstep / forward: {', '.join(ratios)}")


def alternate(
    servers: Mapping[str, subprocess.Popen[str]], *, runs: int
) -> dict[tuple[str, str], float]:
    """Median seconds of each pass of each program, run in turns after one turn that is not counted."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for turn in range(runs + 1):
        for one in PASSES:
            for who, process in servers.items():
                print(one, file=process.stdin, flush=True)
                answer = process.stdout.readline()
                if not answer:
                    sys.exit(f"{who} failed: see above")
                print(f"turn {turn}: {who} {one} {float(answer):.2f} s", file=sys.stderr)
                if turn:
                    seconds.setdefault((who, one), []).append(float(answer))
    return {key: statistics.median(each) for key, each in seconds.items()}


@contextlib.contextmanager
def server(name: str, dtype: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs a pass of one program whenever it is told to, and answers with its seconds."""
    command = [sys.executable, "-m", "tests.benchmarks.train", *sys.argv[1:]]
    process = subprocess.Popen(
        [*command, f"--serve={name}", f"--dtypes={dtype}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait()


def serve(make: Callable[..., Passes], arguments: argparse.Namespace) -> None:
    """Runs the passes named on stdin, and prints the seconds of each."""
    tokens = np.random.default_rng(0).integers(
        1, 1000, (arguments.rows, arguments.length + 1), dtype=np.int32
    )
    passes = make(arguments.checkpoint, arguments.layers, arguments.dtypes, tokens)
    for line in sys.stdin:
        started = time.perf_counter()
        passes[line.strip()]()
        print(time.perf_counter() - started, flush=True)


def ours(checkpoint: pathlib.Path, layers: int | None, dtype: str, tokens: np.ndarray) -> Passes:
    """This project's train step, and the loss that it starts with."""
    changes = {} if layers is None else {"num_layers": layers}
    model = Llama(read_config(checkpoint, dtype=dtype, param_dtype=dtype, **changes))
    optimizer = adamw(LEARNING_RATE)
    batch = Batch(
        tokens=jnp.asarray(tokens[:, :-1]),
        targets=jnp.asarray(tokens[:, 1:]),
        weights=jnp.ones(tokens[:, 1:].shape, jnp.float32),
    )

    def params_of_seed_0() -> Any:
        return nn.unbox(model.init(jax.random.key(0), batch.tokens))["params"]

    params = jax.jit(params_of_seed_0)()
    state = jax.jit(lambda: init_state(params_of_seed_0(), optimizer))()

    @jax.jit
    def forward(params: Any, batch: Batch) -> jax.Array:
        sums = loss_sums(batch_scores(model, params, batch), batch.weights, z_loss=0.0)
        return sums.loss / sums.weight

    step = jax.jit(
        functools.partial(train_step, model=model, optimizer=optimizer), donate_argnums=0
    )
    held = [state]

    def one_step() -> None:
        held[0], metrics = step(held[0], batch, np.int32(0))
        jax.block_until_ready((held[0], metrics))

    return {
        "forward": lambda: jax.block_until_ready(forward(params, batch)),
        "step": one_step,
    }


def pytorch(checkpoint: pathlib.Path, layers: int | None, dtype: str, tokens: np.ndarray) -> Passes:
    """transformers' llama with torch's AdamW and gradient clipping."""
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    if layers is not None:
        config.num_hidden_layers = layers
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    inputs = torch.from_numpy(tokens[:, :-1].astype(np.int64))
    targets = torch.from_numpy(tokens[:, 1:].astype(np.int64))

    def loss() -> Any:
        logits = model(input_ids=inputs, use_cache=False).logits.float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def forward() -> None:
        with torch.no_grad():
            loss()

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return {"forward": forward, "step": step}


PROGRAMS: Mapping[str, Callable[..., Passes]] = {"here": ours, "PyTorch": pytorch}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    real = os.environ.get("MERGING_REAL_CHECKPOINTS", str(cache / "merging-at-scale" / "real"))
    parser.add_argument("--checkpoint", type=pathlib.Path, default=pathlib.Path(real) / "smollm2")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, help="default the checkpoint's")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--no_peer", action="store_true", help="without PyTorch")
    return parser.parse_args()


if __name__ == "__main__":
    main()
