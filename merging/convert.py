"""The convert stage: one checkpoint in another format, layout or float type, with the same numbers.

Pieces are read and written by several threads, so memory does not grow with the model. Without an output type
every element keeps its bits. The output appears whole or not at all, with a manifest, and what a run that was killed has
finished is gone on with, as that of a merge.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from merging import manifest
from merging.checkpoints import check_writable, open_checkpoint, open_writer
from merging.checkpoints.format import CheckpointError, LeafSpec, Reader, Writer
from merging.checkpoints.known_layouts import named_layout, parsed
from merging.checkpoints.layout_reader import LayoutReader
from merging.checkpoints.layouts import Layout
from merging.engine import journal
from merging.engine.journal import Journal
from merging.engine.output import Outputs
from merging.engine.pieces import Piece, copied_tensor, piece_limit, pieces_of
from merging.engine.plan import OUTPUT_DTYPES, check_format, size_text, stored_as, told_beside
from merging.engine.resources import PeakResident
from merging.engine.stream import to_float32
from merging.engine.workers import work_on
from merging.models import huggingface, model_file
from merging.models.config import Gemma3Config, LlamaConfig
from merging.models.model_file import ModelFile
from merging.models.trees import as_huggingface, as_model

# Nothing is computed, so pieces are larger than a merge's: fewer calls, and longer runs where leaves are transposed.
PIECE_ELEMENTS = 1 << 22

# Choices of OPTIMIZER_STATE, and what writers call them: the input is what the output is like, as the base is to a merge.
_KEPT = {"drop": "drop", "input": "base"}

Progress = Callable[[str, int, int], None]  # (phase, bytes done, bytes in all)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to convert and how.

    Attributes:
      input: a checkpoint's folder.
      output_dir: folder to be made.
      format: a name of `checkpoints.FORMATS`; None keeps the input's, or makes a Hugging Face folder of that layout.
      layout: a Layout, or a name of `known_layouts.LAYOUTS` with options, such as "stacked(axis=1)"; or one of a model's two
        trees: "huggingface", or our "own" ("own(scan_layers=False)"). None keeps the input's.
      params_path: where the parameters lie in a train state.
      optimizer_state: "drop", or "input" to write what the input's train state holds beside its parameters, as it is.
      output_dtype: float32, bfloat16 or float16 for float leaves; None keeps the type of each.
      memory_budget_bytes: for the buffers of this process.
      shard_bytes: most bytes of data in one output file, for formats that have files of several leaves.
    """

    input: epath.PathLike
    output_dir: epath.PathLike
    format: str | None = None
    layout: str | Layout | None = None
    params_path: str | None = None
    optimizer_state: str = "drop"
    output_dtype: str | None = None
    memory_budget_bytes: int = 1 << 30
    shard_bytes: int = 5_000_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a conversion will do; made from headers alone.

    Attributes:
      settings: as they were given.
      reader: open, gives leaves in the output's layout.
      stored: what it reads, in the input's layout.
      folder: of the input, whose config and tokenizer go along; None where it has none.
      model: what the output's model.json says; None where it has none.
      config: what the output's config.json says, where the layout is Hugging Face's; None elsewhere.
      carries_config: the input's config.json says that already.
      format: of the output.
      layout: name of the layout that is applied, or None.
      specs: leaves of the output, in storage order.
      beside: what is written beside them, by names from the root of the output's tree.
      limit: elements of the largest piece.
      workers: threads that read.
      is_done: the output is there, made from this input with these settings.
    """

    settings: Settings
    reader: Reader
    stored: Reader
    folder: epath.Path | None
    model: ModelFile | None
    config: LlamaConfig | Gemma3Config | None
    carries_config: bool
    output: epath.Path
    format: str
    layout: str | None
    specs: Mapping[str, LeafSpec]
    beside: Mapping[str, LeafSpec]
    limit: int
    workers: int
    is_done: bool
    identity: Mapping[str, Any]

    @property
    def stacked(self) -> Mapping[str, int]:
        """The output's stacked leaves: {pattern of paths: axis over layers}."""
        return _stacked(self.specs) if self.model is None else self.model.stacked

    @property
    def dtype(self) -> str | None:
        """The float type that the output's config.json names; None: as the input's does."""
        return _named_dtype(self.settings, self.config)

    @property
    def nbytes(self) -> int:
        """Of the output's leaves, without what is beside them."""
        return sum(spec.nbytes for spec in self.specs.values())

    def close(self) -> None:
        self.reader.close()

    def describe(self) -> str:
        """The plan as text, one fact a line."""
        found = self.reader.specs()
        stacked = sum(spec.stacked is not None for spec in found.values())
        read = sum(spec.nbytes for spec in found.values())
        kept = self.beside if self.layout is None else {}  # a layout knows the parameters alone
        lines = [
            f"input      {self.settings.input}",
            f"output     {self.output}",
            f"format     {self.format}",
            f"layout     {self.layout or 'as it is'}: {len(self.specs)} leaves, {stacked} stacked",
            f"reads      {size_text(read)}",
            f"writes     {size_text(self.nbytes)} as {self.settings.output_dtype or 'the type of each leaf'}",
            *told_beside(self.stored, kept, self.settings.optimizer_state),
            f"memory     {size_text(self.settings.memory_budget_bytes)}: pieces of {self.limit:,} elements in"
            f" {self.workers} workers",
        ]
        if self.is_done:
            lines.append("done       the output is there already, made from this input so")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a conversion did.

    Attributes:
      output: the folder.
      seconds: of the stage.
      nbytes: written, of leaves.
      peak_resident_bytes: highest RssAnon + RssShmem seen.
      was_done: nothing was done, the output was there.
    """

    output: epath.Path
    seconds: float
    nbytes: int
    peak_resident_bytes: int
    was_done: bool

    def describe(self) -> str:
        """The report as text."""
        if self.was_done:
            return f"done before: {self.output}"
        rate = size_text(self.nbytes / max(self.seconds, 1e-9))
        return "\n".join(
            [
                f"written    {self.output}",
                f"time       {self.seconds:.2f} s",
                f"bytes      {size_text(self.nbytes)} written, {rate}/s",
                f"memory     {size_text(self.peak_resident_bytes)} resident at most",
            ]
        )


def convert(
    settings: Settings,
    *,
    config_text: str = "",
    progress: Progress | None = None,
    log: Callable[[str], None] | None = None,
) -> Report:
    """Plans and does a conversion.

    Raises ValueError for everything that is wrong with settings and input, OSError for what fails on the way; nothing has
    appeared under the output's name then. A second call with the same settings and input returns at once; one after a call that
    was killed or failed goes on from there.
    """
    return run(plan(settings), config_text=config_text, progress=progress, log=log)


def plan(settings: Settings) -> Plan:
    """Checks everything that can be known from headers.

    Raises ValueError (CheckpointError, OutputError) saying what was found, wanted, where, and what to do.
    """
    check_format(settings.format)
    if settings.output_dtype is not None and settings.output_dtype not in OUTPUT_DTYPES:
        raise ValueError(
            f"OUTPUT_DTYPE is {settings.output_dtype!r}: choose one of {', '.join(OUTPUT_DTYPES)}"
        )
    if settings.optimizer_state not in _KEPT:
        raise ValueError(
            f"OPTIMIZER_STATE is {settings.optimizer_state!r}: choose 'drop' or 'input'"
        )
    if settings.optimizer_state != "drop" and settings.layout is not None:
        raise ValueError(
            "OPTIMIZER_STATE='input' and LAYOUT: the optimizer's arrays would stay in the layout that the parameters had;"
            " use OPTIMIZER_STATE='drop', or no LAYOUT"
        )
    output = epath.Path(settings.output_dir)
    manifest.check_apart(output, [settings.input])
    with contextlib.ExitStack() as opened:
        opening = open_checkpoint(settings.input, params_path=settings.params_path)
        reader: Reader = opened.enter_context(contextlib.closing(opening))
        stored = reader
        path = epath.Path(settings.input)
        folder = path if path.is_dir() else None
        described = None if folder is None else model_file.read_if_there(folder)
        budget, config = settings.memory_budget_bytes, None
        layout, output_format = settings.layout, settings.format or reader.format
        # Of the budget, a quarter: transposed leaves read through it, all others don't.
        buffer_bytes = 0 if layout is None else budget // 4
        budget -= buffer_bytes
        if isinstance(layout, str) and parsed(layout)[0] == "own":
            reader, described = _as_own(reader, layout, path, settings.output_dtype, buffer_bytes)
        elif isinstance(layout, str) and parsed(layout)[0] == "huggingface":
            reader, config = _as_huggingface(
                reader, layout, path, settings.output_dtype, buffer_bytes
            )
            described, output_format = None, settings.format or "safetensors"
        elif layout is not None:
            if isinstance(layout, str):
                layout = named_layout(layout, reader.specs())
            reader = LayoutReader(reader, layout, buffer_bytes=buffer_bytes)
            if described is not None:
                described = dataclasses.replace(described, stacked=_stacked(reader.specs()))
        specs = stored_as(settings.output_dtype, reader.specs())
        beside = check_writable(
            output_format,
            specs,
            like=reader,
            carry_from=folder,
            shard_bytes=settings.shard_bytes,
            dtype=_named_dtype(settings, config),
            optimizer_state=_KEPT[settings.optimizer_state],
        )
        identity = {
            "stage": "convert",
            "input": reader.digest(),
            "format": output_format,
            "params_path": settings.params_path,
            "optimizer_state": settings.optimizer_state,
            "output_dtype": settings.output_dtype,
            "shard_bytes": settings.shard_bytes,
        }
        is_done = manifest.is_done(output, identity)
        if not is_done:
            written = [*specs.values(), *beside.values()]
            manifest.check_free_space(output, sum(spec.nbytes for spec in written))
        workers = max(2, os.cpu_count() or 1)
        planned = Plan(
            settings=settings,
            reader=reader,
            stored=stored,
            folder=folder,
            model=described,
            config=config,
            carries_config=config is None or huggingface.says(path, config),
            output=output,
            format=output_format,
            layout=layout.name if isinstance(layout, Layout) else layout,
            specs=specs,
            beside=beside,
            limit=piece_limit(
                budget_bytes=budget,
                # In each worker what is read, what is rearranged and what is written.
                per_element={
                    name: workers * (2 * spec.dtype.itemsize + specs[name].dtype.itemsize)
                    for name, spec in reader.specs().items()
                },
                doing="convert",
                most=PIECE_ELEMENTS,
            ),
            workers=workers,
            is_done=is_done,
            identity=identity,
        )
        opened.pop_all()  # all is well: the plan's owner closes it
    return planned


def _stacked(specs: Mapping[str, LeafSpec]) -> dict[str, int]:
    return {name: spec.stacked for name, spec in specs.items() if spec.stacked is not None}


def _as_own(
    reader: Reader, layout: str, folder: epath.Path, dtype: str | None, buffer_bytes: int
) -> tuple[Reader, ModelFile]:
    """The reader in the model's own tree, and what model.json says of that."""
    described = _described(layout, folder, "scan_layers")
    reader = as_model(reader, described.config, buffer_bytes=buffer_bytes)
    stored = reader.specs()[huggingface.OWN_EMBEDDING].dtype.name
    config = dataclasses.replace(described.config, param_dtype=dtype or stored)
    stacked = model_file.stacked_of(config)
    return reader, dataclasses.replace(described, config=config, stacked=stacked)


