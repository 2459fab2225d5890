"""What a merge will do, known from headers alone, and all that can be wrong about it told before the first byte is written."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from merging import manifest
from merging.checkpoints import open_checkpoint
from merging.checkpoints.format import LeafSpec, Reader
from merging.checkpoints.known_layouts import in_layout_of
from merging.checkpoints.layout_reader import BUFFER_BYTES, LayoutReader
from merging.engine.compatible import check_compatible, with_stacked
from merging.engine.pieces import bytes_per_element, is_interleaved, piece_limit
from merging.methods.method import Method
from merging.paths import Stacked

OUTPUT_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a merge will do; made from headers alone.

    Attributes:
      base, experts: open readers.
      output: the folder to be.
      merges: method by name; a single one is named "".
      outputs: folder by the same names: the output itself for "", else folders in it.
      specs: leaves of the output, in storage order.
      copied: names of the leaves that are copied from the base.
      passes: reads of all inputs that are certain, the merge's own included.
      is_done: the output is there, made from these inputs with these settings.
    """

    base: Reader
    experts: tuple[Reader, ...]
    output: epath.Path
    merges: Mapping[str, Method]
    outputs: Mapping[str, epath.Path]
    specs: Mapping[str, LeafSpec]
    base_specs: Mapping[str, LeafSpec]
    stacked: Stacked
    seed: int
    shard_bytes: int
    output_dtype: str | None
    budget_bytes: int
    limit: int
    workers: int
    statistics: float
    passes: int
    is_done: bool
    identity: Mapping[str, Any]

    @property
    def input_bytes(self) -> int:
        """Of all inputs, read once."""
        return sum(
            spec.nbytes for reader in (self.base, *self.experts) for spec in reader.specs().values()
        )

    @property
    def output_bytes(self) -> int:
        """Of all outputs."""
        return len(self.merges) * sum(spec.nbytes for spec in self.specs.values())

    def close(self) -> None:
        """Closes the readers."""
        for reader in (self.base, *self.experts):
            reader.close()

    def describe(self) -> str:
        """The plan as text, one fact a line."""
        merged = [spec for spec in self.base_specs.values() if spec.is_merged]
        lines = [
            f"base       {self.base.location}",
            *(f"expert {i}   {reader.location}" for i, reader in enumerate(self.experts)),
            f"leaves     {len(merged)} merged ({sum(s.size for s in merged):,} parameters),"
            f" {len(self.base_specs) - len(merged)} copied",
            *(
                f"{'merge' if not name else name:10s} {method} -> {self.outputs[name]}"
                for name, method in self.merges.items()
            ),
            f"reads      {self.passes} of {size_text(self.input_bytes)}",
            f"writes     {size_text(self.output_bytes)} as {self.output_dtype or 'the type of each leaf of the base'}",
            f"memory     {size_text(self.budget_bytes)}: pieces of {self.limit:,} elements in {self.workers} workers",
        ]
        if self.is_done:
            lines.append(
                "done       the output is there already, made from these inputs with these settings"
            )
        return "\n".join(lines)


