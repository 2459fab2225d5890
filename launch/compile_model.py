"""Compiles a model's programs for a TPU slice, and says what each asks of a chip and whether it fits: a part of `launch.compile`.

Train step, scoring, prefill, decoding step, and the merge of a base and its experts in device memory, leaf by leaf as
`merge_params` does it, all with the shardings of `merging/partitioning.py`.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.metadata
import math
import re
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launch import chips, gin_config
from launch.topology import described_devices

if TYPE_CHECKING:  # the library brings jax, which --help does without
    import optax
    from jax.sharding import Mesh, NamedSharding

    from merging.engine.compiled import Figures
    from merging.engine.programs import Program
    from merging.methods.method import Method
    from merging.models.config import DecoderConfig
    from merging.models.decoder import Decoder
    from merging.partitioning import MeshShape
    from merging.training.optimizer import WeightAveraging
    from merging.training.programs import Work

RUN_FILE = "gin_configs/runs/compile.gin"
LARGEST = 5  # arrays of a kind named where a program does not fit


def configured(
    files: Sequence[str],
    bindings: Sequence[str],
    *,
    model: str | None,
    mesh: str | None,
    search_paths: Sequence[str] = (".",),
) -> gin_config.Resolved:
    """What gin files and bindings say, with the files that the short flags name."""
    from merging.training.optimizer import WeightAveraging, adafactor, adamw

    gin_config.register(compile_model, name="compile_model")
    gin_config.register_methods()
    gin_config.register_models()
    gin_config.register_values(adamw, adafactor, WeightAveraging)
    all_files = list(files) if RUN_FILE in files else [RUN_FILE, *files]
    for folder, name in (("models", model), ("meshes", mesh)):
        all_files += [] if name is None else [f"gin_configs/{folder}/{name}.gin"]
    gin_config.parse(all_files, bindings, search_paths=search_paths)
    return gin_config.resolve(compile_model, name="compile_model")


def compile_model(
    *,
    model: DecoderConfig,
    mesh: MeshShape,
    programs: Sequence[str],
    rows: int,
    length: int,
    prompts: int,
    prompt_length: int,
    new_tokens: int,
    experts: int,
    methods: Sequence[Method] | None,
    microbatches: int,
    vocabulary_chunks: int,
    remat: str,
    dtype: str,
    optimizer: optax.GradientTransformation,
    clip_norm: float | None = 1.0,
    frozen: Sequence[str] = (),
    averaging: WeightAveraging | None = None,
) -> dict[str, Any]:
    """Compiles, prints a table, and returns it as JSON, with what does not fit under `shortfalls`.

    Args:
      model: its dtype and remat are replaced by these.
      mesh: with a topology.
      programs: of train, score, prefill, decode, merge.
      others: as in gin_configs/runs/compile.gin.
    """
    from merging.models.families import model_of
    from merging.training.programs import PROGRAMS, Work, model_programs

    started = time.perf_counter()
    unknown = set(programs) - {*PROGRAMS, "merge"}
    if unknown:
        raise ValueError(
            f"PROGRAMS has {', '.join(sorted(unknown))}: known are {', '.join(PROGRAMS)}, merge"
        )
    if mesh.topology is None:
        raise ValueError(
            "MESH has no topology, and nothing can be compiled for it: choose another mesh"
        )
    chip = chips.chip_of(mesh.topology)
    devices = mesh.mesh(described_devices(mesh.topology, slices=mesh.slices))
    network = model_of(dataclasses.replace(model, dtype=dtype, remat=remat))
    work = Work(
        rows=rows,
        length=length,
        prompts=prompts,
        prompt_length=prompt_length,
        new_tokens=new_tokens,
        microbatches=microbatches,
        vocabulary_chunks=vocabulary_chunks,
        clip_norm=clip_norm,
        frozen=tuple(frozen),
        averaging=averaging,
    )
    report: dict[str, Any] = {
        "topology": mesh.topology,
        "slices": mesh.slices,
        "mesh": dict(devices.shape),
        "device_kind": devices.devices.flat[0].device_kind,
        "devices": devices.size,
        "libraries": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        "chip": dataclasses.asdict(chip),
        "parameters": model.num_params(),
        "work": dataclasses.asdict(work),
        "programs": {},
        "shortfalls": [],
    }
    print(_heading(report), flush=True)
    for program in model_programs(network, devices, work, optimizer=optimizer, only=programs):
        _add(
            report,
            program.name,
            _compiled(program),
            chip,
            largest_arguments=program.largest_arguments(LARGEST),
            tokens=program.tokens,
        )
    if "merge" in programs:
        leaves = _leaves(network, devices)
        largest = _largest_leaves(leaves, network.config.activation_dtype.itemsize, experts)
        for name, found in _merges(network, leaves, experts=experts, methods=methods):
            _add(report, name, found, chip, largest_arguments=largest, tokens=None)
    trained = report["programs"].get("train", {})
    if "flops" in trained:
        trained["arithmetic"] = arithmetic(
            network.config, work, flops=trained["flops"] * devices.size
        )
        print(f"\n{_compared(trained, remat)}")
    # In KiB on Linux; this process alone, compiler included.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = time.perf_counter() - started
    report["compiler"] = {"seconds": seconds, "peak_bytes": peak}
    print(f"\ncompiled in {seconds:.0f} s, with at most {_size(peak)} of this machine's memory")
    return report


# ---- programs -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refused:
    """A program that the compiler refused: why, and the largest allocations on one device where it lists them."""

    reason: str
    allocations: Sequence[str]


def _compiled(program: Program) -> Figures | Refused:
    try:
        return program.compile()
    except ValueError as error:
        if "RESOURCE_EXHAUSTED: " not in str(error):
            raise
        first = str(error).partition("RESOURCE_EXHAUSTED: ")[2].splitlines()[0]
        return Refused(reason=f"{first.rstrip('. ')}.", allocations=_allocations(str(error)))


def _allocations(message: str) -> list[str]:
    """What a compiler's message lists as `1. Size: 2.00G`, with the operation and the shape that follow."""
    told = []
    for entry in re.split(r"\n\s*\d+\. Size: ", message)[1:][:LARGEST]:
        operation = re.search(r'op_name="([^"]*)"', entry)
        shape = re.search(r"Shape: (\w+\[[\d,]*\])", entry)
        known = [each[1] for each in (operation, shape) if each]
        told.append(" ".join([*known, entry.split()[0]]))
    return told


