r"""The paper's top case, a base of 64b and 8 experts, as checkpoints of headers alone: what a merge of it takes, without 1.2 TB.

    python -m tests.top_case --output=/data/top
    python -m launch.merge --dry_run --gin_file=gin_configs/meshes/v5e-64.gin --gin.STORAGE_BYTES_PER_S=25e9 --method=ties \
      --base=/data/top/base --experts=$(echo /data/top/expert_? | tr ' ' ,) --output=/data/top/merged

Files have the length that they should have and no data behind their headers, so they take a few kB of disk. A plan reads nothing
else. `--unscanned` gives every layer leaves of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
from collections.abc import Mapping

from merging.checkpoints.format import LeafSpec
from merging.checkpoints.safetensors_header import build_header
from merging.models import model_file
from merging.models.config import PalmConfig, named
from merging.models.families import model_of
from merging.models.trees import specs_of

EXPERTS = 8


def config(*, is_scanned: bool = True, divisor: int = 1) -> PalmConfig:
    """64b in bfloat16; `divisor`: with the same layers and all widths (but the number of heads) so many times smaller."""
    whole = named("64b", param_dtype="bfloat16", scan_layers=is_scanned)
    widths = ("vocab_size", "embed_dim", "head_dim", "mlp_dim")
    return dataclasses.replace(whole, **{w: getattr(whole, w) // divisor for w in widths})


def leaves(model: PalmConfig) -> dict[str, LeafSpec]:
    """The leaves of its own tree."""
    return specs_of(model_of(model))


def write_headers(folder: pathlib.Path, model: PalmConfig) -> None:
    """A checkpoint in one file of safetensors that holds a header, and room for the data."""
    specs: Mapping[str, LeafSpec] = leaves(model)
    folder.mkdir(parents=True)
    header = build_header(list(specs.values()), {"format": "pt"})
    path = folder / "model.safetensors"
    path.write_bytes(header)
    os.truncate(path, len(header) + sum(spec.nbytes for spec in specs.values()))
    model_file.write(folder, model, model_file.stacked_of(model), None)


def write_all(folder: pathlib.Path, *, is_scanned: bool = True) -> dict[str, object]:
    """Base and experts; returns the arguments `base` and `experts` of a merge."""
    model = config(is_scanned=is_scanned)
    base, experts = folder / "base", [folder / f"expert_{i}" for i in range(EXPERTS)]
    for each in (base, *experts):
        write_headers(each, model)
    return {"base": str(base), "experts": [str(expert) for expert in experts]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--unscanned", action="store_true")
    asked = parser.parse_args()
    write_all(asked.output, is_scanned=not asked.unscanned)


if __name__ == "__main__":
    main()
