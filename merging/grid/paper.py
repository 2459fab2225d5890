"""What the paper reports (arXiv 2410.03617): Task Arithmetic, relative scores for N = 2 and N = 8, as a grid.

As read in secondary sources. From the pretrained 24B base no numbers are known.
"""

from __future__ import annotations

import numpy as np

from merging.grid.relative import Grid
from merging.grid.study_file import INSTRUCTION_TUNED, PRETRAINED

SIZES = ("1B", "8B", "24B", "64B")
BASES = (PRETRAINED, INSTRUCTION_TUNED)
NUM_EXPERTS = (2, 8)
_NONE = (np.nan, np.nan)

# Of each base a row for each size, of that a number for each N.
HELD_IN = (
    ((0.66, 0.39), (0.68, 0.42), _NONE, (0.80, 0.67)),
    ((0.91, 0.86), (0.95, 0.88), (0.96, 0.92), (1.00, 0.93)),
)
MULTITASK_HELD_IN = (
    ((0.88, 0.87), (1.06, 1.06), _NONE, (0.97, 0.96)),
    ((0.97, 0.96), (0.96, 0.96), (0.99, 0.98), (0.99, 0.99)),
)
HELD_OUT = (
    ((1.01, 1.07), (1.06, 1.00), _NONE, (1.29, 1.35)),
    ((1.03, 1.05), (1.06, 1.03), (1.05, 1.18), (1.00, 1.09)),
)
MULTITASK_HELD_OUT = (
    ((1.10, 1.10), (1.62, 1.62), _NONE, (1.73, 1.72)),
    ((1.11, 1.11), (1.12, 1.12), (1.18, 1.18), (1.05, 1.05)),
)

# What is known of the other methods, for the claims that compare methods.
METHODS_ALIKE = "IT 64B, N = 8: all four methods .93 held-in and 1.09 to 1.10 held-out"


def grid() -> Grid:
    """One draw, one method, one seed."""

    def array(rows: tuple[tuple[tuple[float, float], ...], ...]) -> np.ndarray:
        return np.array(rows).transpose(1, 0, 2)[None, :, :, None, :, None]  # [R, S, B, M, N, K]

    return Grid(
        sizes=SIZES,
        bases=BASES,
        methods=("TaskArithmetic()",),
        num_experts=NUM_EXPERTS,
        held_in=array(HELD_IN),
        held_out=array(HELD_OUT),
        multitask_held_in=array(MULTITASK_HELD_IN),
        multitask_held_out=array(MULTITASK_HELD_OUT),
        seeds=np.ones((1, 1)),
    )
