r"""Compiles programs for a TPU that need not be there, with its real compiler, and prints what they ask of a chip.

A model's train step, scoring, prefill, decoding step and in-memory merge, on a slice of a pod (launch/compile_model.py):
  python -m launch.compile --model=64b --mesh=v5p-128 --json=compiled.json

The same by gin, where all can be set (gin_configs/runs/compile.gin lists the macros):
  python -m launch.compile --gin_file=gin_configs/models/64b.gin --gin_file=gin_configs/meshes/v5p-128.gin \
    --gin.MeshShape.fsdp=16 --gin.MeshShape.model=4 --gin.PROGRAMS='["train"]'

Below stands how a train step's operations compare with arithmetic's.

It exits with code 1 where a program does not fit, the compiler having refused it or a chip having less memory, and names
the largest arrays: arguments, of a merge the largest leaves, and what is largest inside the program. The others are
compiled and saved nevertheless. Several such reports as one table:
  python -m launch.compile --table=64b.v5p-128.json,64b.v5e-256.json

The merge of each method and its survey passes, for one bfloat16 leaf that is sharded over all chips, without any data:
  python -m launch.compile --topology=v5e:16x16 --shape=66,8192,32768 --experts=8 --methods=ties,dare_ties \
    --json=compiled.json

The leaf is compiled twice: stacked (axis 0 runs over layers) and as one tensor. All figures are of one device. How they
are counted stands in merging/engine/compiled.py; speed is not among them. A merge may touch 1.02 of the bytes that it can't
avoid and communicates nothing, a survey pass 1.05 and communicates counts; beyond that this exits with code 1.

Needs libtpu: pip install 'merging-at-scale[tpu]'.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from launch import command, compile_model, compile_table, devices, gin_config
from launch.topology import described_devices

if TYPE_CHECKING:  # the library brings jax, which --help does without
    from jax.sharding import Mesh, NamedSharding

    from merging.engine.compiled import Figures
    from merging.engine.programs import Program
    from merging.methods.method import Method


def define_flags() -> None:
    """Not at import, since `launch.merge` has a flag --experts of another type."""
    flags.DEFINE_string("topology", "v5e:16x16", "As libtpu names it, e.g. v5e:2x4 or v5p:4x4x4.")
    flags.DEFINE_list("shape", "66,8192,32768", "Shape of the leaf.")
    flags.DEFINE_integer("experts", 8, "How many experts are merged into the base.", lower_bound=1)
    flags.DEFINE_list("methods", None, "Merge methods, with commas between; default all.")
    flags.DEFINE_list(
        "axes",
        None,
        "Which axis of the leaf each dimension of the topology cuts; default the last ones, 1,2 for 16x16.",
    )
    flags.DEFINE_string("model", None, "A file of gin_configs/models without .gin, e.g. 64b.")
    flags.DEFINE_string("mesh", None, "A file of gin_configs/meshes without .gin, e.g. v5p-128.")
    flags.DEFINE_string("json", None, "File to save the figures in; default none.")
    flags.DEFINE_list(
        "table", None, "Saved reports of models: prints them as one table, and compiles nothing."
    )


def main(joined: devices.Processes) -> None:
    """Compiles, prints and saves as the flags say."""
    if joined.count > 1:
        raise ValueError("compiling is one process: leave out the coordinator and the counts")
    values = flags.FLAGS
    if values.table:
        print(compile_table.markdown(values.table))
        return
    is_model = values.model or values.mesh or gin_config.GIN_FILE.value
    report, shortfalls = _of_a_model(values) if is_model else _of_a_leaf(values)
    if values.json:
        pathlib.Path(values.json).write_text(json.dumps(report, indent=1) + "\n")
    if shortfalls:
        raise ValueError("\n  ".join(["not as promised:", *shortfalls]))


def _of_a_model(values: flags.FlagValues) -> tuple[dict[str, Any], list[str]]:
    resolved = compile_model.configured(
        gin_config.GIN_FILE.value,
        gin_config.GIN_BINDINGS.value,
        model=values.model,
        mesh=values.mesh,
        search_paths=gin_config.GIN_SEARCH_PATHS.value,
    )
    report = compile_model.compile_model(**resolved.arguments)
    return {**report, "config": resolved.text}, report["shortfalls"]


def _of_a_leaf(values: flags.FlagValues) -> tuple[dict[str, Any], list[str]]:
    shape = _integers("shape", values.shape)
    methods = _methods(values.methods)
    mesh = described_mesh(values.topology)
    axes = None if values.axes is None else _integers("axes", values.axes)
    sharding = cut(shape, mesh, axes)
    report: dict[str, Any] = {
        "topology": values.topology,
        "device_kind": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "libraries": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        "leaf": {
            "shape": list(shape),
            "dtype": "bfloat16",
            "experts": values.experts,
            "sharding": str(sharding.spec),
            "shape_per_device": list(sharding.shard_shape(shape)),
        },
        "programs": {},
    }
    print(_heading(report), flush=True)
    shortfalls: list[str] = []
    for program in programs(methods, shape, experts=values.experts, sharding=sharding):
        found = program.compile()
        print(_row(program, found), flush=True)
        report["programs"][program.name] = {
            **found.to_json(),
            "most_traffic": program.most_traffic,
            "operations_per_element": found.operations / program.elements,
        }
        shortfalls += program.shortfalls(found)
    return report, shortfalls


def programs(
    methods: Sequence[Method], shape: tuple[int, ...], *, experts: int, sharding: NamedSharding
) -> Iterator[Program]:
    """All that is compiled."""
    import ml_dtypes
    import numpy as np

    from merging.engine.programs import merge_programs

    for stacked in (0, None) if len(shape) > 1 else (None,):
        yield from merge_programs(
            methods,
            shape=shape,
            dtype=np.dtype(ml_dtypes.bfloat16),
            experts=experts,
            sharding=sharding,
            stacked=stacked,
        )


# ---- for what -----------------------------------------------------------------------------------------------------


def described_mesh(topology: str) -> Mesh:
    """A topology's chips as a mesh with an axis for each of its dimensions: x, y, z.

    Raises ValueError where the compiler is absent or does not know the topology.
    """
    import numpy as np
    from jax.experimental import mesh_utils
    from jax.sharding import Mesh

    chips = described_devices(topology)
    dims = tuple(int(size) for size in topology.partition(":")[2].split("x"))
    return Mesh(np.asarray(mesh_utils.create_device_mesh(dims, chips)), tuple("xyz"[: len(dims)]))


def cut(shape: tuple[int, ...], mesh: Mesh, axes: tuple[int, ...] | None) -> NamedSharding:
    """The leaf cut by all axes of the mesh: axes[i] of the leaf by the i-th, the last ones where `axes` is None."""
    from jax.sharding import NamedSharding, PartitionSpec

    dims = mesh.devices.shape
    if axes is None:
        axes = tuple(range(len(shape)))[-len(dims) :]
    if len(axes) != len(dims) or not all(0 <= axis < len(shape) for axis in axes):
        raise ValueError(
            f"a leaf of shape {shape} can't be cut along axes {axes} by a mesh of {dims}: give --axes, one axis of"
            " the leaf for each dimension of the topology"
        )
    parts: list[list[str]] = [[] for _ in shape]
    for axis, name in zip(axes, mesh.axis_names, strict=True):
        parts[axis].append(name)
    for size, names in zip(shape, parts, strict=True):
        if size % math.prod(mesh.shape[name] for name in names):
            raise ValueError(
                f"a leaf of shape {shape} can't be cut evenly along axes {axes} by a mesh of {dims}"
            )
    return NamedSharding(mesh, PartitionSpec(*(tuple(names) or None for names in parts)))


def _methods(names: Sequence[str] | None) -> list[Method]:
    from merging.methods import METHODS

    unknown = [name for name in names or () if name not in METHODS]
    if unknown:
        raise ValueError(
            f"--methods names {', '.join(unknown)}, which is none of {', '.join(METHODS)}"
        )
    return [METHODS[name]() for name in names or METHODS]


def _integers(flag: str, values: Sequence[str]) -> tuple[int, ...]:
    if not values or not all(value.strip().isdigit() for value in values):
        raise ValueError(f"--{flag}={','.join(values)}: give whole numbers with commas between")
    return tuple(int(value) for value in values)


# ---- words --------------------------------------------------------------------------------------------------------

_COLUMNS = "{:<34} {:>11} {:>10} {:>5} {:>11} {:>11} {:>8} {:>8}  {}"


def _heading(report: dict[str, Any]) -> str:
    leaf = report["leaf"]
    return "\n".join(
        [
            f"compiled for {report['topology']}, {report['devices']} x {report['device_kind']}, by libtpu"
            f" {report['libraries']['libtpu']}; all figures are of one device",
            f"leaf  bfloat16 {leaf['shape']}, a base and {leaf['experts']} experts, cut as {leaf['sharding']} into"
            f" {leaf['shape_per_device']}",
            "",
            _COLUMNS.format(
                "program",
                "touched",
                "/minimum",
                "most",
                "temporary",
                "output",
                "ops/el",
                "compile",
                "collectives",
            ),
        ]
    )


def _row(program: Program, found: Figures) -> str:
    from merging.engine.plan import size_text

    collectives = ", ".join(
        f"{each.count} {kind} of {size_text(each.nbytes)} ({', '.join(each.dtypes)})"
        for kind, each in found.collectives.items()
    )
    return _COLUMNS.format(
        program.name,
        size_text(found.bytes_accessed),
        f"{found.traffic:.5f}",
        program.most_traffic,
        size_text(found.temporary_bytes),
        size_text(found.output_bytes),
        f"{found.operations / program.elements:.1f}",
        f"{found.compile_seconds:.1f} s",
        collectives or "none",
    )


if __name__ == "__main__":
    define_flags()
    command.run(main)