# Names of the leaves that are merged by one program, by shape, sharding and the axis over layers.
Leaves = Mapping[tuple[tuple[int, ...], "NamedSharding", int | None], Sequence[str]]


def _leaves(network: Decoder, mesh: Mesh) -> Leaves:
    import jax

    from merging.models.model_file import stacked_of
    from merging.paths import Stacked, of_tree_path
    from merging.training.programs import placed_params

    stacked = Stacked(stacked_of(network.config))
    leaves: dict[Any, list[str]] = collections.defaultdict(list)
    for path, leaf in jax.tree.leaves_with_path(placed_params(network, mesh)):
        name = of_tree_path(path)
        leaves[leaf.shape, leaf.sharding, stacked.axis(name)].append(name)
    return leaves


def _largest_leaves(leaves: Leaves, itemsize: int, experts: int) -> list[tuple[str, int]]:
    """(leaf, bytes on one device of the base's and all experts') of the largest leaves."""
    sizes = [
        (name, (1 + experts) * math.prod(sharding.shard_shape(shape)) * itemsize)
        for (shape, sharding, _), names in leaves.items()
        for name in names
    ]
    return sorted(sizes, key=lambda each: -each[1])[:LARGEST]


def _merges(
    network: Decoder, leaves: Leaves, *, experts: int, methods: Sequence[Method] | None
) -> Iterator[tuple[str, Figures | Refused]]:
    """Each method's merge and survey passes over all leaves: sums, and the largest temporaries.

    Leaves of one shape and sharding are one program, compiled once. A pass is refused if one of its programs is.
    """
    from merging.engine.programs import merge_programs
    from merging.methods import METHODS

    for method in methods or [METHODS[name]() for name in METHODS]:
        totals: dict[str, list[tuple[int, Figures]]] = collections.defaultdict(list)
        refused: dict[str, Refused] = {}
        for (shape, sharding, stacked), names in leaves.items():
            for program in merge_programs(
                [method],
                shape=shape,
                dtype=network.config.activation_dtype,
                experts=experts,
                sharding=sharding,
                stacked=stacked,
            ):
                name = program.name.partition(",")[0]
                each = totals[name]  # in the order of passes, refused ones too
                found = _compiled(program)
                if isinstance(found, Refused):
                    reason = f"{names[0]}: {found.reason}"
                    refused.setdefault(name, dataclasses.replace(found, reason=reason))
                else:
                    each.append((len(names), found))
        for name, each in totals.items():
            yield name, refused[name] if name in refused else _summed(each)