def _as_huggingface(
    reader: Reader, layout: str, folder: epath.Path, dtype: str | None, buffer_bytes: int
) -> tuple[Reader, LlamaConfig | Gemma3Config]:
    """The reader in Hugging Face's tree, and what config.json has to say of that."""
    config = _described(layout, folder).config
    reader = as_huggingface(reader, config, buffer_bytes=buffer_bytes)
    stored = reader.specs()[huggingface.EMBEDDING].dtype.name
    return reader, dataclasses.replace(config, param_dtype=dtype or stored)


def _described(layout: str, folder: epath.Path, *known: str) -> ModelFile:
    """What the input says of its model, with the layout's options, fields of the configuration, in place of its own."""
    options = parsed(layout)[1]
    if options.keys() - known:
        raise ValueError(f"LAYOUT {layout!r}: its options are {', '.join(known) or 'none'}")
    if not model_file.is_described(folder):
        raise CheckpointError(
            f"LAYOUT {layout!r} takes the model's sizes from a model.json or config.json in {folder}, and neither is there:"
            " give the folder that holds it, or copy it there"
        )
    return model_file.describe(folder, **options)


def _named_dtype(settings: Settings, config: LlamaConfig | Gemma3Config | None) -> str | None:
    return settings.output_dtype if config is None else config.param_dtype


