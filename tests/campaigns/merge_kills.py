"""Merges and conversions killed at random instants (SIGKILL), and gone on with: do they end with the same bytes?

    JAX_PLATFORMS=cpu python -m tests.campaigns.merge_kills --kills=50 --seed=0

Each kill takes one of the cases (formats x methods, conversions among them) in turn, in a random order. A run of each case that
nothing breaks tells what is wanted, how long it takes, and how often it comes by a hook: reads of pieces, writes, syncs,
files opened, renamed and removed, folders made. A victim is killed at a random one of these (a write is then cut in half
first), or, every other time, at a random share of the time. A third of the runs that go on are killed again. Then:

  - the output's files are those of the unbroken run, byte for byte (an OCDBT database names its files at random: its
    arrays), the manifest's checksums the same, the statistics to 1e-9;
  - no piece of the journal was computed again: of safetensors none at all; of arrays in chunks none of a leaf that was
    finished, but for what two batches of a database hold;
  - a reader at every kill, and a thread that looks all the time, saw no output without its manifest, and could open
    nothing of what lay in the staging folder.

The command prints what was killed when, and exits with 1 if anything is not so. Runs are processes forked from one that has
imported everything, with compiled programs in a cache, so that most of their time is the merge's own.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from merging import convert, manifest
from merging import merge as merging_stage
from merging.checkpoints import FORMATS, boxes, open_checkpoint, orbax, tree_writer
from merging.checkpoints.checksums import box_text
from merging.checkpoints.format import CheckpointError
from merging.engine import journal, output, pieces, stream, workers
from merging.engine.plan import Settings, plan
from merging.methods.averaging import Averaging
from merging.methods.dare import Dare
from merging.methods.dare_ties import DareTies
from merging.methods.method import Method
from merging.methods.task_arithmetic import TaskArithmetic
from merging.methods.ties import Ties
from tests import models

EXPERTS = 3
METHODS: dict[str, Method] = {
    "averaging": Averaging(),
    "task_arithmetic": TaskArithmetic(),
    "ties": Ties(),
    "ties_tensor": Ties(density=0.3, scope="tensor"),
    "dare": Dare(),
    "dare_ties": DareTies(trim_density=0.3, rescale="l1"),
}
ALL = "all"  # of them, from one read
CONVERT = "convert"
KINDS = (*METHODS, ALL, CONVERT)
ORBAX_ZARR = "orbax_zarr"  # arrays in folders of their own, as older checkpoints have them
FORMATS_HERE = (*FORMATS, ORBAX_ZARR)
IN_DATABASE = ("orbax", "t5x_orbax")
IN_HEADER = ("model/scalar",)  # of T5X: kept in memory until the file of all metadata is written

Pieces = set[tuple[str, str]]  # (leaf, box)

LAYERS = 6
SHAPES = {"model/embed_tokens/weight": (512, 96), "model/scalar": ()} | {
    f"model/layers_{i}/{name}": shape
    for i in range(LAYERS)
    for name, shape in {"mlp/up_proj/weight": (256, 96), "norm/weight": (96,)}.items()
}
PIECE_ELEMENTS = 1 << 11  # so that there are some hundred pieces of each leaf's few
BATCH_BYTES = 1 << 17  # of a database: some commits in each run
SHARD_BYTES = 300_000
TIMEOUT_S = 900  # nothing takes so long, however busy the machine is
COMPUTED = "computed"  # a file beside the output: the pieces that its last run computed


@dataclasses.dataclass(frozen=True)
class Case:
    format: str
    kind: str

    def __str__(self) -> str:
        return f"{self.format}/{self.kind}"


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run that ended told.

    Attributes:
      seconds: of the stage.
      ticks: how often it came by a hook.
      pieces, kept: of the output, and those that were there.
    """

    seconds: float
    ticks: int
    pieces: int
    kept: int


# ---- what runs in a process of its own ----------------------------------------------------------------------------


