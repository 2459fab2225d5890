r"""Every stage by several processes beside one: the bits of merges, scores, losses; and what a merge reads and holds.

  python -m tests.campaigns.pods --work_dir=/data/pods [--layouts=2x4,4x2] [--stages=finetune,merge,convert,evaluate,study,reads]
  python -m tests.campaigns.pods --stages=reads --parameters=3.6e8 --experts=8
  python -m tests.campaigns.pods --stages=study --whole                      # quick.gin as it is

A layout PxD is P processes of D virtual devices, by `launch.pod.local`; each is compared with --one, one process. A stage takes the
inputs that the one process made, so that it is compared alone:

  finetune  a base from nothing and two experts by one step: all losses to 1e-5 (relative; sums over devices have another order)
  merge     four methods from one read of the experts, to Orbax and to safetensors: every bit
  convert   of what the layout merged, in one process (several are refused): every bit
  evaluate  a merge and the base, choices and generated answers: every score, and the log-likelihoods of choices to 1e-5
  study     quick.gin, cut down: losses to 1e-5; scored from the one process's models: every score, every bit of kept merges; from its own
            models: every score where their bits are equal, else how far scores are apart is told
  reads     a large merge by averaging and TIES: every byte of every input is read once a pass, by one process; memory within the budget

A line is printed of each, and exit code 1 says that one is not as it should be.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import gzip
import json
import math
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from launch.pod import local
from merging.checkpoints import open_checkpoint
from merging.checkpoints.boxes import whole
from merging.checkpoints.safetensors_header import read_header
from merging.checkpoints.storage import ByteSource
from merging.evaluation.collect import EXAMPLES
from tests import score_files
from tests.benchmarks import merge as bench

RELATIVE = 1e-5  # of losses and log-likelihoods: float32 sums in another order
METHODS = "{'averaging': @Averaging(), 'sum': @TaskArithmetic(), 'ties': @Ties(), 'dare_ties': @DareTies()}"
FORMATS = ("orbax", "safetensors")
MIXTURES = ["sentiment_mini", "topic_classification_mini"]
TINY_RUN = [
    "TRAIN_STEPS=3",
    "BATCH_SIZE=8",
    "LOG_EVERY=1",
    "VALIDATION_BATCHES=1",
    "VALIDATION_ROWS=8",
]
TINY_MODEL = ["MODEL=@named()", "named.name='mini_xs'", "named.num_layers=2"]
SCOPES = ("pretrain", "instruct", "expert", "multitask")
TINY_STUDY = [
    "mini_m/named.name='mini_xs'",
    *(f"{scope}/Training.train_steps=2" for scope in SCOPES),
    "BASES={'pretrained': @pretrain/Training()}",
    "NUM_EXPERTS=(2,)",
    "LIMIT=4",
    "SHAPES=1",
]


@dataclasses.dataclass(frozen=True)
class Layout:
    """So many processes of so many virtual devices."""

    processes: int
    devices: int

    @classmethod
    def of(cls, text: str) -> Layout:
        return cls(*map(int, text.split("x")))

    def __str__(self) -> str:
        return f"{self.processes}x{self.devices}"


class Campaign:
    """What is run in a folder, and what was found.

    Attributes:
      failed: how many findings were not as they should be.
    """

    def __init__(self, folder: pathlib.Path, options: argparse.Namespace):
        self.folder, self.options = folder, options
        self.one = options.one
        self.failed = 0

    def place(self, layout: Layout, name: str) -> pathlib.Path:
        """Of an output."""
        (self.folder / str(layout)).mkdir(parents=True, exist_ok=True)
        return self.folder / str(layout) / name

    def run(self, layout: Layout, module: str, *flags: str, gin: Sequence[str] = ()) -> str:
        """What the main process of a command prints; the command is as users write it."""
        command = [sys.executable, "-m", module, *flags, *(f"--gin.{each}" for each in gin)]
        if module.startswith("launch."):
            command.append(f"--compilation_cache_dir={self.folder / 'compiled'}")
        begun = time.monotonic()
        told = local.run_local(
            command,
            processes=layout.processes,
            devices=layout.devices,
            timeout_s=None,
            echo=self._log if self.options.verbose else lambda _: None,
        )
        self._log(f"{layout} {module}: {time.monotonic() - begun:.0f} s")
        return told[0]

    def say(self, is_good: bool, text: str) -> None:
        """A finding."""
        self.failed += not is_good
        print(f"{'ok  ' if is_good else 'BAD '} {text}", flush=True)

    def _log(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


# ---- the stages ---------------------------------------------------------------------------------------------------


def finetune(c: Campaign, layouts: Sequence[Layout]) -> None:
    packed = f"CACHE_DIR='{c.folder / 'packed'}'"
    for layout in layouts:
        base, experts = c.place(layout, "base"), c.place(layout, "experts")
        c.run(
            layout,
            "launch.finetune",
            "--gin_file=gin_configs/runs/pretrain.gin",
            gin=[*TINY_RUN, *TINY_MODEL, packed, f"OUTPUT_DIR='{base}'"],
        )
        c.run(
            layout,
            "launch.finetune",
            "--gin_file=gin_configs/runs/expert.gin",
            gin=[
                *TINY_RUN,
                packed,
                f"INITIAL_CHECKPOINT_PATH='{c.place(c.one, 'base')}'",
                f"MIXTURES={MIXTURES}",
                "EXPERTS_AT_ONCE=2",
                "TASK_FEATURE_LENGTHS={'inputs': 48, 'targets': 16}",
                f"OUTPUT_DIR='{experts}'",
            ],
        )
        for name in ("base", "experts"):
            compare_losses(c, layout, f"finetune {name}", name)


def merge(c: Campaign, layouts: Sequence[Layout]) -> None:
    experts = [str(c.place(c.one, "experts") / name) for name in MIXTURES]
    for layout in layouts:
        for form in FORMATS:
            c.run(
                layout,
                "launch.merge",
                f"--base={c.place(c.one, 'base')}",
                f"--experts={','.join(experts)}",
                f"--output={c.place(layout, f'merged_{form}')}",
                gin=[f"METHODS={METHODS}", f"FORMAT='{form}'"],
            )
            compare_bits(c, layout, f"merge to {form}", f"merged_{form}")


def convert(c: Campaign, layouts: Sequence[Layout]) -> None:
    alone = Layout(1, 1)
    for layout in layouts:
        flags = [
            f"--input={c.place(layout, 'merged_orbax') / 'ties'}",
            f"--output={c.place(layout, 'converted')}",
            "--format=safetensors",
        ]
        if layout.processes > 1:
            try:
                c.run(layout, "launch.convert", *flags)
            except local.ProcessFailed as failure:
                is_told = "convert runs in one process" in failure.output
                c.say(is_told, f"{layout} convert: several processes are refused")
            else:
                c.say(False, f"{layout} convert: several processes were not refused")
        c.run(alone, "launch.convert", *flags)
        compare_bits(c, layout, "convert", "converted")


def evaluate(c: Campaign, layouts: Sequence[Layout]) -> None:
    models = [c.place(c.one, "merged_orbax") / "ties", c.place(c.one, "base")]
    for layout in layouts:
        c.run(
            layout,
            "launch.evaluate",
            f"--checkpoint={','.join(map(str, models))}",
            "--tasks=sentiment_mini,closed_book_qa_mini",
            f"--output={c.place(layout, 'scores')}",
            gin=[
                f"LIMIT={c.options.limit}",
                "NUM_PROMPTS=1",
                "SHAPES=1",
                "WRITE_EXAMPLES=True",
                "TASK_FEATURE_LENGTHS={'inputs': 96, 'targets': 8}",
            ],
        )
        if layout != c.one:
            compare_scores(c, layout, "evaluate", "scores", is_exact=True)
            compare_examples(c, layout, "scores")


def study(c: Campaign, layouts: Sequence[Layout]) -> None:
    cut = [] if c.options.whole else TINY_STUDY
    common = [*cut, "KEEP_MERGED=True", f"CACHE_DIR='{c.folder / 'packed'}'"]
    for layout in layouts:
        given = ["--study=quick", f"--output={c.place(layout, 'study')}"]
        c.run(layout, "launch.study", *given, gin=common)
        if layout == c.one:
            continue
        compare_losses(c, layout, "study", "study/models")
        is_equal = compare_bits(c, layout, "study's models", "study/models", is_needed=False)
        compare_scores(c, layout, "study, from its own models", "study/scores", is_exact=is_equal)
        copied = c.place(layout, "study_of_one")
        shutil.copytree(c.place(c.one, "study") / "models", copied / "models", dirs_exist_ok=True)
        given = ["--study=quick", f"--output={copied}"]
        c.run(layout, "launch.study", *given, gin=[*common, "PHASE='cells'"])
        of_one = {"theirs": "study_of_one"}
        compare_bits(c, layout, "study's merges, of one's models", "study/merged", **of_one)
        compare_scores(c, layout, "study, of one's models", "study/scores", is_exact=True, **of_one)


def reads(c: Campaign, layouts: Sequence[Layout]) -> None:
    inputs = bench.make(c.folder, round(c.options.parameters), c.options.experts)
    budget = round(c.options.budget_bytes)
    for method, passes in (("averaging", 1), ("ties", 2)):
        for layout in layouts:
            counts = c.place(layout, f"reads_{method}")
            output = c.place(layout, f"large_{method}")
            shutil.rmtree(counts, ignore_errors=True)
            counts.mkdir()
            shutil.rmtree(output, ignore_errors=True)
            c.run(
                layout,
                "tests.campaigns.counted_merge",
                str(counts),
                f"--base={inputs.base}",
                f"--experts={','.join(map(str, inputs.experts))}",
                f"--method={method}",
                f"--output={output}",
                gin=[f"MEMORY_BUDGET_BYTES={budget}", "SHARD_BYTES=100_000_000"],
            )
            told = [
                json.loads((counts / f"reads_{i}.json").read_text())
                for i in range(layout.processes)
            ]
            say_reads(c, f"{layout} {method} of {inputs.describe()}", inputs, told, passes)
            peaks = [f"{(t['peak'] - t['before']) / 2**20:,.0f}" for t in told]
            is_kept = all(t["peak"] - t["before"] <= budget for t in told)
            most = max(t["peak"] for t in told) / 2**20
            c.say(
                is_kept,
                f"{layout} {method}: {', '.join(peaks)} MiB more than before the merge, of a budget of {budget / 2**20:,.0f};"
                f" {most:,.0f} MiB resident at most",
            )
            compare_bits(c, layout, f"{method} of the large inputs", f"large_{method}")
            if layout != c.one:
                shutil.rmtree(output)
        shutil.rmtree(c.place(c.one, f"large_{method}"))


STAGES: dict[str, Callable[[Campaign, Sequence[Layout]], None]] = {
    "finetune": finetune,
    "merge": merge,
    "convert": convert,
    "evaluate": evaluate,
    "study": study,
    "reads": reads,
}


# ---- comparisons --------------------------------------------------------------------------------------------------


def compare_losses(c: Campaign, layout: Layout, what: str, name: str) -> None:
    """Of every step and of validation, in all curves below a folder."""
    if layout == c.one:
        return
    wanted, found = (curves(c.place(each, name)) for each in (c.one, layout))
    same = wanted.keys() == found.keys() and all(
        len(wanted[key]) == len(found[key]) for key in wanted
    )
    if not same or not wanted:
        c.say(False, f"{layout} {what}: curves {sorted(found)}, wanted {sorted(wanted)}")
        return
    pairs = [(a, b) for key in wanted for a, b in zip(wanted[key], found[key], strict=True)]
    furthest = max(abs(a - b) / abs(a) for a, b in pairs)
    c.say(
        furthest <= RELATIVE,
        f"{layout} {what}: {len(pairs)} losses of {len(wanted)} curves differ by at most {furthest:.1e}",
    )


def curves(folder: pathlib.Path) -> dict[str, list[float]]:
    """The losses of each file of metrics, by its folder and their name."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    for path in sorted(folder.rglob("metrics.jsonl")):
        for line in path.read_text().splitlines():
            for key, value in json.loads(line).items():
                if key == "loss" or key.endswith("/loss"):
                    found[f"{path.parent.relative_to(folder)} {key}"].append(value)
    return found