def run(
    planned: Plan,
    *,
    config_text: str = "",
    progress: Progress | None = None,
    log: Callable[[str], None] | None = None,
) -> Report:
    """Does what was planned and closes the plan's reader; errors as `convert`."""
    started = time.perf_counter()
    peak = PeakResident()
    was_done = planned.is_done
    with (
        contextlib.closing(planned),
        contextlib.closing(manifest.Staging(planned.output)) as staging,
    ):
        was_done = was_done or staging.is_whole(planned.identity)
        if not was_done:
            staging.resume(planned.identity, if_there=journal.file_of(staging.folder, 0))
            log = log or (lambda _: None)
            with journal.kept(
                staging, planned.identity, [planned.reader], limit=planned.limit, log=log
            ) as kept:
                written = _write(planned, staging, kept, peak, progress or (lambda *_: None), log)
                seconds = round(time.perf_counter() - started, 3)
                staging.commit(
                    {
                        **_provenance(planned),
                        **written,
                        "config": config_text,
                        "seconds": seconds,
                        "peak_resident_bytes": peak.nbytes,
                    }
                )
    peak.look()
    return Report(
        output=planned.output,
        seconds=time.perf_counter() - started,
        nbytes=0 if was_done else planned.nbytes,
        peak_resident_bytes=peak.nbytes,
        was_done=was_done,
    )


