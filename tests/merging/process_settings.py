"""The merges that `test_processes.py` compares between one process and two."""

from __future__ import annotations

from merging.methods.averaging import Averaging
from merging.methods.dare_ties import DareTies
from merging.methods.method import Method
from merging.methods.ties import Ties

EXPERTS = 3

SETTINGS: dict[str, Method] = {
    "averaging": Averaging(),
    "ties": Ties(),
    "ties_tensor": Ties(density=0.3, scope="tensor"),
    "dare_ties_l1": DareTies(trim_density=0.3, rescale="l1"),
}