def compare_bits(
    c: Campaign, layout: Layout, what: str, name: str, *, is_needed: bool = True, theirs: str = ""
) -> bool:
    """Of all checkpoints below a folder; returns whether they are equal. `theirs`: the layout's folder, where it has another root."""
    if layout == c.one:
        return True
    wanted_in = c.place(c.one, name)
    found_in = c.place(layout, name.replace("study", theirs, 1) if theirs else name)
    folders = checkpoints(wanted_in)
    assert folders, f"there is no checkpoint in {wanted_in}"
    same = checkpoints(found_in) == folders
    different, leaves, furthest = [], 0, 0.0
    for folder in folders if same else ():
        for leaf, a, b in leaves_of_both(wanted_in / folder, found_in / folder):
            leaves += 1
            if a.dtype != b.dtype or a.tobytes() != b.tobytes():
                different.append(f"{folder}: {leaf}")
                apart = np.abs(a.astype(np.float64) - b.astype(np.float64)).max()
                furthest = max(furthest, float(apart))
    is_equal = same and not different
    told = "all bits equal" if is_equal else f"{len(different)} differ, by at most {furthest:.1e}"
    if not same:
        told = f"checkpoints {checkpoints(found_in)}, wanted {folders}"
    c.say(
        is_equal or (same and not is_needed),
        f"{layout} {what}: {leaves} leaves of {len(folders)} checkpoints, {told}",
    )
    return is_equal


