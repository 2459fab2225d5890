"""Collectives in optimized HLO: what devices tell one another, counted for one of them.

TPU's compiler writes two of them in ways that a count of instructions would misread. A collective that runs beside products stands
in every fusion it runs beside, from its start to its end, on one channel: it is one. And an all-reduce of which each
device keeps a slice, both in one fusion, is a reduce-scatter.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re

from merging.engine.hlo import Instruction, Module

# Shares of a collective's bytes that leave a device, times (n - 1) / n in a group of n: what a ring sends, and nothing sends less.
_SENT = {
    "all-gather": 1,
    "all-reduce": 2,
    "all-to-all": 1,
    "ragged-all-to-all": 1,
    "reduce-scatter": 1,
}
_WHOLE = ("collective-broadcast", "collective-permute")  # sent as they are
KINDS = frozenset((*_SENT, *_WHOLE))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """All collectives of one kind in a program.

    Attributes:
      count: how many.
      nbytes: of their results on one device; of a reduce-scatter, of what it adds up.
      sent_bytes: that leave one device, at least.
      largest_bytes: of the largest array of one of them, counted as nbytes.
      dtypes: of what they move, in HLO's words.
    """

    count: int
    nbytes: int
    sent_bytes: int
    largest_bytes: int
    dtypes: tuple[str, ...]


def collectives(module: Module) -> dict[str, Collective]:
    """By kind, e.g. `all-reduce`; a loop's as often as it runs."""
    found: dict[str, dict[str, tuple[int, Collective]]] = collections.defaultdict(dict)
    for instruction, computation, times in module.run(module.entry):
        # An asynchronous one is two instructions, of which the second has the result alone.
        kind = instruction.opcode.removesuffix("-done")
        if kind not in KINDS:
            continue
        if kind == "all-reduce" and _keeps_a_slice(module, instruction, computation):
            kind = "reduce-scatter"
        channel = re.search(r"\bchannel_id=(\d+)", instruction.attributes)
        one = _one(module, kind, instruction, computation)
        found[kind][channel[0] if channel else instruction.name] = (times, one)
    return {kind: added(list(each.values())) for kind, each in sorted(found.items())}


def added(each: list[tuple[int, Collective]]) -> Collective:
    """Some collectives of one kind, each so many times."""
    return Collective(
        count=sum(times * one.count for times, one in each),
        nbytes=sum(times * one.nbytes for times, one in each),
        sent_bytes=sum(times * one.sent_bytes for times, one in each),
        largest_bytes=max(one.largest_bytes for _, one in each),
        dtypes=tuple(sorted({dtype for _, one in each for dtype in one.dtypes})),
    )


def _one(module: Module, kind: str, instruction: Instruction, computation: str) -> Collective:
    instructions = module.computations[computation]
    start = instruction
    if instruction.opcode.endswith("-done"):
        start = instructions.get(instruction.operands[0], instruction)
    values = instruction.result
    if kind == "reduce-scatter":
        values = tuple(v for name in start.operands for v in instructions[name].result)
    nbytes = sum(v.nbytes for v in values)
    sent = nbytes
    if kind in _SENT:
        size = _group(module, start)
        sent = _SENT[kind] * nbytes * (size - 1) // size
    return Collective(
        count=1,
        nbytes=nbytes,
        sent_bytes=sent,
        largest_bytes=max(v.nbytes for v in values),
        dtypes=tuple(sorted({v.dtype for v in values})),
    )


def _keeps_a_slice(module: Module, instruction: Instruction, computation: str) -> bool:
    """Whether all that a computation gives of an all-reduce is a slice of it."""
    root = module.root(computation)
    while root.opcode in ("bitcast", "copy", "convert"):
        root = module.computations[computation][root.operands[0]]
    return root.opcode == "dynamic-slice" and root.operands[0] == instruction.name


def _group(module: Module, instruction: Instruction) -> int:
    """How many devices take part: `{{0,1},{2,3}}`, `[2,8]<=[16]` (2 groups of 8), `mesh['x'=8,'y'=2] {'x'}`, or `{}` for all."""
    said = re.search(
        r"replica_groups=(?:\{\{([\d, ]*)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\] ?\{([^}]*)\})",
        instruction.attributes,
    )
    if not said:
        return module.devices
    if said[1]:
        return said[1].count(",") + 1
    if said[2]:
        return int(said[2])
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", said[3])}
    return math.prod(
        int(part) if part else sizes[name]
        for name, part in re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", said[4])
    )
