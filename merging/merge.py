"""The merge stage: base + N experts -> merged checkpoints, disk to disk, all methods from one read.

Everything is checked before the first byte is written (`engine.plan`); the output appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from merging import manifest
from merging.checkpoints import safetensors
from merging.checkpoints.format import LeafSpec
from merging.engine import hosts
from merging.engine.groups import group_by_scale, without_scale
from merging.engine.output import LeafOutput, is_finite
from merging.engine.pieces import Piece, Tensor, pieces_of, tensors_of
from merging.engine.plan import Plan, plan, size_text
from merging.engine.resources import PeakResident
from merging.engine.statistics import Statistics, gather
from merging.engine.step import Facts, in_worker, merge_step
from merging.engine.stream import LoadedPiece, Stream
from merging.engine.survey import MethodSurvey, survey
from merging.methods.method import Method, TaskVectorMethod

merge_in_worker = in_worker(merge_step, "geometry", "out_dtype")

STATISTICS_FILE = "statistics.json"

Progress = Callable[[str, int, int], None]  # (phase, bytes done, bytes in all)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a merge did.

    Attributes:
      outputs: folder by name of the merge.
      seconds: of the stage.
      bytes_read, bytes_written: by this host, in passes over the inputs.
      bytes_sampled: read before the first pass, to propose brackets.
      storage_seconds: what the same reads and writes took by themselves, spread over the workers.
      peak_resident_bytes: highest RssAnon + RssShmem seen.
      reads: how often all inputs were read.
      was_done: nothing was done, the output was there.
    """

    outputs: Mapping[str, epath.Path]
    seconds: float
    bytes_read: int
    bytes_written: int
    bytes_sampled: int
    storage_seconds: float
    peak_resident_bytes: int
    reads: int
    was_done: bool

    def describe(self) -> str:
        """The report as text."""
        where = ", ".join(str(folder) for folder in self.outputs.values())
        if self.was_done:
            return f"done before: {where}"
        share = self.storage_seconds / self.seconds if self.seconds else 0.0
        return "\n".join(
            [
                f"written    {where}",
                f"time       {self.seconds:.2f} s, {self.reads} reads of the inputs",
                f"bytes      {size_text(self.bytes_read)} read (and {size_text(self.bytes_sampled)} sampled),"
                f" {size_text(self.bytes_written)} written,"
                f" {size_text(int((self.bytes_read + self.bytes_written) / max(self.seconds, 1e-9)))}/s",
                f"bound      storage alone took {self.storage_seconds:.2f} s, {share:.0%} of the time",
                f"memory     {size_text(self.peak_resident_bytes)} resident at most",
            ]
        )


def merge(
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
    config_text: str = "",
    progress: Progress | None = None,
    log: Callable[[str], None] | None = None,
) -> Report:
    """Merges the experts into the base and writes the result.

    Args:
      base, experts: checkpoints' folders; the experts were fine-tuned from the base.
      output_dir: folder to be made. With `methods` each merge is a folder in it.
      method: what to do; or methods: {name: method}, all from one read.
      seed: of the keep masks.
      output_dtype: float32, bfloat16 or float16; None keeps the type of each leaf of the base.
      memory_budget_bytes: for the buffers of this process.
      shard_bytes: most bytes of data in one output file.
      stacked: {pattern of paths: axis over layers}; see `paths.Stacked`.
      statistics: share of blocks from which statistics are gathered; 0 gathers none.
      config_text: the configuration as it was resolved, kept in the manifest.
      progress: told (phase, bytes done, bytes in all) after each piece.
      log: told of each phase in words.

    Returns:
      What was done. A second call with the same arguments and inputs returns at once.

    Raises ValueError for everything that is wrong with arguments and inputs, OSError for what fails on the way; nothing
    has appeared under the output's name then.
    """
    planned = plan(
        base=base,
        experts=experts,
        output_dir=output_dir,
        method=method,
        methods=methods,
        seed=seed,
        output_dtype=output_dtype,
        memory_budget_bytes=memory_budget_bytes,
        shard_bytes=shard_bytes,
        stacked=stacked,
        statistics=statistics,
    )
    return run(planned, config_text=config_text, progress=progress, log=log)


