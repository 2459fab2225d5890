"""Are these checkpoints copies of one model? All differences are told in one error, before anything is read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence

from merging.checkpoints.format import CheckpointError, LeafSpec, Reader
from merging.paths import Stacked, is_like

MOST_TOLD = 40  # differences in one message

_VOCABULARY = re.compile(r"embed|lm_head|wte|vocab|logits", re.IGNORECASE)


def check_compatible(
    base: Reader,
    experts: Sequence[Reader],
    *,
    kept: Collection[str] = (),
    rows: Mapping[str, int] | None = None,
    exclude: Sequence[str] = (),
) -> None:
    """Raises CheckpointError with every difference in leaves, shapes and kinds of dtype.

    Args:
      kept: leaves that stay as the base has them, whatever the experts hold.
      rows: leaves of which only so many rows are merged, which all experts have.
      exclude: patterns of leaves that an expert may have beside the base's.
    """
    wanted = {name: spec for name, spec in base.specs().items() if name not in kept}
    found = {}
    for reader in experts:
        specs = {
            name: spec
            for name, spec in reader.specs().items()
            if name in wanted or not (name in kept or is_like(name, exclude))
        }
        for name in (rows or {}).keys() & specs.keys() & wanted.keys():
            specs[name] = dataclasses.replace(specs[name], shape=wanted[name].shape)
        found[reader.location] = specs
    compare(base.location, wanted, found)


def common_rows(base: Mapping[str, LeafSpec], experts: Sequence[Reader]) -> dict[str, int]:
    """Leaves of the vocabulary whose numbers of rows differ, and how many rows all have."""
    found = {}
    for name, spec in base.items():
        others = [reader.specs().get(name, spec) for reader in experts]
        if _differ_in_rows(name, [spec, *others]):
            found[name] = min(each.shape[0] for each in (spec, *others))
    return found


def _differ_in_rows(name: str, specs: Sequence[LeafSpec]) -> bool:
    """Whether leaves of a vocabulary differ in the number of their rows, and in nothing else."""
    return (
        bool(_VOCABULARY.search(name))
        and all(spec.shape for spec in specs)
        and len({spec.shape[1:] for spec in specs}) == 1
        and len({spec.shape[0] for spec in specs}) > 1
    )


def compare(
    base_location: str,
    base: Mapping[str, LeafSpec],
    experts: Mapping[str, Mapping[str, LeafSpec]],
) -> None:
    """The same for specs by location."""
    problems: list[str] = []
    vocabulary = tied = False
    for location, found in experts.items():
        for name in base.keys() - found.keys():
            tied |= bool(_VOCABULARY.search(name))
            problems.append(f"{location}: leaf {name} {_told(base[name])} is missing")
        for name in found.keys() - base.keys():
            problems.append(f"{location}: leaf {name} {_told(found[name])} is not in the base")
        for name in base.keys() & found.keys():
            want, have = base[name], found[name]
            if want.shape != have.shape:
                is_vocabulary = _differ_in_rows(name, [want, have])
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
            "; where only vocabulary rows differ, VOCABULARY_ROWS='common' merges the rows that all have and keeps the"
            " base's others"
        )
    if tied:
        advice += (
            "; where a leaf is left out because it is a copy of another, say so: TIED={'lm_head.weight':"
            " 'model.embed_tokens.weight'}"
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
