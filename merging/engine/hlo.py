"""Optimized HLO as a compiler prints it, parsed as far as counting needs: computations, instructions, and how often each runs."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator


class Module:
    """A module of optimized HLO, read from its text (`Compiled.as_text()`). One that is sharded is one device's.

    Attributes:
      computations: instructions by name, by the computation's name.
      entry: the name of the computation that is run.
      devices: that the module is for.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self.devices = math.prod(
            int(count)
            for count in re.findall(
                r"\b(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0]
            )
        )
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            head = re.match(r"(ENTRY )?%([\w.\-]+) .*\{$", line)
            if head:
                current = self.computations.setdefault(head[2], {})
                self.entry = head[2] if head[1] else self.entry
            elif line.startswith(" ") and " = " in line:
                instruction = _parse(line)
                current[instruction.name] = instruction
        assert self.entry, "no ENTRY: this is not the text of an HLO module"

    def root(self, computation: str) -> Instruction:
        """The instruction whose result is the computation's."""
        return next(i for i in self.computations[computation].values() if i.is_root)

    def run(self, computation: str, times: int = 1) -> Iterator[tuple[Instruction, str, int]]:
        """Every instruction that a computation leads to, where it stands, and how often it is run. All branches count."""
        for instruction in self.computations[computation].values():
            yield instruction, computation, times
            turns = self.turns(instruction, computation) or 1
            for name in instruction.called:
                yield from self.run(name, times * turns)

    def turns(self, instruction: Instruction, computation: str) -> int | None:
        """How often a loop's body runs; 1 for what is no loop, None for a loop that doesn't tell.

        Some compilers say it. Else it follows from a counter that starts at a constant, grows by a constant and is
        compared with one, which is what scans become.
        """
        if instruction.opcode != "while":
            return 1
        said = re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.attributes)
        if said:
            return int(said[1])
        condition, body = instruction.computation("condition"), instruction.computation("body")
        compare = self.root(condition)
        counter = self._followed(compare.operands[0], condition) if compare.operands else None
        if (
            compare.opcode != "compare"
            or counter is None
            or "direction=LT" not in compare.attributes
        ):
            return None
        end = self._constant(compare.operands[1], condition)
        index = re.search(r"index=(\d+)", counter.attributes)
        if end is None or index is None:
            return None
        start = self._element(instruction.operands[0], computation, int(index[1]))
        step = self._step(body, int(index[1]))
        return None if start is None or not step else -(-(end - start) // step)

    def _followed(self, name: str, computation: str) -> Instruction | None:
        """The instruction that a value comes from, through copies."""
        instruction = self.computations[computation].get(name)
        while instruction and instruction.opcode in ("copy", "bitcast", "copy-start", "copy-done"):
            instruction = self.computations[computation].get(instruction.operands[0])
        return instruction

    def _constant(self, name: str, computation: str) -> int | None:
        found = self._followed(name, computation)
        is_number = found and found.opcode == "constant" and re.fullmatch(r"-?\d+", found.literal)
        return int(found.literal) if is_number else None

    def _element(self, name: str, computation: str, index: int) -> int | None:
        """The constant at an index of a tuple."""
        found = self._followed(name, computation)
        if found is None or found.opcode != "tuple":
            return None
        return self._constant(found.operands[index], computation)

    def _step(self, body: str, index: int) -> int | None:
        """What a turn adds to an element of the loop's state."""
        root = self.root(body)
        added = self._followed(root.operands[index], body) if root.opcode == "tuple" else None
        total = 0
        while added and added.opcode == "add":
            steps = [self._constant(name, body) for name in added.operands]
            if steps.count(None) != 1:
                return None
            total += next(step for step in steps if step is not None)
            added = self._followed(added.operands[steps.index(None)], body)
        is_counter = added and added.opcode == "get-tuple-element"
        return total if is_counter and f"index={index}" in added.attributes else None


@dataclasses.dataclass(frozen=True)
class Value:
    """One array of a result.

    Attributes:
      dtype: in HLO's words, `bf16`.
      shape: of one device's part.
      on_chip: whether it lies in a memory of the chip's own cores; else in its main memory.
    """

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        bits = 8 if self.dtype == "pred" else int((re.search(r"\d+", self.dtype) or "0")[0])
        return (self.size * bits + 7) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `%name = result opcode(operands), attributes`; `literal` is what stands between the parentheses."""

    name: str
    is_root: bool
    result: tuple[Value, ...]
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.result)

    @property
    def called(self) -> list[str]:
        """The computations that it runs as they are; not what a reduction applies to its elements."""
        keys = "calls|body|condition|branch_computations|true_computation|false_computation|called_computations"
        if self.opcode == "call":
            keys += "|to_apply"
        found = re.findall(rf"\b(?:{keys})=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
        return [name for text in found for name in re.findall(r"%([\w.\-]+)", text)]

    def computation(self, role: str) -> str:
        """The computation in a role: `body` or `condition` of a loop."""
        found = re.search(rf"\b{role}=%([\w.\-]+)", self.attributes)
        assert found, f"{self.opcode} {self.name} has no {role}"
        return found[1]

    @property
    def applied(self) -> str | None:
        """The computation that a reduction or a map applies to its elements."""
        found = re.search(r"\bto_apply=%([\w.\-]+)", self.attributes)
        return found[1] if found and self.opcode in ("reduce", "map") else None


def _parse(line: str) -> Instruction:
    root, name, rest = re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", line).groups()
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    opcode, rest = rest.split("(", 1)
    rest = f"({rest}"
    end = _closing(rest)
    values = re.findall(r"\b([a-z]+\d*\w*)\[([\d,<= ]*)\]({[^}]*})?", result)
    return Instruction(
        name=name,
        is_root=bool(root),
        result=tuple(
            Value(dtype, tuple(int(size) for size in re.findall(r"\d+", shape)), "S(" in layout)
            for dtype, shape, layout in values
        ),
        opcode=opcode,
        operands=tuple(re.findall(r"%([\w.\-]+)", rest[:end])),
        literal=rest[1 : end - 1],
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
