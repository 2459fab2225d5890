"""What a run starts from: parameters drawn afresh, those of a checkpoint, some of both, or a whole train state.

RESTORE is for checkpoints that hold a part of the model, or hold it under other names: rules (regular expression, name), in order. The
first expression that all of a parameter's name is like decides where it comes from: the checkpoint's leaf of that name, which may
use the expression's groups (`\\1`), or, for None, nowhere: it is drawn afresh. A parameter that no rule speaks of has its own name.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from merging import partitioning
from merging.checkpoints import open_checkpoint
from merging.checkpoints.format import CheckpointError
from merging.checkpoints.safetensors_header import refuse, show
from merging.models.config import DecoderConfig
from merging.models.decoder import boxed_params
from merging.models.families import model_of
from merging.models.parameters import read_leaf, read_params
from merging.models.trees import as_model, own_names, specs_of
from merging.training.settings import Restore

# Where a train state of this stage has its parameters.
STATE_PARAMS = "params"


def drawn_params(config: DecoderConfig, mesh: Mesh, seed: int) -> Any:
    """New parameters, sharded; the same on any mesh."""
    model = model_of(config)

    @functools.partial(jax.jit, out_shardings=partitioning.shardings(boxed_params(model), mesh))
    def draw() -> Any:
        tokens = jnp.zeros((1, 1), jnp.int32)
        return nn.unbox(model.init(jax.random.key(seed), tokens)["params"])

    with partitioning.use(mesh):
        return draw()


def initial_params(
    checkpoint: epath.PathLike | None,
    config: DecoderConfig,
    mesh: Mesh,
    *,
    seed: int,
    params_path: str | None = None,
    restore: Restore = (),
) -> Any:
    """The parameters of a checkpoint, drawn from the seed where there is none or a rule says so; sharded.

    Raises CheckpointError for leaves that are missing or of another shape.
    """
    if checkpoint is None:
        return drawn_params(config, mesh, seed)
    if not restore:
        return read_params(checkpoint, config, mesh, params_path=params_path)
    leaves = flax.traverse_util.flatten_dict(drawn_params(config, mesh, seed), sep="/")
    with contextlib.closing(open_checkpoint(checkpoint, params_path=params_path)) as opened:
        reader = own_names(opened, config)
        for name, theirs in sources(restore, config, reader.specs(), str(checkpoint)).items():
            if theirs is not None:
                leaves[name] = read_leaf(
                    reader, theirs, leaves[name].sharding, config.parameter_dtype
                )
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def check(
    checkpoint: epath.PathLike, config: DecoderConfig, *, params_path: str | None, restore: Restore
) -> str:
    """The checkpoint's digest, from headers alone. Raises CheckpointError where `initial_params` would."""
    with contextlib.closing(open_checkpoint(checkpoint, params_path=params_path)) as reader:
        if restore:
            named = own_names(reader, config).specs()
            sources(restore, config, named, str(checkpoint))
        else:
            as_model(reader, config)
        return reader.digest()


def sources(
    restore: Restore, config: DecoderConfig, found: Mapping[str, Any], where: str
) -> dict[str, str | None]:
    """The checkpoint's leaf for each of the model's, None for those that are drawn.

    Raises CheckpointError, with all of them, for leaves that are missing or of another shape, and for rules without use.
    """
    rules = [(re.compile(expression), name) for expression, name in restore]
    used: set[int] = set()
    problems, chosen = [], {}
    for name, spec in specs_of(model_of(config)).items():
        theirs: str | None = name
        for number, (expression, template) in enumerate(rules):
            match = expression.fullmatch(name)
            if match:
                used.add(number)
                theirs = None if template is None else match.expand(template)
                break
        chosen[name] = theirs
        if theirs is None:
            continue
        shape = list(found[theirs].shape) if theirs in found else "missing"
        if shape != list(spec.shape):
            problems.append(f"{show(theirs)}, for {name}, is {shape}, wanted {list(spec.shape)}")
    problems += [
        f"RESTORE: {expression!r} is like no parameter that no rule before it is like"
        for number, (expression, _) in enumerate(restore)
        if number not in used
    ]
    if all(theirs is None for theirs in chosen.values()):
        problems.append("RESTORE: nothing is taken from the checkpoint")
    refuse(where, problems, f"the checkpoint has {_some(list(found))}")
    return chosen


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def is_train_state(checkpoint: epath.PathLike) -> bool:
    """Whether a folder is one step of this stage's train states."""
    folder = epath.Path(checkpoint)
    return (folder / "state").is_dir() and (folder / "progress").is_dir()


def check_is_train_state(checkpoint: epath.PathLike | None) -> None:
    """Raises CheckpointError, saying where such are found."""
    if checkpoint is None or not is_train_state(checkpoint):
        raise CheckpointError(
            f"RESTORE_STATE is for a train state of this stage, and {checkpoint} is none: give a step's folder of a run with"
            " KEEP_STATE=True, OUTPUT_DIR/checkpoints/0/STEP"
        )
