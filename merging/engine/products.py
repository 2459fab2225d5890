"""Floating point operations of matrix products in optimized HLO: two for each product of two numbers that enters the result.

TPU's compiler writes every product as a convolution, batches and several contracted axes as windows with padding and
dilation. Positions at which a window meets padding or holes count nothing (as in XLA's own cost analysis), so the
count is that of the product as it was written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

from merging.engine.hlo import Instruction


def flops(instruction: Instruction, computation: Mapping[str, Instruction]) -> int:
    """Of one instruction; 0 for what is no matrix product."""
    if instruction.opcode == "dot":
        left = computation[instruction.operands[0]].result[0].shape
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        axes = [int(axis) for axis in contracted[1].split(",") if axis]
        return 2 * instruction.result[0].size * math.prod(left[axis] for axis in axes)
    if instruction.opcode == "convolution":
        return _convolution(instruction, computation)
    return 0


def _convolution(instruction: Instruction, computation: Mapping[str, Instruction]) -> int:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    left_labels, kernel_labels, out_labels = labels.groups()
    left, kernel = (computation[name].result[0].shape for name in instruction.operands[:2])
    out = instruction.result[0].shape
    count = kernel[kernel_labels.index("i")]
    count *= out[out_labels.index("f")] * out[out_labels.index("b")]
    for axis in range(len(out_labels) - 2):
        count *= _meetings(
            size=left[left_labels.index(str(axis))],
            outputs=out[out_labels.index(str(axis))],
            window=kernel[kernel_labels.index(str(axis))],
            stride=_window(instruction, "stride", axis),
            padding=_window(instruction, "pad", axis),
            left_dilation=_window(instruction, "lhs_dilate", axis),
            kernel_dilation=_window(instruction, "rhs_dilate", axis),
        )
    return 2 * count


def _window(instruction: Instruction, name: str, axis: int) -> int:
    """A property of the window along one axis: `pad=1_0x3_3` -> 1, 3 (what stands before), 1 or 0 where none is said."""
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    said = re.search(rf"\b{name}=(\S+)", window[1]) if window else None
    if not said:
        return 0 if name == "pad" else 1
    return int(said[1].split("x")[axis].split("_")[0])


def _meetings(
    *,
    size: int,
    outputs: int,
    window: int,
    stride: int,
    padding: int,
    left_dilation: int,
    kernel_dilation: int,
) -> int:
    """At how many (output, window position) pairs the window lies on an element, not on padding or a hole."""
    out, position = np.arange(outputs)[:, None], np.arange(window)[None, :]
    at = out * stride - padding + position * kernel_dilation
    inside = (at >= 0) & (at <= (size - 1) * left_dilation) & (at % left_dilation == 0)
    return int(inside.sum())