class _Hooks:
    """Counts what the process does to files below a folder, and kills it at one of these."""

    def __init__(self, folder: pathlib.Path, kill_at: int | None):
        self.folder, self.kill_at = f"{folder}/out", kill_at
        self.ticks = 0
        self._lock = threading.Lock()

    def tick(self) -> bool:
        """Whether this is the moment."""
        with self._lock:
            self.ticks += 1
            return self.ticks == self.kill_at

    def install(self) -> None:
        sys.addaudithook(self._audit)
        os.pwrite = self._cut(os.pwrite)
        os.write = self._cut(os.write)
        os.fsync = self._before(os.fsync)
        stream.Stream.load = self._before(stream.Stream.load)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        files = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
        is_ours = event in files and str(arguments[0]).startswith(self.folder)
        if is_ours and self.tick():
            _die()

    def _before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def hooked(*arguments: Any, **named: Any) -> Any:
            if self.tick():
                _die()
            return function(*arguments, **named)

        return hooked

    def _cut(self, function: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(function)
        def hooked(descriptor: int, data: Any, *where: int) -> int:
            is_ours = os.readlink(f"/proc/self/fd/{descriptor}").startswith(self.folder)
            if is_ours and self.tick():
                function(descriptor, memoryview(data)[: len(data) // 2], *where)
                _die()
            return function(descriptor, data, *where)

        return hooked


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()


def _job(case: Case, folder: pathlib.Path, inputs: Mapping[str, Any], cache: str, kill_at: int | None,
         phase: Any, begun: Any) -> None:  # fmt: skip
    """A whole run in this process, which tells of itself in `report.json`."""
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    format = case.format
    if format == ORBAX_ZARR:
        FORMATS["orbax"] = functools.partial(orbax.Writer, storage="zarr")
        format = "orbax"
    pieces.PIECE_ELEMENTS = convert.PIECE_ELEMENTS = PIECE_ELEMENTS
    tree_writer.BATCH_BYTES = BATCH_BYTES
    workers.SECONDS_BETWEEN_REPORTS = 0.001
    jax.devices()
    put = output.Outputs.put
    computed = os.open(folder / COMPUTED, os.O_WRONLY | os.O_APPEND)

    def noted(outputs: Any, piece: pieces.Piece, *arguments: Any) -> None:
        os.write(computed, f"{piece.tensor.leaf.name} {box_text(piece.index)}\n".encode())
        put(outputs, piece, *arguments)

    output.Outputs.put = noted

    def at(name: str) -> None:
        phase.value = name.encode()

    for owner, name in ((merging_stage._Run, "_commit_weights"), (manifest.Staging, "commit")):
        function = getattr(owner, name)

        def told(*arguments: Any, function: Any = function, name: str = name) -> Any:
            at(name.strip("_"))
            return function(*arguments)

        setattr(owner, name, told)

    hooks = _Hooks(folder, kill_at)
    hooks.install()
    begun.set()
    started = time.perf_counter()
    options = {"progress": lambda name, *_: at(name)}
    if case.kind == CONVERT:
        settings = convert.Settings(
            input=inputs["base"],
            output_dir=folder / "out",
            format=format,
            shard_bytes=SHARD_BYTES,
        )
        convert.run(convert.plan(settings), **options)
    else:
        which = {"methods": METHODS} if case.kind == ALL else {"method": METHODS[case.kind]}
        planned = plan(
            Settings(
                **inputs,
                **which,
                output_dir=folder / "out",
                format=format,
                shard_bytes=SHARD_BYTES,
            )
        )
        merging_stage.run(planned, **options)
    seconds = time.perf_counter() - started
    said = manifest.read(folder / "out")
    run = Run(seconds, hooks.ticks, said["pieces"], said["pieces_resumed"])
    (folder / "report.json").write_text(json.dumps(dataclasses.asdict(run)))


# ---- who starts and kills them -------------------------------------------------------------------------------------


class Campaign:
    """Inputs, the runs that nothing broke, and the processes.

    Args:
      folder: of everything.
      seed: of inputs and instants.
    """

    def __init__(self, folder: pathlib.Path, seed: int):
        self.folder = folder
        self.random = random.Random(seed)
        base, experts = models.base_and_experts(EXPERTS, seed=seed, shapes=SHAPES, copied=False)
        base["model/flags"] = np.arange(3)
        for each in experts:
            each["model/flags"] = np.arange(3)
        self.inputs = models.save_all(folder / "inputs", base, experts)
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload([__name__])
        self._whole: dict[Case, Run] = {}

    def unbroken(self, case: Case) -> Run:
        """The run of a case that nothing breaks."""
        if case not in self._whole:
            self._run(case, "whole")
            self._whole[case] = self._report(case, "whole")
        return self._whole[case]

    def kill(self, case: Case, *, by_clock: bool) -> str:
        """Kills a run of a case, goes on, compares; returns what happened. AssertionError where anything is not as it should be."""
        whole = self.unbroken(case)
        folder = self._folder(case, "broken")
        shutil.rmtree(folder, ignore_errors=True)
        told: list[str] = []
        kill = True
        while True:
            share = self.random.random()
            finished = self._finished(case)
            with watched(folder / "out") as seen:
                phase = self._run(
                    case,
                    "broken",
                    kill_at=1 + int(share * whole.ticks) if kill and not by_clock else None,
                    kill_after_s=share * whole.seconds if kill and by_clock else None,
                )
            seen += taken_for_whole(folder / "out")
            assert not seen, f"{case}: {seen[0]}"
            self._check_not_again(case, finished)
            if phase != "ended":
                there = len(journaled(folder))
                told.append(f"{phase} ({there} of {whole.pieces} pieces in the journal)")
                kill = self.random.random() < 1 / 3
            elif told:
                break
            else:  # before its hour
                shutil.rmtree(folder)
        same(self._folder(case, "whole") / "out", folder / "out", case)
        return f"{case}: {', again '.join(told)}; {self._report(case, 'broken').kept} kept"

    def _finished(self, case: Case) -> Pieces:
        """Those pieces of a run that was killed that are in the output: journaled, and where leaves are chunks, all of a leaf."""
        found = journaled(self._folder(case, "broken"))
        if case.format == "safetensors":
            return found
        wanting = {leaf for leaf, _ in computed(self._folder(case, "whole")) - found}
        wanting.update(IN_HEADER if case.format == "t5x" else ())
        return {piece for piece in found if piece[0] not in wanting}

    def _check_not_again(self, case: Case, finished: Pieces) -> None:
        """Raises AssertionError if the last run computed a finished piece, but for what may have been in memory."""
        again = finished & computed(self._folder(case, "broken"))
        if case.format not in IN_DATABASE:
            assert not again, f"{case}: {len(again)} finished pieces were computed again"
        outputs = len(METHODS) if case.kind == ALL else 1
        largest = 4 * max(math.prod(shape) for shape in SHAPES.values())
        nbytes = sum(
            4 * math.prod(SHAPES[leaf]) for leaf in {leaf for leaf, _ in again} & SHAPES.keys()
        )
        limit = outputs * 2 * (BATCH_BYTES + largest)
        assert nbytes <= limit, f"{case}: leaves of {nbytes} bytes were computed again"

    def _folder(self, case: Case, what: str) -> pathlib.Path:
        return self.folder / f"{case.format}_{case.kind}" / what

    def _report(self, case: Case, what: str) -> Run:
        return Run(**json.loads((self._folder(case, what) / "report.json").read_text()))

    def _run(
        self,
        case: Case,
        what: str,
        *,
        kill_at: int | None = None,
        kill_after_s: float | None = None,
    ) -> str:
        """Runs a case in a process of its own; returns in which phase it was killed, or "ended"."""
        folder = self._folder(case, what)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / COMPUTED).write_text("")
        phase, begun = self._processes.Array("c", 64), self._processes.Event()
        phase.value = b"start"
        cache = str(self.folder / "cache")
        process = self._processes.Process(
            target=_job, args=(case, folder, self.inputs, cache, kill_at, phase, begun)
        )
        process.start()
        try:
            if kill_after_s is not None:
                assert begun.wait(TIMEOUT_S)
                process.join(kill_after_s)
                process.kill()
            process.join(TIMEOUT_S)
            assert process.exitcode is not None, f"{case} hangs in {phase.value.decode()}"
        finally:
            process.kill()
            process.join()
        assert process.exitcode in (0, -signal.SIGKILL), f"{case}: exit code {process.exitcode}"
        if process.exitcode == 0:
            return "ended"
        assert kill_at is not None or kill_after_s is not None
        return f"killed in {phase.value.decode()}"


def journaled(folder: pathlib.Path) -> Pieces:
    """What is in the journal of a run that was killed."""
    _, records = journal.read(journal.file_of(folder / "out.partial", 0))
    return {(record["leaf"], record["box"]) for record in records if "leaf" in record}


def computed(folder: pathlib.Path) -> Pieces:
    """What the last run computed."""
    lines = (folder / COMPUTED).read_text().splitlines()
    return {(leaf, box) for leaf, _, box in (line.partition(" ") for line in lines)}


def taken_for_whole(output: pathlib.Path) -> list[str]:
    """What a reader that comes now could take for an output, though it is but a part."""
    staging = output.parent / f"{output.name}.partial"
    found = []
    if output.exists() and not (output / manifest.MANIFEST).exists():
        found.append("an output without its manifest")
    for folder in (staging, *(staging / name for name in METHODS)):
        try:
            open_checkpoint(folder).close()
        except (CheckpointError, OSError):
            continue  # refused, or gone meanwhile
        # Whole from its manifest on, in one of these places.
        if not any((each / manifest.MANIFEST).exists() for each in (staging, output)):
            found.append(f"{folder.name} could be opened")
    return found


@contextlib.contextmanager
def watched(output: pathlib.Path) -> Iterator[list[str]]:
    """Looks all the time for a moment at which a part could be taken for the whole; gives what it saw."""
    seen: list[str] = []
    stopped = threading.Event()

    def watch() -> None:
        while not stopped.wait(0.001):
            seen.extend(taken_for_whole(output))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        stopped.set()
        thread.join()


def same(whole: pathlib.Path, broken: pathlib.Path, case: Case) -> None:
    """Raises AssertionError unless two outputs are the same."""
    names = list(METHODS) if case.kind == ALL else [""]
    for name in names:
        _same_arrays(whole / name, broken / name)
        said, told = (manifest.read(each / name) for each in (whole, broken))
        assert said["checksums"] == told["checksums"], f"{case}: other checksums"
        if case.kind != CONVERT:
            _same_numbers(*(json.loads((each / name / merging_stage.STATISTICS_FILE).read_text())
                            for each in (whole, broken)))  # fmt: skip
    if case.format not in IN_DATABASE:
        first, second = files(whole), files(broken)
        assert first.keys() == second.keys(), f"{case}: {first.keys() ^ second.keys()}"
        for name, content in first.items():
            assert content == second[name], f"{case}: {name} differs"


def files(folder: pathlib.Path) -> dict[str, bytes]:
    """The files that must be the same to the byte; others hold times, or sums in the order of threads."""
    others = (manifest.MANIFEST, merging_stage.STATISTICS_FILE, orbax.STEP_FILE)
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in others
    }


def _same_arrays(whole: pathlib.Path, broken: pathlib.Path) -> None:
    with (
        contextlib.closing(open_checkpoint(whole)) as first,
        contextlib.closing(open_checkpoint(broken)) as second,
    ):
        assert dict(first.specs()) == dict(second.specs())
        for name, spec in first.specs().items():
            index = boxes.whole(spec.shape)
            assert first.read(name, index).tobytes() == second.read(name, index).tobytes(), name


def _same_numbers(first: Any, second: Any) -> None:
    if isinstance(first, Mapping):
        assert first.keys() == second.keys()
        for key in first:
            _same_numbers(first[key], second[key])
    elif isinstance(first, list):
        for pair in zip(first, second, strict=True):
            _same_numbers(*pair)
    elif isinstance(first, float):
        np.testing.assert_allclose(second, first, rtol=1e-9, atol=1e-12)
    else:
        assert first == second


def cases_in_turn(
    kills: int, formats: Sequence[str], kinds: Sequence[str], order: random.Random
) -> list[Case]:
    """As many cases as kills, each as often as any other."""
    cases = [Case(format, kind) for format in formats for kind in kinds]
    order.shuffle(cases)
    return [cases[i % len(cases)] for i in range(kills)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", type=lambda text: text.split(","), default=FORMATS_HERE)
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=KINDS)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(pathlib.Path(folder), options.seed)
        cases = cases_in_turn(options.kills, options.formats, options.kinds, campaign.random)
        failed = 0
        for number, case in enumerate(cases):
            try:
                print(
                    f"{number + 1:3d} {campaign.kill(case, by_clock=number % 2 == 1)}", flush=True
                )
            except AssertionError as error:
                failed += 1
                print(f"{number + 1:3d} FAILED {case}: {error}", flush=True)
        print(f"{len(cases)} runs killed, {failed} not as they should be")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
