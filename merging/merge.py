"""The merge stage: base + N experts -> merged checkpoints, disk to disk, all methods from one read.

Everything is checked before the first byte is written (`engine.plan`); the output appears whole or not at all. What a run
that was killed or failed has finished stays beside the output (`manifest.Staging`, `engine.journal`), and the same command goes
on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from merging import manifest
from merging.checkpoints import open_writer
from merging.checkpoints.format import LeafSpec, Writer
from merging.checkpoints.storage import retried_requests
from merging.engine import hosts, journal
from merging.engine.groups import group_by_scale
from merging.engine.journal import Journal
from merging.engine.output import Outputs, is_finite
from merging.engine.pieces import Piece, Tensor, copied_tensor
from merging.engine.plan import Plan, Settings, plan, size_text
from merging.engine.resources import PeakResident
from merging.engine.selection import Recipe, Recipes
from merging.engine.statistics import Statistics, gather
from merging.engine.step import Facts, in_worker, merge_step
from merging.engine.stream import LoadedPiece, Stream
from merging.engine.survey import MethodSurvey, survey
from merging.interrupted import ShouldStop, never
from merging.methods.method import TaskVectorMethod
from merging.models import model_file

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
      pieces, pieces_resumed: of the output, by this host, and how many of them an earlier run had finished.
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
    pieces: int
    pieces_resumed: int
    was_done: bool

    def describe(self) -> str:
        """The report as text."""
        where = ", ".join(str(folder) for folder in self.outputs.values())
        if self.was_done:
            return f"done before: {where}"
        share = self.storage_seconds / self.seconds if self.seconds else 0.0
        resumed = (
            [f"resumed    {self.pieces_resumed:,} of {self.pieces:,} pieces were there"]
            if self.pieces_resumed
            else []
        )
        return "\n".join(
            [
                f"written    {where}",
                *resumed,
                f"time       {self.seconds:.2f} s, {self.reads} reads of the inputs",
                f"bytes      {size_text(self.bytes_read)} read (and {size_text(self.bytes_sampled)} sampled),"
                f" {size_text(self.bytes_written)} written,"
                f" {size_text(int((self.bytes_read + self.bytes_written) / max(self.seconds, 1e-9)))}/s",
                f"bound      storage alone took {self.storage_seconds:.2f} s, {share:.0%} of the time",
                f"memory     {size_text(self.peak_resident_bytes)} resident at most",
            ]
        )


def merge_checkpoints(
    *,
    progress: Progress | None = None,
    log: Callable[[str], None] | None = None,
    **settings: Any,
) -> Report:
    """Merges the experts into the base and writes the result.

    Args:
      progress: told (phase, bytes done, bytes in all) now and then.
      log: told of each phase in words.
      settings: the fields of `engine.plan.Settings`; base, experts, output_dir and method (or methods) are needed.

    Returns:
      What was done. A second call with the same arguments and inputs returns at once; one after a call that was killed or
      failed goes on from there.

    Raises ValueError for everything that is wrong with arguments and inputs, OSError for what fails on the way; nothing
    has appeared under the output's name then.
    """
    return run(plan(Settings(**settings)), progress=progress, log=log)


def run(
    planned: Plan,
    *,
    config_text: str = "",
    progress: Progress | None = None,
    log: Callable[[str], None] | None = None,
    should_stop: ShouldStop = never,
) -> Report:
    """Does what was planned and closes the plan's readers; arguments and errors as `merge_checkpoints`.

    `config_text` is the configuration as it was resolved, kept in the manifest. `should_stop` is asked between pieces, by each
    host at its own pace; where one hears True, all write their journals and raise Interrupted.
    """
    try:
        return _Run(
            planned, progress or (lambda *_: None), log or (lambda _: None), should_stop
        ).run(config_text)
    finally:
        planned.close()


class _Run:
    """One merge under way."""

    def __init__(
        self,
        planned: Plan,
        progress: Progress,
        log: Callable[[str], None],
        should_stop: ShouldStop,
    ):
        self.started = time.perf_counter()
        self.plan = planned
        self.log = log
        self.progress = progress
        self.tensors = [t for each in planned.tensors.values() for t in each if not t.is_kept]
        self.recipes = Recipes(planned.merges, self.tensors, planned.selection)
        self.stream = Stream(
            planned.base,
            planned.experts,
            seed=planned.settings.seed,
            limit=planned.limit,
            workers=planned.workers,
            should_stop=should_stop,
        )
        self.peak = PeakResident()
        self.write_seconds = 0.0  # of all workers together
        self.commit_seconds = 0.0
        self.written = 0
        self.reads = 0
        self.pieces = self.pieces_resumed = 0
        self.journal: Journal

    def run(self, config_text: str) -> Report:
        plan = self.plan
        if plan.is_done:
            return self._report(was_done=True)
        with contextlib.closing(manifest.Staging(plan.output)) as staging:
            was_whole = hosts.of_main(hosts.is_main() and self._begin(staging))
            if not was_whole:
                self._run(staging, config_text)
        return self._report(was_done=was_whole)

    def _begin(self, staging: manifest.Staging) -> bool:
        """Makes the staging folder, with what can be gone on with; whether the output is there but for its name."""
        if staging.is_whole(self.plan.identity):
            return True
        staging.resume(self.plan.identity, if_there=journal.file_of(staging.folder, 0))
        return False

    def _run(self, staging: manifest.Staging, config_text: str) -> None:
        plan = self.plan
        identity = {**plan.identity, "outputs": list(plan.merges)}  # the order of checksums
        inputs = (plan.base, *plan.experts)
        with journal.kept(
            staging, identity, inputs, limit=plan.limit, log=self.log
        ) as self.journal:
            self.stream.limit = self.journal.limit
            with self._opened(staging.folder) as outputs:
                writer = next(iter(outputs.each.values())).writer
                mine = [plan.base_specs[name] for name in writer.names_mine]
                surveys = self._survey(mine)
                statistics = self._merge(mine, surveys, outputs)
                for reader in inputs:
                    reader.check_unchanged()
                self._commit_weights(outputs)
            self._finish(staging, outputs, statistics, config_text)

    @contextlib.contextmanager
    def _opened(self, folder: epath.Path) -> Iterator[Outputs]:
        """One output per merge, each with this host's leaves; what was written stays if anything fails."""
        plan = self.plan
        writers: dict[str, Writer] = {}
        with contextlib.ExitStack() as on_error:
            for name in plan.merges:
                target = folder / name if name else folder
                target.mkdir(parents=True, exist_ok=True)
                writers[name] = open_writer(
                    plan.format,
                    target,
                    plan.specs,
                    like=plan.base,
                    carry_from=plan.carry_from,
                    shard_bytes=plan.settings.shard_bytes,
                    dtype=plan.settings.output_dtype,
                    optimizer_state=plan.settings.optimizer_state,
                    process_index=jax.process_index(),
                    process_count=jax.process_count(),
                    is_resumed=self.journal.is_resumed,
                )
                on_error.callback(writers[name].close)
            yield Outputs(writers, self.journal)
            on_error.pop_all()  # they are committed

    # ---- first pass ------------------------------------------------------------------------------------------------

    def _survey(self, mine: Sequence[LeafSpec]) -> list[MethodSurvey]:
        """The answers to the recipes' questions."""
        if not self.recipes.questions:
            return []
        experts = len(self.plan.experts)
        if all(hosts.gather_json(self.journal.survey is not None)):
            found = [MethodSurvey(q.method, q.tensors, experts) for q in self.recipes.questions]
            for each, known in zip(found, self.journal.survey, strict=True):
                each.restore(known)
            self.log("resuming: the survey is there")
            return found
        found, self.reads = survey(
            self.recipes.questions,
            self._counted("survey"),
            self.tensors,
            [t for spec in mine for t in self.plan.tensors[spec.name] if not t.is_kept],
            combine=hosts.combine,
            log=self.log,
        )
        self.journal.finish_survey([each.known() for each in found])
        self.journal.flush()
        return found

    def _counted(self, phase: str, share: float = 1.0) -> Stream:
        """The stream, reporting what it reads to `progress` under this name. `share`: of the inputs, that is to be read."""
        total = int(share * self.plan.input_bytes) // jax.process_count()
        start = self.stream.bytes_read

        def report() -> None:
            self.peak.look()
            self.journal.flush_now_and_then()
            self.progress(phase, min(self.stream.bytes_read - start, total), total)

        self.stream.while_running = report
        return self.stream

    # ---- second pass -----------------------------------------------------------------------------------------------

    def _merge(
        self,
        mine: Sequence[LeafSpec],
        surveys: Sequence[MethodSurvey],
        outputs: Outputs,
    ) -> dict[str, Statistics]:
        """Reads everything once more and writes every output; returns the statistics of this host's leaves."""
        tensors = [
            t for leaf in mine for t in (self.plan.tensors[leaf.name] or [copied_tensor(leaf)])
        ]
        there = outputs.look(self.stream.pieces(tensors))
        finished, pieces = hosts.combine(np.array([there.finished, there.pieces], np.int64))
        if finished:
            self.log(f"resuming: {finished:,} of {pieces:,} pieces are there")
        stream = self._counted("merge", 1 - there.share)
        self.reads += 1
        names = ", ".join(name for name in outputs.each if name) or "the merge"
        self.log(f"reading {'the rest of ' if finished else ''}all inputs and writing {names}")
        kernel = _Kernel(self.plan, self.recipes, surveys)
        seconds: list[float] = []

        def work(piece: Piece) -> tuple[str, Statistics | None]:
            leaf = piece.tensor.leaf
            kept = outputs.keep(piece)
            if kept is not None:
                return leaf.name, self._statistics(kept.statistics)
            if piece.tensor.is_kept or not leaf.is_merged:
                copied = stream.read_kept(piece) if leaf.is_merged else stream.read_copied(piece)
                copied = copied.astype(self.plan.specs[leaf.name].dtype, copy=False)
                merged, found = [copied] * len(outputs.each), None
            else:
                loaded = stream.load(piece)
                merged = kernel.merge(loaded)
                if not all(is_finite(each) for each in merged):
                    stream.blame_not_finite(loaded)
                found = kernel.statistics(loaded)
            begun = time.perf_counter()
            outputs.put(piece, merged, None if found is None else found.to_vector())
            seconds.append(time.perf_counter() - begun)
            return leaf.name, found

        statistics: dict[str, Statistics] = {}

        def take(result: tuple[str, Statistics | None]) -> None:
            name, found = result
            if found is not None:
                known = statistics.setdefault(
                    name, Statistics(len(self.plan.experts), len(outputs.each))
                )
                known.add(found)

        stream.run(stream.pieces(tensors), work, take)
        self.journal.flush()
        self.pieces, self.pieces_resumed = outputs.pieces, outputs.kept
        self.write_seconds += sum(seconds)
        return statistics

    def _statistics(self, vector: np.ndarray | None) -> Statistics | None:
        if vector is None:
            return None
        return Statistics.from_vector(vector, len(self.plan.experts), len(self.plan.merges))

    # ---- the end ---------------------------------------------------------------------------------------------------

    def _commit_weights(self, outputs: Outputs) -> None:
        begun = time.perf_counter()
        for turn in (False, True):  # the main host last
            if hosts.is_main() == turn:
                for output in outputs.each.values():
                    output.writer.commit()
                self.written = outputs.nbytes
            hosts.wait_for_all(f"weights committed {turn}")
        self.commit_seconds = time.perf_counter() - begun

    def _finish(
        self,
        staging: manifest.Staging,
        outputs: Outputs,
        statistics: Mapping[str, Statistics],
        config_text: str,
    ) -> None:
        """Gathers what all hosts know, writes statistics and manifests, and lets the output appear."""
        plan = self.plan
        recorded = hosts.gather_json({name: each.recorded() for name, each in outputs.each.items()})
        counts = hosts.combine(
            np.array([self.pieces, self.pieces_resumed, retried_requests()], np.int64)
        )
        statistics = hosts.gather_json(
            {name: s.to_vector().tolist() for name, s in statistics.items()}
        )
        if hosts.is_main():
            known = {
                name: self._statistics(np.array(vector)).scaled_to_all()
                for host in statistics
                for name, vector in host.items()
            }
            shared = {
                **self._provenance(),
                "pieces": int(counts[0]),
                "pieces_resumed": int(counts[1]),
                "storage_retries": int(counts[2]),
                "config": config_text,
            }
            for number, (name, method) in enumerate(plan.merges.items()):
                folder = staging.folder / name if name else staging.folder
                if plan.settings.statistics > 0:
                    self._write_statistics(folder / STATISTICS_FILE, known, number)
                if plan.model is not None:
                    model_file.write_along(
                        folder,
                        plan.model,
                        dtype=plan.settings.output_dtype,
                        stacked=plan.stacked.patterns,
                    )
                record = {**shared, "method": repr(method), **recorded[0][name]}
                record["checksums"] = {
                    k: v for host in recorded for k, v in host[name]["checksums"].items()
                }
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
            **manifest.provenance(plan.identity),
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
            "sampled_share": self.plan.settings.statistics,
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
            storage_seconds=(self.stream.read_seconds + self.write_seconds) / self.plan.workers
            + self.commit_seconds,
            peak_resident_bytes=self.peak.nbytes,
            reads=self.reads,
            pieces=self.pieces,
            pieces_resumed=self.pieces_resumed,
            was_done=was_done,
        )


