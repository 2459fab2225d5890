"""What a merge will do, known from headers alone, and all that can be wrong about it told before the first byte is written."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from merging import manifest
from merging.checkpoints import FORMATS, check_writable, open_checkpoint, shares
from merging.checkpoints.format import LeafSpec, Reader
from merging.checkpoints.layout_reader import BUFFER_BYTES, LayoutReader
from merging.checkpoints.tied import tied
from merging.checkpoints.tree_writer import OPTIMIZER_STATES
from merging.checkpoints.trees import TreeReader
from merging.engine.compatible import check_compatible, common_rows, with_stacked
from merging.engine.pieces import Tensor, bytes_per_element, parts_of, piece_limit
from merging.engine.selection import Selection, check_tied, names_of
from merging.methods.method import Method
from merging.models import model_file
from merging.models.model_file import ModelFile
from merging.models.trees import in_tree_of
from merging.paths import Stacked

OUTPUT_DTYPES = ("float32", "bfloat16", "float16")
VOCABULARY_ROWS = ("refuse", "common")
MOST_TOLD = 16  # patterns in a plan's text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to merge and how: all that a merge can be told.

    Attributes:
      base, experts: checkpoints' folders; the experts were fine-tuned from the base.
      output_dir: folder to be made. With `methods` each merge is a folder in it.
      method: what to do; or methods: {name: method}, all from one read.
      seed: of the keep masks.
      output_dtype: float32, bfloat16 or float16; None keeps the type of each leaf of the base.
      memory_budget_bytes: for the buffers of this process.
      shard_bytes: most bytes of data in one output file.
      params_path: where the parameters are in the tree of a train state (Orbax, T5X), keys joined by `/`; None finds them.
      format: of the output, a name of `checkpoints.FORMATS`; None keeps the base's.
      optimizer_state: "drop", or "base" to write what the base's train state holds beside its parameters.
      stacked: {pattern of paths: axis over layers}; see `paths.Stacked`. None: what the base's model.json says.
      statistics: share of blocks from which statistics are gathered; 0 gathers none.
      include, exclude: patterns of leaves; what is not included, or excluded, stays as the base has it.
      patterns: {pattern: {setting: value}}: scale, density or weights of some leaves; see `engine.selection`.
      tied: "refuse" checkpoints that lack a leaf; or {leaf: leaf that it is a copy of}.
      vocabulary_rows: "refuse" embeddings of different numbers of rows; or "common": the rows that all have are merged, the
        rest stays as the base has it.
    """

    base: epath.PathLike
    experts: Sequence[epath.PathLike]
    output_dir: epath.PathLike
    method: Method | None = None
    methods: Mapping[str, Method] | None = None
    seed: int = 0
    output_dtype: str | None = None
    memory_budget_bytes: int = 1 << 30
    shard_bytes: int = 5_000_000_000
    params_path: str | None = None
    format: str | None = None
    optimizer_state: str = "drop"
    stacked: Mapping[str, int] | None = None
    statistics: float = 1 / 64
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    patterns: Mapping[str, Mapping[str, Any]] | None = None
    tied: str | Mapping[str, str] = "refuse"
    vocabulary_rows: str = "refuse"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a merge will do; made from headers alone.

    Attributes:
      settings: as they were given.
      format: of the output.
      carry_from: the base's folder, whose config and tokenizer go along where it has them; None where it is a file.
      model: what the base's model.json says, which goes along; None where it has none.
      base, experts: open readers.
      output: the folder to be.
      merges: method by name; a single one is named "".
      outputs: folder by the same names: the output itself for "", else folders in it.
      specs: leaves of the output, in storage order.
      beside: what is written beside them, by names from the root of the output's tree.
      stacked: which leaves hold a layer an index, and along which axis.
      selection: what is merged, and with which settings.
      tensors: of each leaf, those that are merged and those that are kept; none of a leaf that all must share.
      limit: elements of the largest piece.
      workers: threads.
      passes: reads of all inputs that are certain, the merge's own included.
      is_done: the output is there, made from these inputs with these settings.
    """

    settings: Settings
    format: str
    carry_from: epath.Path | None
    model: ModelFile | None
    base: Reader
    experts: tuple[Reader, ...]
    output: epath.Path
    merges: Mapping[str, Method]
    outputs: Mapping[str, epath.Path]
    specs: Mapping[str, LeafSpec]
    beside: Mapping[str, LeafSpec]
    base_specs: Mapping[str, LeafSpec]
    stacked: Stacked
    selection: Selection
    tensors: Mapping[str, Sequence[Tensor]]
    limit: int
    workers: int
    passes: int
    is_done: bool
    identity: Mapping[str, Any]

    @property
    def input_bytes(self) -> int:
        """Of all inputs, as far as they matter, read once."""
        return self.input_bytes_of(self.base_specs)

    def input_bytes_of(self, names: Iterable[str]) -> int:
        """The same of some leaves."""
        experts = [reader.specs() for reader in self.experts]
        total = 0
        for name in names:
            spec = self.base_specs[name]
            kept = sum(t.size - t.first_element for t in self.tensors[name] if t.is_kept)
            itemsizes = sum(specs[name].dtype.itemsize for specs in experts if name in specs)
            total += spec.nbytes + (spec.size - kept) * itemsizes
        return total

    @property
    def output_bytes(self) -> int:
        """Of all outputs."""
        written = [*self.specs.values(), *self.beside.values()]
        return len(self.merges) * sum(spec.nbytes for spec in written)

    def shares(self, process_count: int) -> list[list[str]]:
        """The leaves that each of so many processes would read, merge and write."""
        return shares(
            self.format,
            self.specs,
            shard_bytes=self.settings.shard_bytes,
            process_count=process_count,
        )

    def close(self) -> None:
        """Closes the readers."""
        for reader in (self.base, *self.experts):
            reader.close()

    def _told_patterns(self) -> list[str]:
        lines = [
            f"{'settings':10s} {dict(each)} of {pattern}"
            for pattern, each in self.selection.patterns.items()
        ]
        more = len(lines) - MOST_TOLD
        return lines if more <= 0 else [*lines[:MOST_TOLD], f"{'':10s} ... and {more} more"]

    def describe(self) -> str:
        """The plan as text, one fact a line."""
        parts = [each for each in self.tensors.values() if any(not t.is_kept for t in each)]
        merged = sum(t.size for each in parts for t in each if not t.is_kept)
        lines = [
            f"base       {self.base.location}",
            *(f"expert {i}   {reader.location}" for i, reader in enumerate(self.experts)),
            f"leaves     {len(parts)} merged ({merged:,} parameters),"
            f" {len(self.base_specs) - len(parts)} copied",
            *self._told_patterns(),
            *(
                f"{'merge' if not name else name:10s} {method} -> {self.outputs[name]}"
                for name, method in self.merges.items()
            ),
            f"reads      {self.passes} of {size_text(self.input_bytes)}",
            f"writes     {size_text(self.output_bytes)} of {self.format} as {self.settings.output_dtype or 'the type of each leaf of the base'}",
            *told_beside(self.base, self.beside, self.settings.optimizer_state),
            f"memory     {size_text(self.settings.memory_budget_bytes)}: pieces of {self.limit:,} elements in {self.workers} workers",
        ]
        if self.is_done:
            lines.append(
                "done       the output is there already, made from these inputs with these settings"
            )
        return "\n".join(lines)


def plan(settings: Settings, *, is_elsewhere: bool = False) -> Plan:
    """Checks everything that can be known from headers.

    `is_elsewhere`: the merge will run on other machines, so this one's free space is not asked for.

    Raises ValueError (CheckpointError, OutputError) saying what was found, wanted, where, and what to do.
    """
    merges = _merges(settings.method, settings.methods)
    selection = Selection(settings.include, settings.exclude, settings.patterns or {})
    _check_settings(settings, merges)
    selection.check(merges, len(settings.experts))
    output = epath.Path(settings.output_dir)
    inputs = (settings.base, *settings.experts)
    manifest.check_apart(output, inputs)

    with contextlib.ExitStack() as opened:
        base_reader, *readers = (
            opened.enter_context(
                contextlib.closing(open_checkpoint(path, params_path=settings.params_path))
            )
            for path in inputs
        )
        folder = epath.Path(settings.base)
        described = model_file.read_if_there(folder)
        says_it = settings.stacked is None and described is not None
        stacked = Stacked(described.stacked if says_it else settings.stacked)
        base_specs = with_stacked(base_reader.specs(), stacked)
        buffer_bytes = min(BUFFER_BYTES, settings.memory_budget_bytes // (4 * len(readers)))
        readers = [
            in_tree_of(base_specs, each, folders=(settings.base, path), buffer_bytes=buffer_bytes)
            for each, path in zip(readers, settings.experts, strict=True)
        ]
        rearranged = sum(isinstance(reader, LayoutReader) for reader in readers)
        if settings.tied != "refuse":
            specs_of_all = [base_specs, *(reader.specs() for reader in readers)]
            check_tied(settings.tied, list(dict.fromkeys(itertools.chain(*specs_of_all))))
            readers = [tied(reader, base_specs, settings.tied) for reader in readers]
        rows = common_rows(base_specs, readers) if settings.vocabulary_rows == "common" else {}
        tensors = {
            name: parts_of(
                spec, stacked, lambda t: selection.is_merged(names_of(t)), rows.get(name)
            )
            if spec.is_merged
            else []
            for name, spec in base_specs.items()
        }
        selection.check_used([names_of(t) for each in tensors.values() for t in each])
        kept = {name for name, each in tensors.items() if each and all(t.is_kept for t in each)}
        check_compatible(base_reader, readers, kept=kept, rows=rows, exclude=settings.exclude)
        specs = stored_as(settings.output_dtype, base_specs)
        workers = max(2, os.cpu_count() or 1)
        expert_specs = [reader.specs() for reader in readers]
        limit = piece_limit(
            budget_bytes=settings.memory_budget_bytes - rearranged * buffer_bytes,
            per_element={
                name: bytes_per_element(
                    spec,
                    [of_expert[name] for of_expert in expert_specs if name in of_expert],
                    len(merges),
                    specs[name].dtype.itemsize,
                    workers,
                )
                for name, spec in base_specs.items()
            },
            doing="merge",
            instead=" or merge fewer experts or methods at once",
        )

        output_format = settings.format or base_reader.format
        carry_from = folder if folder.is_dir() else None
        beside = check_writable(
            output_format,
            specs,
            like=base_reader,
            carry_from=carry_from,
            shard_bytes=settings.shard_bytes,
            dtype=settings.output_dtype,
            optimizer_state=settings.optimizer_state,
        )
        identity = {
            "stage": "merge",
            "merges": {name: repr(each) for name, each in merges.items()},
            "seed": settings.seed,
            "output_dtype": settings.output_dtype,
            "shard_bytes": settings.shard_bytes,
            "params_path": settings.params_path,
            "format": output_format,
            "optimizer_state": settings.optimizer_state,
            "stacked": stacked.patterns,
            "statistics": settings.statistics,
            "include": list(settings.include),
            "exclude": list(settings.exclude),
            "patterns": [[name, dict(each)] for name, each in selection.patterns.items()],
            "tied": settings.tied if isinstance(settings.tied, str) else dict(settings.tied),
            "vocabulary_rows": settings.vocabulary_rows,
            "base": base_reader.digest(),
            "experts": [reader.digest() for reader in readers],
        }
        outputs = {name: output / name if name else output for name in merges}
        is_done = manifest.is_done(output, identity)
        if not is_done and not is_elsewhere:
            written = [*specs.values(), *beside.values()]
            manifest.check_free_space(output, len(merges) * sum(spec.nbytes for spec in written))
        asking = [each for each in merges.values() if each.asks_survey]
        planned = Plan(
            settings=settings,
            format=output_format,
            carry_from=carry_from,
            model=described,
            base=base_reader,
            experts=tuple(readers),
            output=output,
            merges=merges,
            outputs=outputs,
            specs=specs,
            beside=beside,
            base_specs=base_specs,
            stacked=stacked,
            selection=selection,
            tensors=tensors,
            limit=limit,
            workers=workers,
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


def _check_settings(settings: Settings, merges: Mapping[str, Method]) -> None:
    """Raises ValueError for what is wrong whatever the inputs hold."""
    if isinstance(settings.experts, str | os.PathLike):
        raise ValueError(f"experts is {settings.experts!r}: give a list of folders")
    if not settings.experts:
        raise ValueError("no experts: EXPERTS is empty; name at least one fine-tuned checkpoint")
    for each in merges.values():
        each.check(len(settings.experts))
        if each.kind == "whole":
            raise ValueError(
                f"{type(each).__name__} needs whole tensors, which the stream does not hand out yet:"
                " use merging.merge_params on parameters in memory"
            )
    if settings.output_dtype is not None and settings.output_dtype not in OUTPUT_DTYPES:
        raise ValueError(
            f"output_dtype is {settings.output_dtype!r}: choose one of {', '.join(OUTPUT_DTYPES)}"
        )
    check_format(settings.format)
    if settings.optimizer_state not in OPTIMIZER_STATES:
        raise ValueError(
            f"OPTIMIZER_STATE is {settings.optimizer_state!r}: choose 'drop' or 'base'"
        )
    if settings.vocabulary_rows not in VOCABULARY_ROWS:
        raise ValueError(
            f"VOCABULARY_ROWS is {settings.vocabulary_rows!r}: choose 'refuse' or 'common'"
        )
    if settings.tied != "refuse" and not isinstance(settings.tied, Mapping):
        raise ValueError(
            f"TIED is {settings.tied!r}: choose 'refuse', or give {{leaf: leaf that it is a copy of}}, such as"
            " {'lm_head.weight': 'model.embed_tokens.weight'}"
        )
    if not 0 <= settings.statistics <= 1:
        raise ValueError(
            f"statistics is {settings.statistics}: the share of blocks to sample, from 0 to 1"
        )
    if not isinstance(settings.seed, int) or isinstance(settings.seed, bool):
        raise ValueError(f"seed is {settings.seed!r}: give an integer")


def check_format(name: str | None) -> None:
    """Raises ValueError for a FORMAT that is none."""
    if name is not None and name not in FORMATS:
        raise ValueError(f"FORMAT is {name!r}: choose one of {', '.join(FORMATS)}")


def told_beside(reader: Reader, beside: Mapping[str, LeafSpec], optimizer_state: str) -> list[str]:
    """What becomes of what a train state holds beside its parameters, in lines of a plan.

    Args:
      reader: of the train state, or of any other checkpoint.
      beside: what is written beside the parameters.
      optimizer_state: as the user chose.
    """
    rest = reader.rest if isinstance(reader, TreeReader) else {}
    kept = {name: spec for name, spec in rest.items() if name in beside}
    dropped = {name: spec for name, spec in rest.items() if name not in beside}
    lines = []
    for doing, specs in (("keeps", kept), ("drops", dropped)):
        if specs:
            names = ", ".join([*specs][:3]) + (", ..." if len(specs) > 3 else "")
            size = size_text(sum(spec.nbytes for spec in specs.values()))
            lines.append(
                f"{doing:10s} {len(specs)} leaves ({size}) beside the parameters: {names}"
                f" (OPTIMIZER_STATE={optimizer_state!r})"
            )
    return lines


def stored_as(output_dtype: str | None, specs: Mapping[str, LeafSpec]) -> dict[str, LeafSpec]:
    """The leaves of an output, float ones in another type; None keeps the type of each."""
    if output_dtype is None:
        return dict(specs)
    dtype = np.dtype(output_dtype)
    return {
        name: dataclasses.replace(spec, dtype=dtype) if spec.is_merged else spec
        for name, spec in specs.items()
    }


def size_text(nbytes: float) -> str:
    """1536 -> `1.5 kB`, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"