def checkpoints(folder: pathlib.Path) -> list[str]:
    """Folders below that hold parameters, relative: whose manifest has their checksums, or that have a model.json beside it."""
    return sorted(
        str(path.parent.relative_to(folder))
        for path in folder.rglob("manifest.json")
        if (path.parent / "model.json").exists() or "checksums" in json.loads(path.read_text())
    )


def leaves_of_both(
    wanted: pathlib.Path, found: pathlib.Path
) -> Iterable[tuple[str, np.ndarray, np.ndarray]]:
    """Every leaf of two checkpoints."""
    with (
        contextlib.closing(open_checkpoint(wanted)) as a,
        contextlib.closing(open_checkpoint(found)) as b,
    ):
        assert a.specs().keys() == b.specs().keys(), f"{wanted} and {found} have other leaves"
        for leaf, spec in a.specs().items():
            index = whole(spec.shape)
            yield leaf, a.read(leaf, index), b.read(leaf, index)


Scores = dict[tuple[str, ...], dict[str, Any]]


def compare_scores(
    c: Campaign, layout: Layout, what: str, name: str, *, is_exact: bool, theirs: str = ""
) -> None:
    """Of all files of scores below a folder. Where models differ in rounding, how far scores are apart is told alone."""
    wanted = scores(c.place(c.one, name))
    found = scores(c.place(layout, name.replace("study", theirs, 1) if theirs else name))
    if not wanted or wanted.keys() != found.keys():
        c.say(False, f"{layout} {what}: {len(found)} scores, wanted {len(wanted)} of the same")
        return
    different = [key for key in wanted if wanted[key] != found[key]]
    apart = max(abs(wanted[k]["value"] - found[k]["value"]) for k in wanted)
    c.say(
        not (is_exact and different),
        f"{layout} {what}: {len(wanted)} scores, {len(different)} differ, by at most {apart:.2g}",
    )


