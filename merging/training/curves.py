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
from merging.models.config import DecoderConfig

METRICS_FILE = "metrics.jsonl"


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


def flops_per_token(config: DecoderConfig, length: int) -> float:
    """Of a training step: 6 N + 12 L H h T (PaLM, arXiv 2204.02311, appendix B), nothing computed twice counted."""
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * length
    return 6 * config.num_params() + attention
