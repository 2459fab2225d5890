r"""One of four processes of a job is lost at a random instant: do the others end and name it, and does the command go on?

  JAX_PLATFORMS=cpu python -m tests.campaigns.pod_faults [--faults=10] [--stages=merge,evaluate] [--kinds=kill,cut] [--seed=0]

The processes run a stage's own command (merge, evaluate, finetune, study; small), and find one another on loopback. At a random
instant, in one case of five while they still start, one of them is

  kill   killed (SIGKILL),
  stop   stopped (SIGSTOP), and goes on when the others have ended,
  cut    cut off from its coordinator: a proxy between them swallows all that comes,
  drop   the same, but the proxy closes the connections.

Process 0, which is the coordinator, is not cut off: its line to itself does not leave the machine. Each kind is tried so many times in each
stage. Then:

  - the others end by themselves, within LIMIT_S of work (START_S where somebody is missing at the start), and each that has
    failed names the lost one; so does the lost one, for which the same limit holds, where it still lives;
  - nothing has appeared under the output's name, or it is whole;
  - the same command, started again on what is there, ends with the files (merge), the parameters and curve (finetune) or
    the scores (evaluate, study) of a run that nothing broke. Every other one of these is broken again first.

A fault that comes when all is done changes nothing, and is tried again. The command prints each fault, what it came to and the longest
time to an end; exit code 1 where something was not so.
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import importlib
import multiprocessing
import os
import pathlib
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from launch import command, exit_codes
from launch.pod import local
from tests import models, score_files
from tests.campaigns import finetune_kills, merge_kills
from tests.launch import proxy, small_palm

PROCESSES = 4
HEARTBEAT_S = 10  # of the watchdog
START_S = 30  # that processes wait for one another
# Of jax's heartbeats a process that is stopped misses all within their time, and one whose collective has failed waits for
# half as long again to hear who has gone (launch.devices). The rest is a busy machine's.
LIMIT_S = {"work": 2 * HEARTBEAT_S, "start": START_S + 2 * HEARTBEAT_S}
PATIENCE_S = 300  # nothing takes so long, however busy the machine is
KINDS = ("kill", "stop", "cut", "drop")
STARTING = 1 / 5  # of the faults come before the work begins
AGAIN = 1 / 2  # of the runs that go on are broken too

LOOK_S = 0.05  # between two looks at a job

# Processes are forked from one that has imported what they need, since that takes longest.
_CONTEXT = multiprocessing.get_context("forkserver")
_OF_TASKS = (
    *("tasks.batches", "tasks.catalog", "tasks.evaluation", "tasks.packing", "tasks.stream"),
    *("merging.evaluate", "merging.study"),
)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A command, and what of its output must be the same.

    Attributes:
      devices: of each process.
      prepare: makes the inputs in a folder.
      arguments: of the command, by the folder of the inputs and the output.
      begins: what process 0 writes when its work begins.
      imported: beside what the campaign imports itself.
      differences: between an output and the unbroken run's, in words.
    """

    devices: int
    prepare: Callable[[pathlib.Path], object]
    arguments: Callable[[pathlib.Path, pathlib.Path], list[str]]
    begins: str
    differences: Callable[[pathlib.Path, pathlib.Path], list[str]]
    imported: tuple[str, ...] = _OF_TASKS


# ---- the stages ---------------------------------------------------------------------------------------------------

EXPERTS = 3
MERGED = {"model.embed_tokens.weight": (8192, 256)} | {
    f"model.layers.{i}.mlp.weight": (2048, 256) for i in range(12)
}


def _make_models(folder: pathlib.Path) -> None:
    base, experts = models.base_and_experts(EXPERTS, shapes=MERGED)
    models.save_all(folder, base, experts)


def _merge(inputs: pathlib.Path, output: pathlib.Path) -> list[str]:
    experts = ",".join(str(inputs / f"expert_{i}") for i in range(EXPERTS))
    given = [f"--base={inputs / 'base'}", f"--experts={experts}", f"--output={output}"]
    return ["merge", "--method=ties", *given]


def _other_files(output: pathlib.Path, unbroken: pathlib.Path) -> list[str]:
    return _other(merge_kills.files(output), merge_kills.files(unbroken))


SCORED = ("a", "b", "c", "d")  # names of one model: scores are put on disk after each


def _make_scored(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True)
    small_palm.written(folder / "model")


def _evaluate(inputs: pathlib.Path, output: pathlib.Path) -> list[str]:
    settings = {
        "CHECKPOINTS": dict.fromkeys(SCORED, str(inputs / "model")),
        "INITIAL_CHECKPOINT_PATH": None,
        "TASK_FEATURE_LENGTHS": {"inputs": 160, "targets": 8},
        "LIMIT": 21,
        "SHAPES": 1,
    }
    bindings = [f"--gin.{name}={value}" for name, value in settings.items()]
    tasks = "causes_choose_mini,opposites_which_mini"
    return ["evaluate", f"--tasks={tasks}", f"--output={output}", *bindings]