def run(
    planned: Plan,
    *,
    config_text: str = "",
    progress: Progress | None = None,
    log: Callable[[str], None] | None = None,
) -> Report:
    """Does what was planned and closes the plan's readers; arguments and errors as `merge`."""
    try:
        return _Run(planned, progress or (lambda *_: None), log or (lambda _: None)).run(
            config_text
        )
    finally:
        planned.close()


class _Run:
    """One merge under way."""

    def __init__(self, planned: Plan, progress: Progress, log: Callable[[str], None]):
        self.started = time.perf_counter()
        self.plan = planned
        self.log = log
        self.progress = progress
        self.merged = [s for s in planned.base_specs.values() if s.is_merged]
        self.tensors = {s.name: tensors_of(s, planned.stacked) for s in self.merged}
        self.stream = Stream(
            planned.base,
            planned.experts,
            seed=planned.seed,
            limit=planned.limit,
            workers=planned.workers,
        )
        self.peak = PeakResident()
        self.write_seconds = 0.0
        self.written = 0
        self.reads = 0

    def run(self, config_text: str) -> Report:
        plan = self.plan
        if plan.is_done:
            return self._report(was_done=True)
        staging = manifest.Staging(plan.output)
        if hosts.is_main():
            staging.create(plan.identity)
        hosts.wait_for_all("staging is there")
        try:
            with self._writers(staging.folder) as writers:
                mine = self._mine(writers)
                surveys = self._survey(mine)
                statistics = self._merge(mine, surveys, writers)
                for reader in (plan.base, *plan.experts):
                    reader.check_unchanged()
                self._commit_weights(writers)
            self._finish(staging, writers, statistics, config_text)
        except BaseException:
            if jax.process_count() == 1:
                staging.discard()
            raise
        return self._report(was_done=False)

    # ---- which leaves are this host's ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _writers(self, folder: epath.Path) -> Iterator[dict[str, safetensors.Writer]]:
        """One writer per merge, each with this host's shards; what they wrote is removed if anything fails."""
        plan, processes = self.plan, jax.process_count()
        total = sum(spec.nbytes for spec in plan.specs.values())
        # Shards are what hosts share out among themselves, so there must be enough of them.
        shard_bytes = min(plan.shard_bytes, max(1, -(-total // processes)))
        shards = safetensors.plan_shards(plan.specs, shard_bytes)
        mine = [i for i in range(len(shards)) if i % processes == jax.process_index()]
        writers: dict[str, safetensors.Writer] = {}
        try:
            for name in plan.merges:
                target = folder / name if name else folder
                target.mkdir(parents=True, exist_ok=True)
                writers[name] = safetensors.Writer(
                    target,
                    plan.specs,
                    shard_bytes=shard_bytes,
                    carry_from=plan.base.folder,
                    shards_mine=mine,
                    is_main=hosts.is_main(),
                    config_dtype=plan.output_dtype,
                )
            yield writers
        except BaseException:
            for writer in writers.values():
                writer.abort()
            raise

    def _mine(self, writers: Mapping[str, safetensors.Writer]) -> list[LeafSpec]:
        """This host's leaves, in the order in which the writers want them."""
        writer = next(iter(writers.values()))
        return [self.plan.base_specs[name] for name in writer.names_mine]

    # ---- first pass ------------------------------------------------------------------------------------------------

    def _survey(self, mine: Sequence[LeafSpec]) -> dict[Method, MethodSurvey]:
        """What the methods ask, each distinct question once: merges that differ in scale share it."""
        questions = {without_scale(m): None for m in self.plan.merges.values() if m.asks_survey}
        if not questions:
            return {}
        tensors = [tensor for spec in self.merged for tensor in self.tensors[spec.name]]
        tensors_mine = [t for spec in mine if spec.is_merged for t in self.tensors[spec.name]]
        found, self.reads = survey(
            list(questions),
            self._counted("survey"),
            tensors,
            tensors_mine,
            combine=hosts.combine,
            log=self.log,
        )
        return dict(zip(questions, found, strict=True))

    def _counted(self, phase: str) -> Stream:
        """The stream, reporting what it reads to `progress` under this name."""
        total = self.plan.input_bytes // jax.process_count()
        start = self.stream.bytes_read

        def after_piece() -> None:
            self.peak.look()
            self.progress(phase, min(self.stream.bytes_read - start, total), total)

        self.stream.after_piece = after_piece
        return self.stream

    # ---- second pass -----------------------------------------------------------------------------------------------

    def _merge(
        self,
        mine: Sequence[LeafSpec],
        surveys: Mapping[Method, MethodSurvey],
        writers: Mapping[str, safetensors.Writer],
    ) -> dict[str, Statistics]:
        """Reads everything once more and writes every output; returns the statistics of this host's leaves."""
        stream = self._counted("merge")
        self.reads += 1
        self.log(
            "reading all inputs and writing " + (", ".join(n for n in writers if n) or "the merge")
        )
        groups, names = group_by_scale(self.plan.merges)
        asking = [surveys.get(without_scale(group.method)) for group in groups]
        ordered = list(writers)
        place = [names[name] for name in ordered]  # of each merge's output among the step's
        methods = [
            m if isinstance(m, TaskVectorMethod) else None for m in self.plan.merges.values()
        ]

        def work(loaded: LoadedPiece) -> tuple[Piece, list[np.ndarray], Statistics | None]:
            facts = tuple(Facts() if s is None else s.facts(loaded.tensor) for s in asking)
            dtype = self.plan.specs[loaded.tensor.leaf.name].dtype
            base, experts = loaded.on_devices()
            outputs = merge_in_worker(
                groups,
                facts,
                base,
                experts,
                loaded.keys,
                loaded.offset,
                geometry=loaded.geometry,
                out_dtype=np.dtype(np.float32) if dtype == np.float64 else dtype,
            )
            outputs = [np.asarray(outputs[i])[: loaded.size] for i in place]
            if not all(is_finite(output) for output in outputs):
                stream.blame_not_finite(loaded)
            found = None
            if self.plan.statistics > 0:
                by_merge = [
                    Facts()
                    if (s := surveys.get(without_scale(m))) is None
                    else s.facts(loaded.tensor)
                    for m in self.plan.merges.values()
                ]
                found = gather(loaded, methods, by_merge, self.plan.statistics)
            if dtype == np.float64:
                outputs = [output.astype(dtype) for output in outputs]
            return loaded.piece, outputs, found

        statistics: dict[str, Statistics] = {}
        for leaf_run in _runs_of_kind(mine):
            if not leaf_run[0].is_merged:
                for leaf in leaf_run:
                    self._copy(leaf, writers)
                continue
            tensors = [tensor for leaf in leaf_run for tensor in self.tensors[leaf.name]]
            sinks = [LeafOutput(writers[name], self.plan.specs) for name in ordered]
            for piece, outputs, found in stream.run(tensors, work):
                begun = time.perf_counter()
                for sink, output in zip(sinks, outputs, strict=True):
                    sink.put(piece, output)
                self.write_seconds += time.perf_counter() - begun
                if found is not None:
                    name = piece.tensor.leaf.name
                    if name not in statistics:
                        statistics[name] = Statistics(len(self.plan.experts), len(ordered))
                    statistics[name].add(found)
        return statistics

    def _copy(self, leaf: LeafSpec, writers: Mapping[str, safetensors.Writer]) -> None:
        """Copies a leaf that is not merged, after seeing that all experts share it."""
        whole = Tensor(dataclasses.replace(leaf, stacked=None), None, leaf.name)
        for piece in pieces_of(whole, self.plan.limit):
            array = self.stream.read_copied(leaf, piece)
            for writer in writers.values():
                writer.write(leaf.name, piece.index, array)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def _commit_weights(self, writers: Mapping[str, safetensors.Writer]) -> None:
        begun = time.perf_counter()
        for writer in writers.values():
            writer.commit()
            self.written += sum(file["bytes"] for file in writer.files.values())
        self.write_seconds += time.perf_counter() - begun

    def _finish(
        self,
        staging: manifest.Staging,
        writers: Mapping[str, safetensors.Writer],
        statistics: Mapping[str, Statistics],
        config_text: str,
    ) -> None:
        """Gathers what all hosts know, writes statistics and manifests, and lets the output appear."""
        plan = self.plan
        files = hosts.gather_json(
            {n: {"files": w.files, "leaves": w.checksums} for n, w in writers.items()}
        )
        statistics = hosts.gather_json(
            {name: s.to_vector().tolist() for name, s in statistics.items()}
        )
        if hosts.is_main():
            known = {
                name: Statistics.from_vector(
                    np.array(vector), len(plan.experts), len(writers)
                ).scaled_to_all()
                for host in statistics
                for name, vector in host.items()
            }
            shared = {
                **self._provenance(),
                "identity": plan.identity,
                "identity_digest": manifest.digest(plan.identity),
                "config": config_text,
            }
            for number, (name, method) in enumerate(plan.merges.items()):
                folder = staging.folder / name if name else staging.folder
                if plan.statistics > 0:
                    self._write_statistics(folder / STATISTICS_FILE, known, number)
                record = {**shared, "method": repr(method)}
                for part in ("files", "leaves"):
                    record[part] = {k: v for host in files for k, v in host[name][part].items()}
                record["leaves"] = {k: f"{crc:08x}" for k, crc in record["leaves"].items()}
                if name:
                    manifest.write(folder, record)
                else:
                    staging.commit(record)
            if "" not in plan.merges:
                staging.commit({**shared, "merges": {n: repr(m) for n, m in plan.merges.items()}})
        hosts.wait_for_all("output is there")

    def _provenance(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "stage": "merge",
            "made": manifest.now(),
            "environment": manifest.environment(),
            "inputs": {
                "base": {"path": plan.base.location, "digest": plan.base.digest()},
                "experts": [{"path": r.location, "digest": r.digest()} for r in plan.experts],
            },
            "seconds": round(time.perf_counter() - self.started, 3),
            "bytes_read": self.stream.bytes_read,
            "bytes_written": self.written,
            "peak_resident_bytes": self.peak.nbytes,
        }

    def _write_statistics(
        self, path: epath.Path, known: Mapping[str, Statistics], number: int
    ) -> None:
        total = Statistics(len(self.plan.experts), len(self.plan.merges))
        for statistics in known.values():
            total.add(statistics)
        described = {
            "sampled_share": self.plan.statistics,
            "experts": [reader.location for reader in self.plan.experts],
            "model": total.described(number),
            "leaves": {name: statistics.described(number) for name, statistics in known.items()},
        }
        path.write_text(json.dumps(described, indent=1) + "\n")

    def _report(self, *, was_done: bool) -> Report:
        self.peak.look()
        return Report(
            outputs=self.plan.outputs,
            seconds=time.perf_counter() - self.started,
            bytes_read=self.stream.bytes_read,
            bytes_written=self.written,
            bytes_sampled=self.stream.bytes_sampled,
            storage_seconds=self.stream.read_seconds / self.plan.workers + self.write_seconds,
            peak_resident_bytes=self.peak.nbytes,
            reads=self.reads,
            was_done=was_done,
        )


def _runs_of_kind(leaves: Sequence[LeafSpec]) -> Iterator[list[LeafSpec]]:
    """Consecutive leaves that are all merged or all copied."""
    for _, run in itertools.groupby(leaves, key=lambda leaf: leaf.is_merged):
        yield list(run)
