"""What a compiled program asks of one device, read from what the compiler made of it, without running it.

`figures` takes any `jax.stages.Compiled`, for devices that are there or of a topology that is only described, and gives
bytes, collectives and operations as one dataclass. All are the compiler's own numbers or counts over its optimized HLO:
what the program asks for, not what a device was seen to do.

Vector operations are counted like this: every elementwise instruction of the optimized program, inside fusions too,
counts once for each element of its result, and a reduction once for each element it reads and instruction it applies to
it; a loop's body counts as often as the HLO says it runs. Each counts 1, whatever the type and whatever a device needs
for it: a division or a 32-bit integer product takes several steps of a TPU's vector unit, a mask operation less than
one. Matrix products, sorts, scatters and moves (copies, transposes, broadcasts) are left out.

Left out, too: time. A program of many matrix products is better judged by `flops`.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax

ELEMENTWISE = frozenset(
    """
    abs add and atan2 cbrt ceil clamp compare complex convert cosine count-leading-zeros divide erf exponential
    exponential-minus-one floor imag iota is-finite log log-plus-one logistic maximum minimum multiply negate not or
    popcnt power real reduce-precision remainder round-nearest-afz round-nearest-even rsqrt select shift-left
    shift-right-arithmetic shift-right-logical sign sine sqrt stochastic-convert subtract tan tanh xor
    """.split()
)
COLLECTIVES = frozenset(
    """
    all-gather all-reduce all-to-all collective-broadcast collective-permute ragged-all-to-all reduce-scatter
    """.split()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """All collectives of one kind in a program.

    Attributes:
      count: how many.
      nbytes: of their results on one device.
      dtypes: of what they move, in HLO's words.
    """

    count: int
    nbytes: int
    dtypes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """What one program asks of one device.

    Attributes:
      bytes_accessed: read and written by all fusions, by the compiler; it counts a loop's body once.
      argument_bytes, output_bytes: of the device's shards, without padding.
      temporary_bytes: held besides arguments and outputs.
      memory_bytes: arguments, outputs, temporaries and code, padding included; donated buffers count once.
      flops: by the compiler, matrix products included.
      operations: vector operations; see the module's docstring.
      loops: how many loops there are, of which `bytes_accessed` and `flops` count one turn.
      collectives: by kind, e.g. `all-reduce`.
      compile_seconds: of the compiler on this machine.
    """

    bytes_accessed: int
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    memory_bytes: int
    flops: int
    operations: int
    loops: int
    collectives: Mapping[str, Collective]
    compile_seconds: float

    @property
    def traffic(self) -> float:
        """Bytes accessed over the unavoidable ones: each argument read once, each output written once."""
        return self.bytes_accessed / (self.argument_bytes + self.output_bytes)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {**dataclasses.asdict(self), "traffic": self.traffic}


def figures(compiled: jax.stages.Compiled, *, compile_seconds: float = 0.0) -> Figures:
    """The figures of a compiled program."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    program = Program(compiled.as_text())
    return Figures(
        bytes_accessed=int(cost["bytes accessed"]),
        argument_bytes=program.argument_bytes,
        output_bytes=program.output_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        memory_bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
        flops=int(cost.get("flops", 0)),
        operations=program.operations,
        loops=program.loops,
        collectives=program.collectives,
        compile_seconds=compile_seconds,
    )


