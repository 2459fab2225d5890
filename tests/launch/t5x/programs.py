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


def run(
    program: str,
    files: Sequence[str],
    macros: Mapping[str, Any],
    *,
    log: pathlib.Path,
    more: Sequence[str] = (),
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
      more: further arguments.
      processes, virtual_devices: of this machine; devices in all.

    Raises RuntimeError with its last lines where it fails.
    """
    bindings = [f"--gin.{name}={value!r}" for name, value in macros.items()]
    named = [f"--gin_file={file}" for file in files]
    command = [sys.executable, "-m", "launch.t5x.start", program, *named, *bindings, *more]
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
        return (
            f"{self.choices} log-likelihoods differ by at most {self.greatest:.1e}, {self.different} of {self.texts} texts"
            f" differ, {self.metrics} metrics by at most {self.furthest:.1e}"
        )


def compared(theirs: pathlib.Path, ours: pathlib.Path, model: str) -> Compared:
    """An output of t5x.eval beside one of launch.evaluate with WRITE_EXAMPLES, task by task and example by example."""
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
        dataset = task.removesuffix("_mini")
        is_ranked = "choices" in records[0]
        name = f"{dataset}_{prompt}_mini{'_rank' if is_ranked else ''}"
        (written,) = (theirs / "inference_eval").glob(f"{name}-0*.jsonl")
        lines = [json.loads(line) for line in written.read_text().splitlines()]
        (last,) = (
            (theirs / "inference_eval" / f"{name}-metrics.jsonl").read_text().splitlines()[-1:]
        )
        metrics = json.loads(last)
        if is_ranked:
            expected = np.array([score for record in records for score in record["choice_scores"]])
            found = np.array([line["score"] for line in lines])
            assert [line["input"]["targets_pretokenized"] for line in lines] == [
                c for r in records for c in r["choices"]
            ]
            choices += len(expected)
            greatest = max(greatest, float(np.abs(expected - found).max()))
        else:
            pairs = [
                (line["prediction"], record["prediction"])
                for line, record in zip(lines, records, strict=True)
            ]
            texts += len(pairs)
            different += sum(a != b for a, b in pairs)
        differences += [
            abs(value - metrics[metric])
            for (t, p, metric), value in scores.items()
            if (t, p) == (task, prompt)
        ]
    return Compared(
        choices=choices,
        greatest=greatest,
        texts=texts,
        different=different,
        metrics=len(differences),
        furthest=max(differences),
    )


def metrics(theirs: pathlib.Path) -> dict[str, float]:
    """The main values of an output of t5x.eval by task."""
    found = {}
    for file in sorted((theirs / "inference_eval").glob("*-metrics.jsonl")):
        values = json.loads(file.read_text().splitlines()[-1])
        name = next(name for name in values if name != "step")
        found[f"{file.name.removesuffix('-metrics.jsonl')} {name}"] = values[name]
    return found
