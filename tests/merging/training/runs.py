"""Runs of a tiny model on batches that need no text: what tests of the finetune stage train."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from merging import finetune
from merging.finetune import Mixture, Settings
from merging.models.config import PalmConfig
from merging.partitioning import MeshShape
from merging.training.feed import Indexed
from merging.training.optimizer import adamw

LENGTH, ROWS, V = 16, 8, 64
CONFIG = PalmConfig(
    vocab_size=V, embed_dim=16, num_layers=2, num_heads=2, head_dim=8, mlp_dim=32, dropout_rate=0.1
)
GIVEN = ("should_stop", "log", "write_metrics")
NEVER_EQUAL = ("step_seconds", "tokens_per_s")


def rows(seed: int, step: int, batch_size: int) -> dict[str, np.ndarray]:
    """A global batch: runs of tokens that follow one another by a rule of the seed, two to a row."""
    rng = np.random.default_rng([seed, step])
    starts = rng.integers(1, V, (batch_size, 2, 1))
    places = np.arange(LENGTH // 2 + 1)
    runs = (starts + places * (3 + 2 * seed)) % (V - 1) + 1
    tokens, targets = runs[..., :-1], runs[..., 1:]
    inside = np.broadcast_to(places[:-1], tokens.shape)

    def flat(x: np.ndarray, dtype: Any = np.int32) -> np.ndarray:
        return np.ascontiguousarray(x.reshape(batch_size, LENGTH).astype(dtype))

    return {
        "tokens": flat(tokens),
        "targets": flat(targets),
        "loss_weights": flat(inside >= 2, np.float32),
        "positions": flat(inside),
        "segment_ids": flat(np.broadcast_to([[[1], [2]]], tokens.shape)),
        "prefix_mask": flat(inside < 2, bool),
    }


def _source(seed: int, first: int, batch_size: int, host: int, hosts: int) -> Indexed:
    def batch(step: int) -> dict[str, np.ndarray]:
        mine = slice(host * batch_size // hosts, (host + 1) * batch_size // hosts)
        return {k: v[mine] for k, v in rows(seed, first + step, batch_size).items()}

    return Indexed(batch)


def mixture(name: str = "ones", seed: int = 0) -> Mixture:
    """A mixture with training and validation batches."""
    return Mixture(
        name=name,
        train=functools.partial(_source, seed, 0),
        validation=functools.partial(_source, seed, 1_000_000),
        length=LENGTH,
        vocab_size=V,
        identity={"seed": seed},
    )


def settings(output: pathlib.Path, **changes: Any) -> Settings:
    """Of a short run."""
    standard: dict[str, Any] = {
        "train_steps": 12,
        "batch_size": ROWS,
        "model": CONFIG,
        "optimizer": adamw,
        "learning_rate": 1e-2,
        "log_every": 1,
        "validation_batches": 2,
        "mesh": MeshShape().mesh(jax.devices()[:1]),
    }
    return Settings(output_dir=output, **standard | changes)


def run(
    output: pathlib.Path, mixtures: Sequence[Mixture] | None = None, **changes: Any
) -> finetune.Report:
    """One run; `GIVEN` are arguments of `finetune.run`, `validation` one of `finetune.plan`, the others settings."""
    given = {k: changes.pop(k) for k in GIVEN if k in changes}
    mixtures = [mixture()] if mixtures is None else mixtures
    validation = changes.pop("validation", None)
    asked = settings(output, **changes)
    planned = finetune.plan(asked, mixtures, is_one=len(mixtures) == 1, validation=validation)
    return finetune.run(planned, **given)


def curve(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of metrics, without those that no two runs share."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in NEVER_EQUAL} for line in lines]


def losses(folder: pathlib.Path) -> np.ndarray:
    """[steps] of training."""
    return np.array([line["loss"] for line in curve(folder) if "loss" in line])


def params(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The last output, by the library's reader."""
    import contextlib

    from merging.checkpoints import boxes, open_checkpoint

    with contextlib.closing(open_checkpoint(folder)) as reader:
        return {k: reader.read(k, boxes.whole(s.shape)) for k, s in reader.specs().items()}