# ---- HLO as text ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Value:
    """One array of a result; `dtype` in HLO's words, `bf16`."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        bits = 8 if self.dtype == "pred" else int((re.search(r"\d+", self.dtype) or "0")[0])
        return (self.size * bits + 7) // 8


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """One line: `%name = result opcode(operands), attributes`."""

    name: str
    is_root: bool
    result: tuple[_Value, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.result)

    @property
    def turns(self) -> int:
        """How often a loop's body runs; 1 where the HLO does not say."""
        said = re.search(r'known_trip_count":\{"n":"(\d+)"', self.attributes)
        return int(said[1]) if said else 1

    @property
    def called(self) -> list[str]:
        """The computations that it runs as they are; not what a reduction applies to its elements."""
        keys = "calls|body|condition|branch_computations|true_computation|false_computation|called_computations"
        if self.opcode == "call":
            keys += "|to_apply"
        found = re.findall(rf"\b(?:{keys})=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
        return [name for text in found for name in re.findall(r"%([\w.\-]+)", text)]

    @property
    def applied(self) -> str | None:
        """The computation that a reduction or a map applies to its elements."""
        found = re.search(r"\bto_apply=%([\w.\-]+)", self.attributes)
        return found[1] if found and self.opcode in ("reduce", "map") else None


class Program:
    """A module of optimized HLO, read from its text (`Compiled.as_text()`). One that is sharded is one device's."""

    def __init__(self, text: str):
        self._computations: dict[str, dict[str, _Instruction]] = {}
        self._entry = ""
        self._known: dict[str, int] = {}  # operations by computation
        current: dict[str, _Instruction] = {}
        for line in text.splitlines():
            head = re.match(r"(ENTRY )?%([\w.\-]+) .*\{$", line)
            if head:
                current = self._computations.setdefault(head[2], {})
                self._entry = head[2] if head[1] else self._entry
            elif line.startswith(" ") and " = " in line:
                instruction = _parse(line)
                current[instruction.name] = instruction
        assert self._entry, "no ENTRY: this is not the text of an HLO module"

    @property
    def argument_bytes(self) -> int:
        entry = self._computations[self._entry].values()
        return sum(i.nbytes for i in entry if i.opcode == "parameter")

    @property
    def output_bytes(self) -> int:
        return sum(i.nbytes for i in self._computations[self._entry].values() if i.is_root)

    @property
    def operations(self) -> int:
        return self._operations(self._entry)

    @property
    def loops(self) -> int:
        return sum(1 for i, _ in self._run(self._entry, 1) if i.opcode == "while")

    @property
    def collectives(self) -> dict[str, Collective]:
        found: dict[str, list[tuple[int, _Instruction]]] = collections.defaultdict(list)
        for instruction, times in self._run(self._entry, 1):
            # An asynchronous one is two instructions, of which the second has the result alone.
            kind = instruction.opcode.removesuffix("-done")
            if kind in COLLECTIVES:
                found[kind].append((times, instruction))
        return {
            kind: Collective(
                count=sum(times for times, _ in each),
                nbytes=sum(times * instruction.nbytes for times, instruction in each),
                dtypes=tuple(sorted({v.dtype for _, i in each for v in i.result})),
            )
            for kind, each in sorted(found.items())
        }

    def _run(self, computation: str, times: int) -> Iterator[tuple[_Instruction, int]]:
        """Every instruction that a computation leads to, and how often it is run. All branches count."""
        for instruction in self._computations[computation].values():
            yield instruction, times
            for name in instruction.called:
                yield from self._run(name, times * instruction.turns)

    def _operations(self, computation: str) -> int:
        if computation in self._known:
            return self._known[computation]
        total = 0
        instructions = self._computations[computation]
        for instruction in instructions.values():
            if instruction.opcode in ELEMENTWISE:
                total += instruction.result[0].size
            elif instruction.applied:
                size = instructions[instruction.operands[0]].result[0].size
                total += size * self._operations(instruction.applied)
            total += instruction.turns * sum(map(self._operations, instruction.called))
        self._known[computation] = total
        return total


def _parse(line: str) -> _Instruction:
    root, name, rest = re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", line).groups()
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    opcode, rest = rest.split("(", 1)
    rest = f"({rest}"
    end = _closing(rest)
    values = re.findall(r"\b([a-z]+\d*\w*)\[([\d,<= ]*)\]", result)
    return _Instruction(
        name=name,
        is_root=bool(root),
        result=tuple(
            _Value(dtype, tuple(int(size) for size in re.findall(r"\d+", shape)))
            for dtype, shape in values
        ),
        opcode=opcode,
        operands=tuple(re.findall(r"%([\w.\-]+)", rest[:end])),
        attributes=rest[end:],
    )


def _closing(text: str) -> int:
    """Where the parenthesis closes that a text begins with: the index behind it."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise AssertionError(f"HLO with a parenthesis that never closes: {text[:80]}")