def scores(folder: pathlib.Path) -> Scores:
    """Every line but for its seconds, by file, model, task and metric."""
    found: Scores = {}
    for place, lines in score_files.read_all(folder).items():
        for score in lines:
            keys = [str(score.get(k)) for k in ("model", "task", "prompt", "metric")]
            found[place, *keys] = score
    return found


def compare_examples(c: Campaign, layout: Layout, name: str) -> None:
    """Predictions of every example, and the scores of its choices."""
    wanted, found = (examples(c.place(each, name)) for each in (c.one, layout))
    furthest, values, texts = 0.0, 0, 0
    same = wanted.keys() == found.keys() and len(wanted) > 0
    for key in wanted if same else ():
        a, b = numbers(wanted[key]), numbers(found[key])
        values += len(a)
        same &= len(a) == len(b)
        furthest = max([furthest, *(apart(x, y) for x, y in zip(a, b, strict=False))])
        texts += wanted[key].get("prediction") != found[key].get("prediction")
    c.say(
        same and furthest <= RELATIVE and not texts,
        f"{layout} evaluate: {len(wanted)} examples, {texts} predictions differ, {values} numbers by at most {furthest:.1e}",
    )


def examples(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Every line of the files of examples, by file and number."""
    return {
        f"{path.relative_to(folder)}:{number}": json.loads(line)
        for path in sorted((folder / EXAMPLES).rglob("*.jsonl.gz"))
        for number, line in enumerate(gzip.decompress(path.read_bytes()).splitlines())
    }


def numbers(value: Any) -> list[float]:
    """All numbers in a JSON value."""
    if isinstance(value, Mapping):
        return [n for each in value.values() for n in numbers(each)]
    if isinstance(value, list):
        return [n for each in value for n in numbers(each)]
    return [float(value)] if isinstance(value, int | float) else []


def apart(a: float, b: float) -> float:
    """Relative; 0 where both are the same, infinite ones too."""
    return 0.0 if a == b else abs(a - b) / max(abs(a), abs(b)) if math.isfinite(a - b) else math.inf


def say_reads(
    c: Campaign,
    what: str,
    inputs: bench.Inputs,
    told: Sequence[Mapping[str, Any]],
    passes: int,
) -> None:
    """Whether each byte of the arrays was read once a pass by all processes together; samples and headers are told apart."""
    of_each = [sum(n for _, _, n, s in t["reads"] if not s) for t in told]
    sampled = sum(n for t in told for _, _, n, s in t["reads"] if s)
    least, most = math.inf, 0
    for path in sorted(p for p in inputs.files() if p.suffix == ".safetensors"):
        with contextlib.closing(ByteSource(path)) as source:
            first, size = min(read_header(source).offsets.values()), source.size
        times = np.zeros(size + 1, np.int8)
        for t in told:
            for file, offset, nbytes, is_sample in t["reads"]:
                if file == str(path) and not is_sample and offset >= first:
                    times[offset] += 1
                    times[offset + nbytes] -= 1
        times = np.cumsum(times[:-1], dtype=np.int8)[first:]
        least, most = min(least, int(times.min())), max(most, int(times.max()))
    c.say(
        (least, most) == (passes, passes),
        f"{what}: each byte read {least} to {most} times, wanted {passes};"
        f" {', '.join(f'{n / 1e6:,.1f}' for n in of_each)} MB by each process, {sampled / 1e6:,.1f} MB sampled in all",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with contextlib.ExitStack() as cleanup:
        folder = options.work_dir
        if folder is None:
            folder = pathlib.Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
        c = Campaign(folder.resolve(), options)
        for stage in options.stages:
            STAGES[stage](c, [options.one, *options.layouts])
    sys.exit(f"{c.failed} are not as they should be" if c.failed else 0)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    many = lambda of: lambda text: [of(each) for each in text.split(",")]  # noqa: E731
    add("--layouts", type=many(Layout.of), default=[Layout(2, 4), Layout(4, 2)])
    add("--one", type=Layout.of, default=Layout(1, 8), help="what they are compared with")
    add("--stages", type=many(str), default=list(STAGES), help="with commas, in this order")
    add("--limit", type=int, default=8, help="of evaluate: examples of each task")
    add("--whole", action="store_true", help="of study: quick.gin as it is")
    add("--parameters", type=float, default=2e7, help="of reads: of each input")
    add("--experts", type=int, default=4, help="of reads")
    add("--budget_bytes", type=float, default=256 * 2**20, help="of reads")
    add(
        "--work_dir",
        type=pathlib.Path,
        help="where outputs stay; a stage that is done there is left",
    )
    add("--verbose", action="store_true", help="all that the processes print, to stderr")
    options = parser.parse_args(arguments)
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"no such stages: {', '.join(unknown)}; there are {', '.join(STAGES)}")
    return options


if __name__ == "__main__":
    main()