def _write(
    planned: Plan,
    staging: manifest.Staging,
    kept: Journal,
    peak: PeakResident,
    progress: Progress,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Writes all leaves, and what goes along; returns what the manifest says of them."""
    with _writer(planned, staging.folder, is_resumed=kept.is_resumed) as writer:
        outputs = Outputs({"": writer}, kept)

        def pieces() -> Iterator[Piece]:
            for name in writer.names_mine:
                yield from pieces_of(copied_tensor(planned.specs[name]), kept.limit)

        there = outputs.look(pieces())
        if there.finished:
            log(f"resuming: {there.finished:,} of {there.pieces:,} pieces are there")
        total = int(planned.nbytes * (1 - there.share))

        def report() -> None:
            peak.look()
            kept.flush_now_and_then()
            progress("convert", outputs.nbytes, total)

        def work(piece: Piece) -> None:
            if outputs.keep(piece) is None:
                outputs.put(piece, [_read(planned, piece)])

        work_on(pieces(), work, lambda _: None, workers=planned.workers, while_running=report)
        kept.flush()
        planned.reader.check_unchanged()
        writer.commit()
    dtype = planned.settings.output_dtype
    if planned.model is not None:
        model_file.write_along(staging.folder, planned.model, dtype=dtype, stacked=planned.stacked)
    if not planned.carries_config:
        huggingface.write_config(staging.folder, planned.config)
    return {
        **outputs.each[""].recorded(),
        "pieces": outputs.pieces,
        "pieces_resumed": outputs.kept,
    }


@contextlib.contextmanager
def _writer(planned: Plan, folder: epath.Path, *, is_resumed: bool) -> Iterator[Writer]:
    """The writer of the output's format; what it wrote stays if anything fails."""
    writer = open_writer(
        planned.format,
        folder,
        planned.specs,
        like=planned.reader,
        carry_from=planned.folder,
        shard_bytes=planned.settings.shard_bytes,
        dtype=planned.dtype,
        optimizer_state=_KEPT[planned.settings.optimizer_state],
        is_resumed=is_resumed,
    )
    try:
        yield writer
    except BaseException:
        writer.close()
        raise


def _read(planned: Plan, piece: Piece) -> np.ndarray:
    """A piece in the output's type, in the piece's shape."""
    name = piece.tensor.leaf.name
    array = planned.reader.read(name, piece.index)
    dtype = planned.specs[name].dtype
    if array.dtype == dtype:
        return array
    flat = array.reshape(-1)  # numpy makes numbers of arrays without dimensions
    if dtype == np.float32 and array.dtype != np.float64:
        return to_float32(flat).reshape(array.shape)
    with np.errstate(over="ignore", under="ignore"):  # told below, and by name
        narrow = flat.astype(dtype)
    overflowed = np.isinf(narrow) & ~np.isinf(flat)
    if overflowed.any():
        raise ValueError(
            f"leaf {name}: {overflowed.sum():,} of {flat.size:,} elements at {piece.index} are too large for {dtype}; choose"
            " a wider OUTPUT_DTYPE"
        )
    return narrow.reshape(array.shape)


def _provenance(planned: Plan) -> dict[str, Any]:
    path, digest = os.fspath(planned.settings.input), planned.reader.digest()
    return {
        **manifest.provenance(planned.identity),
        "inputs": {"input": {"path": path, "digest": digest}},
        "format": planned.format,
        "layout": planned.layout,
        "stacked": dict(planned.stacked),
    }
