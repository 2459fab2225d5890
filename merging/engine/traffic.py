"""Bytes that a program of optimized HLO reads and writes in a chip's main memory.

Each instruction that runs by itself, a fusion as one, reads its operands and writes its result. Of an operand that is
only sliced or gathered from, what is taken counts, and of one that is updated in place, the update: a scan's turn reads one
layer of a stacked array. What a fusion hands on as it is counts nothing, and a collective that runs beside fusions moves
its bytes where it starts. What lies in on-chip memory counts nothing; a copy to it does. Loops count by their turns.
"""

from __future__ import annotations

from collections.abc import Iterator

from merging.engine import collectives
from merging.engine.hlo import Instruction, Module, Value

# These move nothing: they name, group or steer.
_FREE = frozenset(
    """
    parameter constant get-tuple-element tuple bitcast while conditional call after-all partition-id replica-id
    opt-barrier add-dependency
    """.split()
)


def bytes_touched(module: Module) -> int:
    """Of the whole program, on one device."""
    return _of_computation(module, module.entry)


def results(module: Module) -> Iterator[tuple[Instruction, Value]]:
    """Every array that an instruction that runs by itself puts into the main memory, with that instruction."""
    yield from _results(module, module.entry)


def _results(module: Module, computation: str) -> Iterator[tuple[Instruction, Value]]:
    for instruction in module.computations[computation].values():
        if instruction.opcode in ("while", "conditional", "call"):
            for name in instruction.called:
                yield from _results(module, name)
        elif instruction.opcode not in _FREE and not instruction.opcode.endswith("-start"):
            yield from ((instruction, value) for value in instruction.result if not value.on_chip)


def _of_computation(module: Module, computation: str) -> int:
    total = 0
    for instruction in module.computations[computation].values():
        if instruction.opcode in ("while", "conditional", "call"):
            turns = module.turns(instruction, computation) or 1
            total += turns * sum(_of_computation(module, name) for name in instruction.called)
        elif instruction.opcode not in _FREE and not instruction.opcode.endswith("-done"):
            total += _of_instruction(module, instruction, computation)
    return total


def _of_instruction(module: Module, instruction: Instruction, computation: str) -> int:
    """Operands and result; an asynchronous start has its operand among its results, and counts it once."""
    instructions = module.computations[computation]
    if instruction.opcode == "custom-call" and not instruction.operands:
        return 0  # makes room, and writes nothing
    if (
        instruction.opcode == "fusion"
        and "AsyncCollectiveDone" in _root(module, instruction).attributes
    ):
        return 0
    values = [instructions[name].result for name in instruction.operands if name in instructions]
    if instruction.opcode.endswith("-start"):
        return sum(_main_memory(value) for value in instruction.result)
    read = sum(
        min(sum(map(_main_memory, value)), _read(module, instruction, number, computation))
        for number, value in enumerate(values)
    )
    return read + _written(module, instruction, computation)


def _read(module: Module, instruction: Instruction, operand: int, computation: str) -> int:
    """What an instruction reads of an operand."""
    if instruction.opcode == "fusion":
        (called,) = instruction.called
        return _read_of_parameter(module, called, operand)
    whole = sum(
        v.nbytes for v in module.computations[computation][instruction.operands[operand]].result
    )
    if operand == 0 and instruction.opcode in ("dynamic-slice", "gather", "slice"):
        return min(whole, instruction.nbytes)
    if operand == 0 and instruction.opcode == "dynamic-update-slice":
        return 0
    return whole


def _read_of_parameter(module: Module, computation: str, number: int) -> int:
    instructions = module.computations[computation].values()
    parameter = next(
        i for i in instructions if i.opcode == "parameter" and i.literal == str(number)
    )
    return _read_by_users(module, computation, parameter)


def _read_by_users(module: Module, computation: str, value: Instruction) -> int:
    total = 0
    for user in module.computations[computation].values():
        for operand, name in enumerate(user.operands):
            if name != value.name:
                continue
            if user.opcode == "bitcast":
                total += _read_by_users(module, computation, user)
            elif user.opcode != "tuple" and not _is_handed_on(module, user, computation):
                total += _read(module, user, operand, computation)
    return min(total, value.nbytes) if value.nbytes else total


def _written(module: Module, instruction: Instruction, computation: str) -> int:
    """What an instruction writes to main memory."""
    in_memory = sum(map(_main_memory, instruction.result))
    if instruction.opcode == "dynamic-update-slice":
        update = module.computations[computation][instruction.operands[1]]
        return min(in_memory, update.nbytes)
    if instruction.opcode == "fusion":
        (called,) = instruction.called
        return min(in_memory, _written_by_root(module, called, module.root(called)))
    return in_memory


def _root(module: Module, fusion: Instruction) -> Instruction:
    (called,) = fusion.called
    return module.root(called)


def _is_handed_on(module: Module, instruction: Instruction, computation: str) -> bool:
    """Whether a fusion has an array only to hand it on: one of its parameters, or a collective that it runs beside."""
    root = module.root(computation)
    is_kind = instruction.opcode == "parameter" or instruction.opcode in collectives.KINDS
    return is_kind and root.opcode == "tuple" and instruction.name in root.operands


def _written_by_root(module: Module, computation: str, root: Instruction) -> int:
    instructions = module.computations[computation]
    if root.opcode == "tuple":
        return sum(
            _written_by_root(module, computation, instructions[name]) for name in root.operands
        )
    if root.opcode == "bitcast":
        return _written_by_root(module, computation, instructions[root.operands[0]])
    if root.opcode in ("dynamic-update-slice", "fusion"):
        return _written(module, root, computation)
    return 0 if _is_handed_on(module, root, computation) else root.nbytes


def _main_memory(value: Value) -> int:
    return 0 if value.on_chip else value.nbytes
