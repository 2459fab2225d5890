"""Merging of fine-tuned models in weight space: methods, a merge engine, and the study built on them.

`merge_params` merges parameter trees in memory, on one device or sharded over many; `merge_checkpoints` merges
checkpoints from disk to disk within a budget of memory. `METHODS` has the methods by name.
"""

from __future__ import annotations

from merging.engine.resident import merge_params
from merging.merge import merge_checkpoints
from merging.methods import METHODS

__all__ = ["METHODS", "merge_checkpoints", "merge_params"]
