"""What a compiled program asks of one device, read from what the compiler made of it, without running it.

`figures` takes any `jax.stages.Compiled`, for devices that are there or of a topology that is only described, and gives
bytes, collectives and operations as one dataclass. All are the compiler's own numbers or counts over its optimized HLO:
what the program asks for, not what a device was seen to do.

Vector operations are counted like this: every elementwise instruction of the optimized program, inside fusions too,
counts once for each element of its result, and a reduction once for each element it reads and instruction it applies to
it. Each counts 1, whatever the type and whatever a device needs
for it: a division or a 32-bit integer product takes several steps of a TPU's vector unit, a mask operation less than
one. Matrix products, sorts, scatters and moves (copies, transposes, broadcasts) are left out.

A loop's body counts as often as it runs, here and everywhere but in `bytes_accessed`, which is the compiler's own number.

Left out, too: time. A program of many matrix products is better judged by `flops`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from merging.engine import collectives, products, traffic
from merging.engine.collectives import Collective
from merging.engine.hlo import Instruction, Module, Value

LARGEST = 5  # arrays that are named

ELEMENTWISE = frozenset(
    """
    abs add and atan2 cbrt ceil clamp compare complex convert cosine count-leading-zeros divide erf exponential
    exponential-minus-one floor imag iota is-finite log log-plus-one logistic maximum minimum multiply negate not or
    popcnt power real reduce-precision remainder round-nearest-afz round-nearest-even rsqrt select shift-left
    shift-right-arithmetic shift-right-logical sign sine sqrt stochastic-convert subtract tan tanh xor
    """.split()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """What one program asks of one device.

    Attributes:
      bytes_accessed: read and written by all fusions, in any memory, by the compiler; it counts a loop's body once.
      bytes_touched: read and written in the chip's main memory; see `traffic.py`.
      argument_bytes, output_bytes: of the device's shards, without padding.
      temporary_bytes: held besides arguments and outputs.
      memory_bytes: arguments, outputs, temporaries and code, padding included; donated buffers count once.
      flops: of matrix products; see `products.py`.
      operations: vector operations; see the module's docstring.
      loops: how many loops there are.
      unknown_loops: those whose turns the HLO doesn't tell, which count as one.
      collectives: by kind, e.g. `all-reduce`.
      largest_results: (operation and shape, bytes) of the largest arrays that instructions put into the device's main
        memory: what temporaries and outputs are made of.
      compile_seconds: of the compiler on this machine.
    """

    bytes_accessed: int
    bytes_touched: int
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    memory_bytes: int
    flops: int
    operations: int
    loops: int
    unknown_loops: int
    collectives: Mapping[str, Collective]
    largest_results: Sequence[tuple[str, int]]
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
        bytes_touched=program.bytes_touched,
        argument_bytes=program.argument_bytes,
        output_bytes=program.output_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        memory_bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
        flops=program.flops,
        operations=program.operations,
        loops=program.loops,
        unknown_loops=program.unknown_loops,
        collectives=program.collectives,
        largest_results=program.largest_results,
        compile_seconds=compile_seconds,
    )


def largest(results: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """The LARGEST by bytes, each once."""
    return sorted(dict(results).items(), key=lambda each: -each[1])[:LARGEST]


class Program:
    """Counts over a module of optimized HLO, given as its text. What is sharded is counted for one device."""

    def __init__(self, text: str):
        self._module = Module(text)
        self._known: dict[str, int] = {}  # operations by computation

    @property
    def argument_bytes(self) -> int:
        entry = self._module.computations[self._module.entry].values()
        return sum(i.nbytes for i in entry if i.opcode == "parameter")

    @property
    def output_bytes(self) -> int:
        return self._module.root(self._module.entry).nbytes

    @property
    def operations(self) -> int:
        return self._operations(self._module.entry)

    @property
    def loops(self) -> int:
        return sum(1 for i, _, _ in self._run() if i.opcode == "while")

    @property
    def unknown_loops(self) -> int:
        return sum(
            1
            for i, computation, _ in self._run()
            if i.opcode == "while" and self._module.turns(i, computation) is None
        )

    @property
    def flops(self) -> int:
        return sum(
            times * products.flops(instruction, self._module.computations[computation])
            for instruction, computation, times in self._run()
        )

    @property
    def bytes_touched(self) -> int:
        return traffic.bytes_touched(self._module)

    @property
    def collectives(self) -> dict[str, Collective]:
        return collectives.collectives(self._module)

    @property
    def largest_results(self) -> list[tuple[str, int]]:
        found = traffic.results(self._module)
        return largest((_told(instruction, value), value.nbytes) for instruction, value in found)

    def _run(self) -> Iterator[tuple[Instruction, str, int]]:
        return self._module.run(self._module.entry)

    def _operations(self, computation: str) -> int:
        if computation in self._known:
            return self._known[computation]
        total = 0
        instructions = self._module.computations[computation]
        for instruction in instructions.values():
            if instruction.opcode in ELEMENTWISE:
                total += instruction.result[0].size
            elif instruction.applied:
                size = instructions[instruction.operands[0]].result[0].size
                total += size * self._operations(instruction.applied)
            turns = self._module.turns(instruction, computation) or 1
            total += turns * sum(map(self._operations, instruction.called))
        self._known[computation] = total
        return total


def _told(instruction: Instruction, value: Value) -> str:
    """The operation that the program was traced from, or the compiler's, and the shape on one device."""
    traced = re.search(r'op_name="([^"]*)"', instruction.attributes)
    shape = ",".join(map(str, value.shape))
    return f"{traced[1] if traced else instruction.opcode} {value.dtype}[{shape}]"