def arithmetic(config: DecoderConfig, work: Work, *, flops: int) -> dict[str, float]:
    """A train step's operations beside what formulas say, over all devices.

    `flops` is what parameters, attention and remat ask for; `ratio` is the program's over that, and `least_ratio` over what
    is left without the products that full remat need not do again.
    """
    from merging.training.curves import flops_per_token, flops_spared_per_token

    each = flops_per_token(config, work.length, remat=config.remat)
    spared = flops_spared_per_token(config) if config.remat == "full" else 0
    tokens = work.rows * work.length
    return {
        "flops": each * tokens,
        "ratio": flops / (each * tokens),
        "least_ratio": flops / ((each - spared) * tokens),
    }


def _summed(each: Sequence[tuple[int, Figures]]) -> Figures:
    """Programs that run one after another, with the arguments and results of all in memory."""
    from merging.engine.collectives import added
    from merging.engine.compiled import largest

    def total(name: str) -> int:
        return sum(count * getattr(found, name) for count, found in each)

    kinds = sorted({kind for _, found in each for kind in found.collectives})
    collectives = {
        kind: added([(n, f.collectives[kind]) for n, f in each if kind in f.collectives])
        for kind in kinds
    }
    temporaries = max(found.temporary_bytes for _, found in each)
    summed = ("argument_bytes", "output_bytes", "bytes_accessed", "bytes_touched", "flops")
    counts = {name: total(name) for name in (*summed, "operations")}
    return dataclasses.replace(
        each[0][1],
        **counts,
        temporary_bytes=temporaries,
        memory_bytes=counts["argument_bytes"] + counts["output_bytes"] + temporaries,
        loops=sum(found.loops for _, found in each),
        unknown_loops=sum(found.unknown_loops for _, found in each),
        collectives=collectives,
        largest_results=largest(array for _, found in each for array in found.largest_results),
        compile_seconds=sum(found.compile_seconds for _, found in each),
    )


# ---- words --------------------------------------------------------------------------------------------------------

_COLUMNS = "| {:<20} | {:>9} | {:>9} | {:>9} | {:>9} | {:>5} | {:>8} | {:>9} | {:>8} | {:<8} | {:>10} | {:>7} | {} |"


