"""Training under T5X from a checkpoint that holds parameters alone, as merges and `launch.finetune` make them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.traverse_util

Tree = Mapping[str, Any]


def parameters_alone(stored: Tree, wanted: Tree, *, is_resuming: bool = False) -> Tree:
    """A `state_transformation_fn` of T5X's restore: parameters and step of the checkpoint, a new optimizer state.

    T5X fills up what a checkpoint lacks only where `fallback_to_scratch` is set, and then in silence, parameters too. So what is
    lacking is refused here.

    Args:
      stored: the state in the checkpoint, its arrays or descriptions of them.
      wanted: that of the model.
      is_resuming: a run goes on from its own checkpoint, whose state is taken as it is.

    Raises ValueError that names the parameters that are missing and those that are left over.
    """
    if is_resuming:
        return stored
    found, named = _names(stored["target"]), _names(wanted["target"])
    problems = [f"{name} is missing" for name in sorted(named - found)]
    problems += [f"{name} is not the model's" for name in sorted(found - named)]
    if problems:
        raise ValueError(
            "\n  ".join(["the checkpoint's parameters are not the model's:", *problems])
            + "\nchoose its SIZE and SCAN_LAYERS, or convert it (launch.convert, LAYOUT)"
        )
    return {"target": stored["target"], "state": {"step": stored["state"]["step"]}}


def _names(tree: Tree) -> set[str]:
    """Paths of the leaves; a description of an array (legacy T5X) is a leaf."""

    def is_leaf(_: Any, value: Any) -> bool:
        return value.keys() >= {"driver", "kvstore", "metadata"}

    return set(flax.traverse_util.flatten_dict(dict(tree), sep="/", is_leaf=is_leaf))