def plan(
    *,
    base: epath.PathLike,
    experts: Sequence[epath.PathLike],
    output_dir: epath.PathLike,
    method: Method | None = None,
    methods: Mapping[str, Method] | None = None,
    seed: int = 0,
    output_dtype: str | None = None,
    memory_budget_bytes: int = 1 << 30,
    shard_bytes: int = 5_000_000_000,
    stacked: Mapping[str, int] | None = None,
    statistics: float = 1 / 64,
) -> Plan:
    """Checks everything that can be known from headers. Arguments as `merge`.

    Raises ValueError (CheckpointError, OutputError) saying what was found, wanted, where, and what to do.
    """
    merges = _merges(method, methods)
    if isinstance(experts, str | os.PathLike):
        raise ValueError(f"experts is {experts!r}: give a list of folders")
    if not experts:
        raise ValueError("no experts: EXPERTS is empty; name at least one fine-tuned checkpoint")
    for each in merges.values():
        each.check(len(experts))
        if each.kind == "whole":
            raise ValueError(
                f"{type(each).__name__} needs whole tensors, which the stream does not hand out yet:"
                " use merging.merge_params on parameters in memory"
            )
    if output_dtype is not None and output_dtype not in OUTPUT_DTYPES:
        raise ValueError(
            f"output_dtype is {output_dtype!r}: choose one of {', '.join(OUTPUT_DTYPES)}"
        )
    if not 0 <= statistics <= 1:
        raise ValueError(f"statistics is {statistics}: the share of blocks to sample, from 0 to 1")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"seed is {seed!r}: give an integer")
    output = epath.Path(output_dir)
    _check_apart(output, [base, *experts])

    with contextlib.ExitStack() as opened:
        base_reader, *readers = (
            opened.enter_context(contextlib.closing(open_checkpoint(path)))
            for path in (base, *experts)
        )
        patterns = Stacked(stacked)
        base_specs = with_stacked(base_reader.specs(), patterns)
        buffer_bytes = min(BUFFER_BYTES, memory_budget_bytes // (4 * len(readers)))
        readers = [in_layout_of(base_specs, r, buffer_bytes=buffer_bytes) for r in readers]
        check_compatible(base_reader, readers)
        dtype = None if output_dtype is None else np.dtype(output_dtype)
        specs = {
            name: dataclasses.replace(spec, dtype=dtype)
            if dtype is not None and spec.is_merged
            else spec
            for name, spec in base_specs.items()
        }
        workers = max(2, os.cpu_count() or 1)
        rearranged = sum(isinstance(reader, LayoutReader) for reader in readers)
        limit = _limit(
            base_specs,
            readers,
            specs,
            len(merges),
            memory_budget_bytes - rearranged * buffer_bytes,
            workers,
        )
        _check_assembled(base_specs, specs, len(merges), memory_budget_bytes)

        identity = {
            "stage": "merge",
            "merges": {name: repr(each) for name, each in merges.items()},
            "seed": seed,
            "output_dtype": output_dtype,
            "shard_bytes": shard_bytes,
            "stacked": patterns.patterns,
            "statistics": statistics,
            "base": base_reader.digest(),
            "experts": [reader.digest() for reader in readers],
        }
        outputs = {name: output / name if name else output for name in merges}
        is_done = manifest.is_done(output, identity)
        if not is_done:
            _check_free_space(output, len(merges) * sum(spec.nbytes for spec in specs.values()))
        asking = [each for each in merges.values() if each.asks_survey]
        planned = Plan(
            base=base_reader,
            experts=tuple(readers),
            output=output,
            merges=merges,
            outputs=outputs,
            specs=specs,
            base_specs=base_specs,
            stacked=patterns,
            seed=seed,
            shard_bytes=shard_bytes,
            output_dtype=output_dtype,
            budget_bytes=memory_budget_bytes,
            limit=limit,
            workers=workers,
            statistics=statistics,
            passes=1
            + bool(any(m.trim_fraction or m.asks_majority for m in asking))
            + any(m.asks_l1 for m in asking),
            is_done=is_done,
            identity=identity,
        )
        opened.pop_all()  # all is well: the plan's owner closes them
    return planned


def _merges(method: Method | None, methods: Mapping[str, Method] | None) -> dict[str, Method]:
    """The merges by name; "" for a single one."""
    if (method is None) == (not methods):
        raise ValueError(
            "give METHOD (one merge) or METHODS ({name: method}, many from one read): "
            + ("neither is set" if method is None else "both are set")
        )
    for name in methods or ():
        if not name or name in (".", "..") or any(c in name for c in "/\\\0"):
            raise ValueError(
                f"METHODS has a merge named {name!r}: its name becomes a folder's name"
            )
    merges = {"": method} if method is not None else dict(methods)
    for name, each in merges.items():
        if not isinstance(each, Method):
            raise ValueError(f"{name or 'METHOD'} is {each!r}: give a merge method, such as Ties()")
    return merges


def _check_apart(output: epath.Path, inputs: Sequence[epath.PathLike]) -> None:
    """Raises OutputError if the output is, holds or lies in an input."""
    there = os.path.realpath(output)
    for each in inputs:
        here = os.path.realpath(each)
        if os.path.commonpath([here, there]) in (here, there):
            raise manifest.OutputError(
                f"the output {output} and the input {each} are the same folder or one lies in the other: inputs are"
                " never changed; choose another OUTPUT_DIR"
            )


def _check_free_space(output: epath.Path, nbytes: int) -> None:
    """Raises OutputError if the disk is too full for the output (local paths; a bucket has no end)."""
    place = output
    while not os.path.isdir(place):
        if place == place.parent:
            return
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < nbytes:
        raise manifest.OutputError(
            f"the output takes {nbytes:,} bytes and {place} has {free:,} free: make room or choose another OUTPUT_DIR"
        )


def _limit(
    base_specs: Mapping[str, LeafSpec],
    experts: Sequence[Reader],
    specs: Mapping[str, LeafSpec],
    merges: int,
    budget_bytes: int,
    workers: int,
) -> int:
    """Elements of the largest piece that the budget allows, for the widest leaf."""
    expert_specs = [expert.specs() for expert in experts]
    widest, name = max(
        (
            (
                bytes_per_element(
                    spec,
                    [s[name] for s in expert_specs],
                    merges,
                    specs[name].dtype.itemsize,
                    workers,
                ),
                name,
            )
            for name, spec in base_specs.items()
        ),
        default=(1, "nothing"),
    )
    return piece_limit(budget_bytes=budget_bytes, per_element=widest, name=name)


def _check_assembled(
    base_specs: Mapping[str, LeafSpec],
    specs: Mapping[str, LeafSpec],
    merges: int,
    budget_bytes: int,
) -> None:
    """Raises ValueError for a leaf whose layers interleave on disk and that is too large to put together in memory."""
    for name, spec in base_specs.items():
        if is_interleaved(spec):
            needed = merges * math.prod(spec.shape) * specs[name].dtype.itemsize
            if needed > budget_bytes:
                raise ValueError(
                    f"leaf {name} is stacked along axis {spec.stacked}, so its layers interleave in the file and the merged"
                    f" leaf is put together in memory: that takes {needed:,} bytes, more than the budget of"
                    f" {budget_bytes:,}; raise MEMORY_BUDGET_BYTES or merge by fewer methods at once"
                )


def size_text(nbytes: float) -> str:
    """1536 -> `1.5 kB`, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"