class _Kernel:
    """What a worker does to a piece in memory, with what the surveys found."""

    def __init__(self, plan: Plan, recipes: Recipes, surveys: Sequence[MethodSurvey]):
        self._plan = plan
        self._recipes = recipes
        self._surveys = surveys
        self._groups = functools.cache(lambda r: group_by_scale(r.methods, r.asked))

    def merge(self, loaded: LoadedPiece) -> list[np.ndarray]:
        """The piece by every merge, 1-D, in the output's dtype."""
        dtype = self._plan.specs[loaded.tensor.leaf.name].dtype
        base, experts = loaded.on_devices()
        groups, places, asked = self._groups(self._recipes.of[loaded.tensor.path])
        outputs = merge_in_worker(
            groups,
            self._facts(asked, loaded.tensor),
            base,
            experts,
            loaded.keys,
            loaded.offset,
            geometry=loaded.geometry,
            out_dtype=np.dtype(np.float32) if dtype == np.float64 else dtype,
        )
        arrays = [np.asarray(outputs[place])[: loaded.size] for place in places]
        return [array.astype(dtype) for array in arrays] if dtype == np.float64 else arrays

    def statistics(self, loaded: LoadedPiece) -> Statistics | None:
        """Of the piece's sampled blocks; None where none are wanted."""
        share = self._plan.settings.statistics
        if share == 0:
            return None
        recipe: Recipe = self._recipes.of[loaded.tensor.path]
        methods = [m if isinstance(m, TaskVectorMethod) else None for m in recipe.methods]
        return gather(loaded, methods, self._facts(recipe.asked, loaded.tensor), share)

    def _facts(self, asked: Sequence[int | None], tensor: Tensor) -> tuple[Facts, ...]:
        return tuple(
            Facts() if number is None else self._surveys[number].facts(tensor) for number in asked
        )