def _add(
    report: dict[str, Any],
    name: str,
    found: Figures | Refused,
    chip: chips.Chip,
    *,
    largest_arguments: Sequence[tuple[str, int]],
    tokens: int | None,
) -> None:
    """Prints a program's row, and adds it to the report.

    Args:
      largest_arguments: (name, bytes on one device), told where the program does not fit.
      tokens: that one call reads or writes, over all devices; None where it has none.
    """
    if isinstance(found, Refused):
        report["programs"][name] = {
            "fits": False,
            "reason": found.reason,
            "largest_arguments": largest_arguments,
            "largest_allocations": found.allocations,
        }
        report["shortfalls"].append(
            _shortfall(name, found.reason, largest_arguments, found.allocations)
        )
        print(f"| {name:<20} | does not fit: {found.reason} |", flush=True)
        return
    fits = found.memory_bytes <= chip.memory_bytes
    times = chips.roofline(found, chip)
    tokens_per_s = tokens / times.seconds if tokens else None
    entry = {
        "fits": fits,
        **found.to_json(),
        "roofline": {**dataclasses.asdict(times), "seconds": times.seconds, "bound": times.bound},
        "tokens_per_s": tokens_per_s,
    }
    report["programs"][name] = entry
    if not fits:
        entry["largest_arguments"] = largest_arguments
        reason = (
            f"it needs {_size(found.memory_bytes)} of a chip's {_size(chip.memory_bytes)},"
            f" {_size(found.argument_bytes)} of them arguments and {_size(found.temporary_bytes)} temporaries."
        )
        results = [f"{what} {_size(size)}" for what, size in found.largest_results]
        report["shortfalls"].append(_shortfall(name, reason, largest_arguments, results))
    collectives = ", ".join(
        f"{each.count} {kind} {_size(each.nbytes)}" for kind, each in found.collectives.items()
    )
    print(
        _COLUMNS.format(
            name,
            _size(found.argument_bytes),
            _size(found.temporary_bytes),
            _size(found.output_bytes),
            _size(found.memory_bytes),
            "yes" if fits else "NO",
            f"{found.flops / 1e12:.4g}",
            _size(found.bytes_touched),
            f"{times.seconds:.3g}",
            times.bound,
            "-" if tokens_per_s is None else f"{tokens_per_s:,.0f}",
            f"{found.compile_seconds:.0f} s",
            collectives or "none",
        ),
        flush=True,
    )


def _shortfall(
    name: str, reason: str, arguments: Sequence[tuple[str, int]], results: Sequence[str]
) -> str:
    """Why a program does not fit, and its largest arrays."""
    given = ", ".join(f"{path} {_size(size)}" for path, size in arguments)
    told = f"{name} does not fit: {reason} Its largest arguments: {given}"
    return f"{told}; largest inside: {', '.join(results)}" if results else told


def _compared(trained: Mapping[str, Any], remat: str) -> str:
    """A train step's operations beside arithmetic's, in words."""
    from merging.training.curves import TRAINING_PASSES

    of_parameters, of_attention = TRAINING_PASSES[remat]
    told = trained["arithmetic"]
    text = (
        f"train: its operations are {told['ratio']:.3f} of ({of_parameters} x parameters + {of_attention} x layers x heads"
        " x head size x length) x tokens"
    )
    if told["least_ratio"] == told["ratio"]:
        return text
    return f"{text}, {told['least_ratio']:.3f} without the last products of blocks, which need not be done again"


def _heading(report: Mapping[str, Any]) -> str:
    mesh = ", ".join(f"{name}={size}" for name, size in report["mesh"].items())
    given = {name: value for name, value in report["work"].items() if value not in (None, ())}
    work = ", ".join(
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}"
        for name, value in given.items()
    )
    columns = (
        "program",
        "arguments",
        "temporary",
        "outputs",
        "memory",
        "fits",
        "TFLOP",
        "touched",
        "least s",
        "bound by",
        "tokens/s",
        "compile",
        "collectives",
    )
    return "\n".join(
        [
            f"{report['parameters']:,} parameters, compiled for {report['slices']} x {report['topology']},"
            f" {report['devices']} x {report['device_kind']} with {_size(report['chip']['memory_bytes'])}, by libtpu"
            f" {report['libraries']['libtpu']}",
            f"mesh {mesh}; {work}",
            "Figures are of one chip; tokens/s are of the whole mesh, at the chips' published peaks: a bound, nothing was run.",
            "",
            _COLUMNS.format(*columns),
            "|" + "---|" * len(columns),
        ]
    )


def _size(nbytes: int) -> str:
    from merging.engine.plan import size_text

    return size_text(nbytes)
