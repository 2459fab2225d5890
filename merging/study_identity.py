"""What the results of a study depend on beside its cells, as JSON: a study that differs in it has no place in the same folder.

Not in it is what changes no more than rounding, so that a study can be gone on with elsewhere and otherwise: paths, devices, workers,
where merges are made, how rows are put into batches, how often a state is saved.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

from merging.checkpoints import open_checkpoint
from merging.training.planning import moves, rates

if TYPE_CHECKING:
    from merging.models.config import DecoderConfig
    from merging.study import Plan, Training


def depends_on(planned: Plan) -> dict[str, Any]:
    """Of a study, with names as users write them."""
    s = planned.settings
    return {
        "models": {size: _of_model(planned.config(size)) for size in s.sizes},
        "bases": {
            name: _of_checkpoints(planned, name) if isinstance(how, str) else _of(planned, how)
            for name, how in s.bases.items()
        },
        "expert": _of(planned, s.expert),
        "multitask": None if s.multitask is None else _of(planned, s.multitask),
        "seed": s.seed,
        "tune": s.tune,
        "normalization": s.normalization,
        "data": dict(planned.data.depends_on(s.tune)),
    }


def _of(planned: Plan, how: Training) -> dict[str, Any]:
    """Of what is trained, with what a size has otherwise."""
    standard = _of_training(how)
    otherwise = {}
    for size in planned.settings.sizes:
        mine = _of_training(how.of_size(size)).items()
        changed = {name: value for name, value in mine if value != standard[name]}
        if changed:
            otherwise[size] = changed
    return {**standard, "by_size": otherwise}


def _of_training(how: Training) -> dict[str, Any]:
    return {
        "mixture": how.mixture,
        "lengths": dict(how.lengths),
        "start": how.start,
        "train_steps": how.train_steps,
        "batch_size": how.batch_size,
        # A function has no name that stays: it is told by what it does, as numbers that differ a little from device to device.
        "learning_rate": " ".join(rates(how.learning_rate, how.train_steps)),
        "optimizer": " ".join(moves(how.optimizer)),
        "dropout_rate": how.dropout_rate,
        "clip_norm": how.clip_norm,
        "at_once": how.at_once,  # experts of a run share a folder
    }


def _of_model(config: DecoderConfig) -> dict[str, Any]:
    found = {"kind": type(config).__name__, **dataclasses.asdict(config)}
    del found["remat"]
    return found


def _of_checkpoints(planned: Plan, base: str) -> dict[str, str]:
    """The digest of a base that was there, by size."""
    found = {}
    for size in planned.settings.sizes:
        with contextlib.closing(open_checkpoint(planned.base_folder(size, base))) as reader:
            found[size] = reader.digest()
    return found
