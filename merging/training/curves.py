"""The metrics of a run on their way out: plain numbers of each expert, and the file of JSON lines that a resumed run continues."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from merging.checkpoints.storage import LinesFile
from merging.engine import hosts
from merging.models.config import DecoderConfig, Remat
from merging.models.families import family_of

METRICS_FILE = "metrics.jsonl"

# Operations of a training step for each parameter N, and for each L H h T of attention: forward, twice that backward, and
# what a remat policy computes again.
TRAINING_PASSES: dict[Remat, tuple[int, int]] = {"none": (6, 12), "dots": (6, 16), "full": (8, 16)}


@contextlib.contextmanager
def metrics_files(folders: Mapping[str, epath.Path], *, after: int) -> Iterator[dict[str, Any]]:
    """Each expert's file of metrics, open to be added to; lines of later steps, which are taken again, are removed."""
    with contextlib.ExitStack() as stack:
        files = {}
        if hosts.is_main():
            for name, folder in folders.items():
                path = folder / METRICS_FILE
                kept = []
                if path.exists():
                    for line in path.read_text().splitlines(keepends=True):
                        with contextlib.suppress(json.JSONDecodeError):  # the last one may be cut
                            if json.loads(line)["step"] <= after:
                                kept.append(line)
                files[name] = stack.enter_context(LinesFile(path, "".join(kept)))
        yield files


def of_expert(values: Mapping[str, Any], number: int) -> dict[str, float]:
    """The metrics of one of several experts as plain numbers; what has no axis over experts is of all of them."""
    return {
        name: float(np.ravel(value)[number] if np.ndim(value) else value)
        for name, value in values.items()
        if name != "first_bad"
    }


def flops_per_token(config: DecoderConfig, length: int, *, remat: Remat = "none") -> float:
    """Of a training step: 6 N + 12 L H h T (PaLM, arXiv 2204.02311, appendix B), nothing computed twice counted.

    With a remat policy, what it computes again counts too, as in TRAINING_PASSES. Of that full remat spares the last
    products of blocks (`flops_spared_per_token`).
    """
    of_parameters, of_attention = TRAINING_PASSES[remat]
    attention = config.num_layers * config.num_heads * config.head_dim * length
    return of_parameters * config.num_params() + of_attention * attention


def flops_spared_per_token(config: DecoderConfig) -> float:
    """Of a training step with full remat, what need not be computed again: products whose results only leave their block, which no gradient asks for.

    PaLM's parallel block ends in two, of attention and the hidden layer; llama's in one, since the hidden layer reads
    what attention adds; gemma 3's results go through a norm, whose gradient asks for them.
    """
    hidden = config.embed_dim * config.mlp_dim
    attended = config.embed_dim * config.num_heads * config.head_dim
    last = {"palm": hidden + attended, "llama": hidden, "gemma3": 0}[family_of(config)]
    return 2 * config.num_layers * last
