"""Are these checkpoints copies of one model? All differences are told in one error, before anything is read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from merging.checkpoints.format import CheckpointError, LeafSpec, Reader
from merging.paths import Stacked

MOST_TOLD = 40  # differences in one message

_VOCABULARY = re.compile(r"embed|lm_head|wte|vocab|logits", re.IGNORECASE)


def check_compatible(base: Reader, experts: Sequence[Reader]) -> None:
    """Raises CheckpointError with every difference in leaves, shapes and kinds of dtype."""
    compare(base.location, base.specs(), {reader.location: reader.specs() for reader in experts})


def compare(
    base_location: str,
    base: Mapping[str, LeafSpec],
    experts: Mapping[str, Mapping[str, LeafSpec]],
) -> None:
    """The same for specs by location."""
    problems: list[str] = []
    vocabulary = False
    for location, found in experts.items():
        for name in base.keys() - found.keys():
            problems.append(f"{location}: leaf {name} {_told(base[name])} is missing")
        for name in found.keys() - base.keys():
            problems.append(f"{location}: leaf {name} {_told(found[name])} is not in the base")
        for name in base.keys() & found.keys():
            want, have = base[name], found[name]
            if want.shape != have.shape:
                is_vocabulary = bool(_VOCABULARY.search(name)) and want.shape[1:] == have.shape[1:]
                vocabulary |= is_vocabulary
                rows = f" ({have.shape[0]} vocabulary rows, not {want.shape[0]})"
                problems.append(
                    f"{location}: leaf {name} has shape {have.shape}, the base has {want.shape}"
                    + (rows if is_vocabulary else "")
                )
            elif want.is_merged != have.is_merged or (
                not want.is_merged and want.dtype != have.dtype
            ):
                problems.append(
                    f"{location}: leaf {name} is {have.dtype}, the base has {want.dtype}"
                )
    if not problems:
        return
    advice = "every expert must be fine-tuned from this base: same leaves, same shapes; float types may differ"
    if vocabulary:
        advice += (
            "; where only vocabulary rows differ, bring the embeddings to one number of rows first"
            " (in transformers: model.resize_token_embeddings(rows))"
        )
    shown = sorted(problems)[:MOST_TOLD]
    more = f"\n  ... and {len(problems) - MOST_TOLD} more" if len(problems) > MOST_TOLD else ""
    raise CheckpointError(
        f"the checkpoints differ from the base {base_location}:\n  "
        + "\n  ".join(shown)
        + more
        + f"\n{advice}"
    )


def _told(spec: LeafSpec) -> str:
    return f"{spec.dtype}{list(spec.shape)}"


def with_stacked(specs: Mapping[str, LeafSpec], stacked: Stacked) -> dict[str, LeafSpec]:
    """The specs with the axis over layers filled in from the user's patterns; what a format knows itself stays."""
    result = {}
    for name, spec in specs.items():
        axis = spec.stacked if spec.stacked is not None else stacked.axis(name)
        if axis is not None and axis >= len(spec.shape):
            raise ValueError(
                f"stacked says that axis {axis} of leaf {name} runs over layers, but its shape is {spec.shape}"
            )
        result[name] = dataclasses.replace(spec, stacked=axis)
    unused = stacked.unused(list(specs))
    if unused:
        raise ValueError(
            f"the stacked patterns {', '.join(map(repr, unused))} match no leaf; leaves are named like"
            f" {next(iter(specs), '(none)')}"
        )
    return result