def _finetune(inputs: pathlib.Path, output: pathlib.Path) -> list[str]:
    settings = {
        "MODEL": "@named()",
        "named.name": "'mini_xs'",
        "named.num_layers": 1,
        "TASK_FEATURE_LENGTHS": {"inputs": 0, "targets": 32},
        "TRAIN_STEPS": 24,
        "BATCH_SIZE": 4,
        "LOG_EVERY": 1,
        "CHECKPOINT_EVERY": 4,
        "VALIDATE_EVERY": 8,
        "VALIDATION_BATCHES": 1,
        "VALIDATION_ROWS": 4,
        "CACHE_DIR": repr(str(inputs / "packed")),
        "OUTPUT_DIR": repr(str(output)),
    }
    bindings = [f"--gin.{name}={value}" for name, value in settings.items()]
    return ["finetune", "--gin_file=gin_configs/runs/pretrain.gin", *bindings]


def _study(inputs: pathlib.Path, output: pathlib.Path) -> list[str]:
    recipes = ("pretrain", "expert")
    settings = {
        "mini_m/named.name": "'mini_xs'",
        **{f"{recipe}/Training.train_steps": 2 for recipe in recipes},
        **{f"{recipe}/Training.batch_size": 4 for recipe in recipes},
        "BASES": "{'pretrained': @pretrain/Training()}",
        "MULTITASK": None,
        "METHODS": "{'averaging': @Averaging(), 'ties': @Ties()}",
        "NUM_EXPERTS": (2,),
        "LIMIT": 2,
        "SHAPES": 1,
        "CACHE_DIR": repr(str(inputs / "packed")),
    }
    bindings = [f"--gin.{name}={value}" for name, value in settings.items()]
    return ["study", "--study=quick", f"--output={output}", *bindings]


def _other_scores(output: pathlib.Path, unbroken: pathlib.Path) -> list[str]:
    return _other(score_files.read_all(output), score_files.read_all(unbroken))


def _other(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    return [name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)]


def _nothing(folder: pathlib.Path) -> None:
    """The stage makes what it needs."""


STAGES = {
    "merge": Stage(
        devices=2,
        prepare=_make_models,
        arguments=_merge,
        begins="reading all inputs",
        differences=_other_files,
        imported=(),
    ),
    "evaluate": Stage(
        devices=2,
        prepare=_make_scored,
        arguments=_evaluate,
        begins=" models on ",
        differences=_other_scores,
    ),
    "finetune": Stage(
        devices=1,
        prepare=_nothing,
        arguments=_finetune,
        begins="trains ",
        differences=finetune_kills.differences,
    ),
    "study": Stage(
        devices=1,
        prepare=_nothing,
        arguments=_study,
        begins="bases: ",
        differences=_other_scores,
    ),
}


# ---- a job --------------------------------------------------------------------------------------------------------


class Job:
    """The processes of a stage's command. Use as a context manager: leaving it kills what is left of them.

    Args:
      stage: by name.
      folder: of the campaign.
      output: of the command.
      cut_off: the process that is told a proxy's address, `line`, as the coordinator's; None: no process.

    Attributes:
      started: when; all times are of time.monotonic, in seconds.
      begun: when process 0 said that its work begins; None: not yet.
      ended: when, by number of the process.
    """

    def __init__(self, stage: str, folder: pathlib.Path, output: pathlib.Path, cut_off: int | None):
        kind = STAGES[stage]
        self._begins = kind.begins
        self._words = [folder / f"words_{index}" for index in range(PROCESSES)]
        self.line: proxy.Proxy | None = None
        environments = local.job_environments(None, processes=PROCESSES, devices=kind.devices)
        if cut_off is not None:
            self.line = proxy.Proxy(environments[0]["MERGING_COORDINATOR"])
            environments[cut_off]["MERGING_COORDINATOR"] = self.line.address
        program, *arguments = kind.arguments(folder / stage / "inputs", output)
        common = [f"--heartbeat_timeout={HEARTBEAT_S}", f"--initialization_timeout={START_S}"]
        common += [f"--compilation_cache_dir={folder / 'compiled'}"]
        self.processes = [
            _CONTEXT.Process(target=_run, args=(program, [*common, *arguments], environment, words))
            for environment, words in zip(environments, self._words, strict=True)
        ]
        self.started = time.monotonic()
        self.begun: float | None = None
        self.ended: dict[int, float] = {}
        for process, words in zip(self.processes, self._words, strict=True):
            words.write_text("")
            process.start()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        if self.line is not None:
            self.line.__exit__()

    @property
    def codes(self) -> list[int | None]:
        """Exit codes; negative for a signal, None for who still runs."""
        return [process.exitcode for process in self.processes]

    def words(self, index: int) -> str:
        """What a process wrote."""
        return self._words[index].read_text(errors="replace")

    def wait(self, until: Callable[[], bool], timeout_s: float = PATIENCE_S) -> bool:
        """Whether something became so within a time, or else all processes ended."""
        deadline = time.monotonic() + timeout_s
        while True:
            for index, process in enumerate(self.processes):
                if index not in self.ended and process.exitcode is not None:
                    self.ended[index] = time.monotonic()
            if self.begun is None and self._begins in self.words(0):
                self.begun = time.monotonic()
            if until():
                return True
            if len(self.ended) == PROCESSES or time.monotonic() > deadline:
                return False
            time.sleep(LOOK_S)

    def have_ended(self, which: Sequence[int]) -> Callable[[], bool]:
        """Whether these have, as of the last look."""
        return lambda: all(index in self.ended for index in which)


