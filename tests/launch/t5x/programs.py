"""T5X's programs run as a user runs them, and what its evaluator wrote beside what launch.evaluate wrote."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch import devices
from launch.pod import local
from merging.evaluation.collect import ScoresFile

CONFIGS = "gin_configs/t5x"

# On CPU T5X asks for its mesh so: two devices along `model`, the others along `data`.
TWO_ALONG_MODEL = {"NUM_PARTITIONS": None, "MODEL_PARALLEL_SUBMESH": (1, 2, 1, 1)}

# What T5X's programs write of each example of a task, below their output.
EVALUATED = "inference_eval/{task}-0*.jsonl"
INFERRED = "{task}-{mode}.jsonl-00000-of-00001"


def run(
    program: str,
    files: Sequence[str],
    macros: Mapping[str, Any],
    *,
    log: pathlib.Path,
    processes: int = 1,
    virtual_devices: int = 8,
    timeout_s: float = 3600.0,
) -> None:
    """Runs `t5x.train`, `t5x.eval` or `t5x.infer` to its end.

    Args:
      program: its module.
      files: gin files.
      macros: and their values.
      log: gets what it wrote.
      processes, virtual_devices: of this machine; devices in all.

    Raises RuntimeError with its last lines where it fails.
    """
    bindings = [f"--gin.{name}={value!r}" for name, value in macros.items()]
    named = [f"--gin_file={file}" for file in files]
    starter = ["launch.t5x.start"] if processes > 1 else []
    command = [sys.executable, "-m", *starter, program, *named, *bindings]
    log.parent.mkdir(parents=True, exist_ok=True)
    if processes > 1:
        each = virtual_devices // processes
        outputs = local.run_local(
            command, processes=processes, devices=each, timeout_s=timeout_s, echo=[].append
        )
        log.write_text("\n".join(outputs))
        return
    environment = os.environ | devices.cpu_environment(os.environ, devices=virtual_devices)
    with log.open("w") as file_of_log:
        done = subprocess.run(
            command,
            env=environment,
            stdout=file_of_log,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"{program} ended with {done.returncode}: {log.read_text()[-3000:]}")


def own(module: str, *arguments: str, log: pathlib.Path) -> None:
    """Runs one of our entry points to its end."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", f"launch.{module}", *arguments]
    environment = os.environ | devices.cpu_environment(os.environ, devices=1)
    done = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    log.write_text(done.stdout)
    if done.returncode:
        raise RuntimeError(f"launch.{module} ended with {done.returncode}: {done.stdout[-3000:]}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """What two evaluations of one model say.

    Attributes:
      choices: whose log-likelihoods were compared.
      greatest: difference of one.
      texts, different: generated, and those that differ.
      metrics, furthest: values of metrics, and the greatest difference of one.
    """

    choices: int
    greatest: float
    texts: int
    different: int
    metrics: int
    furthest: float

    @property
    def is_good(self) -> bool:
        return self.greatest <= 1e-4 and self.different == 0 and self.furthest <= 1e-6

    def __str__(self) -> str:
        said = (
            f"{self.choices} log-likelihoods differ by at most {self.greatest:.1e}, {self.different} of {self.texts} texts"
            " differ"
        )
        return (
            f"{said}, {self.metrics} metrics by at most {self.furthest:.1e}"
            if self.metrics
            else said
        )


def compared(
    theirs: pathlib.Path, ours: pathlib.Path, model: str, files: str = EVALUATED
) -> Compared:
    """An output of T5X beside one of launch.evaluate with WRITE_EXAMPLES, task by task and example by example.

    Args:
      theirs: output of t5x.eval, or, with files=INFERRED, of t5x.infer in both modes.
      ours: of launch.evaluate.
      model: its name in `ours`.
      files: where `theirs` has the examples of a task.
    """
    scores = {
        (s.task, s.prompt, s.metric): s.value
        for s in ScoresFile(ours / "scores.jsonl").scores
        if s.model == model
    }
    choices, greatest, texts, different, differences = 0, 0.0, 0, 0, []
    for file in sorted((ours / "examples" / model).glob("*.jsonl.gz")):
        records = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
        task, prompt = next(
            key[:2] for key in scores if "_".join(key[:2]) == file.name.removesuffix(".jsonl.gz")
        )
        is_ranked = "choices" in records[0]
        name = f"{task.removesuffix('_mini')}_{prompt}_mini{'_rank' if is_ranked else ''}"
        mode = "score" if is_ranked else "predict"
        (written,) = theirs.glob(files.format(task=name, mode=mode))
        lines = [json.loads(line) for line in written.read_text().splitlines()]
        if is_ranked:
            pairs = [
                (c, x)
                for r in records
                for c, x in zip(r["choices"], r["choice_scores"], strict=True)
            ]
            assert [_inputs(line)["targets_pretokenized"] for line in lines] == [
                c for c, _ in pairs
            ]
            expected, found = [x for _, x in pairs], [line["score"] for line in lines]
            choices += len(pairs)
            greatest = max(greatest, float(np.abs(np.subtract(expected, found)).max()))
        else:
            assert [_inputs(line)["inputs_pretokenized"] for line in lines] == [
                r["inputs"] for r in records
            ]
            texts += len(records)
            different += sum(
                line["prediction"] != record["prediction"]
                for line, record in zip(lines, records, strict=True)
            )
        if files == EVALUATED:
            found = metrics(theirs, name)
            differences += [
                abs(value - found[metric])
                for (t, p, metric), value in scores.items()
                if (t, p) == (task, prompt)
            ]
    return Compared(
        choices=choices,
        greatest=greatest,
        texts=texts,
        different=different,
        metrics=len(differences),
        furthest=max(differences, default=0.0),
    )


def _inputs(line: Mapping[str, Any]) -> dict[str, Any]:
    return line.get("input") or line["inputs"]  # of t5x.eval and of t5x.infer


def metrics(theirs: pathlib.Path, task: str) -> dict[str, float]:
    """The values that t5x.eval wrote of a task, the last ones, by metric."""
    file = theirs / "inference_eval" / f"{task}-metrics.jsonl"
    return json.loads(file.read_text().splitlines()[-1])


def examples(theirs: pathlib.Path) -> dict[str, str]:
    """All that t5x.eval wrote of examples, by file."""
    return {f.name: f.read_text() for f in theirs.glob(EVALUATED.format(task="*"))}