def _run(
    program: str, arguments: list[str], environment: dict[str, str], words: pathlib.Path
) -> None:
    """`python -m launch.<program>` in this process, which was forked and has imported what it needs; ends as the interpreter does."""
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(words, os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    sys.stdout, sys.stderr = (open(d, "w", buffering=1, closefd=False) for d in (1, 2))
    sys.argv = [f"launch.{program}", *arguments]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    code: Any = 0
    try:
        module = importlib.import_module(f"launch.{program}")
        getattr(module, "define_flags", lambda: None)()
        command.run(module.main)
    except SystemExit as ended:
        code = ended.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    os._exit(code or 0)


def names(words: str, victim: int) -> bool:
    """Whether a process said which one was lost: in our words, or in those of jax's coordination service."""
    ours = rf"process(es \d.*,)? {victim}\b[^\n]* (did not|has)"
    theirs = rf"\(stopped sending heartbeats\):\n{victim}\n"
    return re.search(f"{ours}|{theirs}", words) is not None


# ---- the campaign -------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Told:
    """What the faults of a stage came to.

    Attributes:
      faults: by kind.
      late: that came when all was done.
      whole: runs that were compared.
      longest_s: from a fault to the end of the last process, by kind and phase.
      wrong: what was not as it should be, in words.
    """

    faults: dict[str, int] = dataclasses.field(default_factory=dict)
    late: int = 0
    whole: int = 0
    longest_s: dict[str, float] = dataclasses.field(default_factory=dict)
    wrong: list[str] = dataclasses.field(default_factory=list)


class Campaign:
    """Faults of one stage.

    Args:
      stage: by name.
      folder: of everything.
      seed: of the instants, and of who is lost.
    """

    def __init__(self, stage: str, folder: pathlib.Path, seed: int):
        self.stage, self.folder = stage, folder
        self.random = random.Random(f"{stage} {seed}")
        self.told = Told()
        made = _CONTEXT.Process(target=STAGES[stage].prepare, args=(folder / stage / "inputs",))
        made.start()
        made.join()
        assert made.exitcode == 0
        self._outputs = (folder / stage / str(number) for number in range(10**9))
        self.unbroken = folder / stage / "unbroken"
        self._seconds = {"start": 0.0, "work": 0.0}  # of the unbroken run
        assert self._go_on(self.unbroken), self.told.wrong

    def run(self, kinds: Sequence[str]) -> Told:
        """One fault of each of the kinds, in this order; goes on after each, and compares."""
        output, left = next(self._outputs), list(kinds)
        while left:
            if not self._fault(left[0], output):  # too late
                self.told.late += 1
                self._compare(output)
                output = next(self._outputs)
                continue
            kind = left.pop(0)
            self.told.faults[kind] = self.told.faults.get(kind, 0) + 1
            if left and self.random.random() < AGAIN:
                continue
            if self._go_on(output):
                self._compare(output)
            output = next(self._outputs)
        return self.told

    def _fault(self, kind: str, output: pathlib.Path) -> bool:
        """Whether a fault broke a run."""
        is_cut = kind in ("cut", "drop")
        victim = self.random.randrange(1 if is_cut else 0, PROCESSES)
        phase = "start" if self.random.random() < STARTING else "work"
        share = self.random.random()
        others = [index for index in range(PROCESSES) if index != victim]
        with Job(self.stage, self.folder, output, victim if is_cut else None) as job:
            if phase == "work":
                job.wait(lambda: job.begun is not None)
            job.wait(lambda: False, share * self._seconds[phase])
            at, phase = time.monotonic(), "start" if job.begun is None else "work"
            strike(job, kind, victim)
            who = f"{self.stage}: {kind} of process {victim} {at - job.started:.1f} s after the start ({phase})"
            ends = {"the others": self._ends(job, others, victim, who, at, LIMIT_S[phase])}
            is_late = not any(job.codes[index] for index in others)
            if is_late and phase == "work":  # than the unbroken run's, which compiled its programs
                self._seconds["work"] = max(job.ended.values()) - job.begun
            if kind == "stop":
                at = time.monotonic()
                os.kill(job.processes[victim].pid, signal.SIGCONT)
            if kind != "kill":
                ends["it itself"] = self._ends(job, [victim], None, who, at, LIMIT_S[phase])
            told = ", ".join(
                f"{name} ended after {seconds:.1f} s" for name, seconds in ends.items()
            )
            print(f"{who}: {told}, codes {job.codes}{', too late' if is_late else ''}", flush=True)
            if not is_late:
                for name, seconds in ends.items():
                    key = f"{kind} in {phase}, {name}"
                    self.told.longest_s[key] = max(self.told.longest_s.get(key, 0.0), seconds)
        return not is_late

    def _ends(
        self,
        job: Job,
        which: Sequence[int],
        victim: int | None,
        who: str,
        at: float,
        limit_s: float,
    ) -> float:
        """Seconds until these processes ended; notes what is wrong with how they did."""
        problems = []
        if not job.wait(job.have_ended(which)):
            hung = [index for index in which if index not in job.ended]
            problems.append(f"{who}: {hung} did not end within {PATIENCE_S} s")
        seconds = max(job.ended.get(index, at + PATIENCE_S) for index in which) - at
        if seconds > limit_s:
            problems.append(f"{who}: {list(which)} took {seconds:.1f} s to end")
        for index in which:
            code = job.codes[index]
            if code not in (None, 0, exit_codes.BROKEN, -signal.SIGABRT):
                problems.append(f"{who}: process {index} ended with {code}")
            if code not in (None, 0) and victim is not None and not names(job.words(index), victim):
                problems.append(f"{who}: process {index} did not name it")
        self._note(problems, job)
        return max(0.0, seconds)

    def _go_on(self, output: pathlib.Path) -> bool:
        """Whether the command, started on what is there, ends well."""
        with Job(self.stage, self.folder, output, None) as job:
            job.wait(job.have_ended(range(PROCESSES)))
            is_good = job.codes == [0] * PROCESSES
            if not is_good:
                self._note([f"{self.stage}: going on ended with {job.codes}"], job)
            elif output == self.unbroken:
                assert job.begun is not None, "the command did not say that its work has begun"
                self._seconds["start"] = job.begun - job.started
                self._seconds["work"] = max(job.ended.values()) - job.begun
        return is_good

    def _compare(self, output: pathlib.Path) -> None:
        found = STAGES[self.stage].differences(output, self.unbroken)
        self.told.whole += 1
        self._note([f"{self.stage}: {output.name} differs in {each}" for each in found])
        print(
            f"{self.stage}: run {output.name} {'differs' if found else 'is the same'}", flush=True
        )

    def _note(self, problems: Sequence[str], job: Job | None = None) -> None:
        self.told.wrong += problems
        for problem in problems:
            print(f"WRONG {problem}", flush=True)
        if problems and job is not None:
            for index in range(PROCESSES):
                print(
                    "".join(
                        f"    [{index}] {line}\n" for line in job.words(index).splitlines()[-25:]
                    )
                )


def fork_for(stages: Sequence[str]) -> None:
    """What processes are forked from imports what these stages need; call it before the first campaign."""
    modules = dict.fromkeys(module for stage in stages for module in STAGES[stage].imported)
    _CONTEXT.set_forkserver_preload([__name__, *modules])


def strike(job: Job, kind: str, victim: int) -> None:
    """Does to a process what the kind says."""
    if kind == "kill":
        job.processes[victim].kill()
    elif kind == "stop":
        os.kill(job.processes[victim].pid, signal.SIGSTOP)
    elif kind == "cut":
        job.line.cut()
    else:
        job.line.drop()


def main() -> None:
    """Breaks, prints, and fails where it must."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=10, help="of each kind in each stage")
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(exit_codes.PREEMPTED))  # no process stays
    is_good, stages = True, asked.stages.split(",")
    fork_for(stages)
    for stage in stages:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            campaign = Campaign(stage, pathlib.Path(folder), asked.seed)
            told = campaign.run(asked.kinds.split(",") * asked.faults)
        is_good &= not told.wrong
        longest = ", ".join(f"{key} {value:.1f} s" for key, value in told.longest_s.items())
        print(
            f"{stage}: {told.faults}, {told.late} too late, {told.whole} runs compared, longest: {longest};"
            f" {len(told.wrong)} wrong, {time.monotonic() - started:.0f} s",
            flush=True,
        )
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
