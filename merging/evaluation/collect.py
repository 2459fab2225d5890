"""From what a model gave to scores: predictions, metrics, and the files that hold them.

`scores.jsonl` has one line for each (model, task, prompt, metric). What is appended appears whole or not at all, so that a run
that was killed goes on behind its last whole task.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from etils import epath

from merging.checkpoints.storage import put_whole
from merging.evaluation.examples import Task

SCORES = "scores.jsonl"
EXAMPLES = "examples"

# How choices of different length are compared: by the sum of their tokens' log-probabilities (T0), by the mean, or by how much
# likelier the prompt makes them than the start token alone does.
Normalization = Literal["sum", "tokens", "unconditional"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """One number.

    Attributes:
      model, task, prompt, metric: of what.
      value, stderr: and its standard error; NaN of one example.
      count: examples.
      chance: what guessing gives; None where there is no such thing.
      seconds: its task's share of the time of the run.
      ties: examples whose best choices had equal scores: the first of them counts.
      cut_inputs, cut_targets: examples whose prompt or choices lost tokens; see `examples.Task`.
    """

    model: str
    task: str
    prompt: str
    metric: str
    value: float
    stderr: float
    count: int
    chance: float | None
    seconds: float
    ties: int = 0
    cut_inputs: int = 0
    cut_targets: int = 0

    def line(self) -> str:
        """As JSON, NaN as null."""
        values = {
            k: None if isinstance(v, float) and math.isnan(v) else v
            for k, v in dataclasses.asdict(self).items()
        }
        return json.dumps(values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What one model gave on one task.

    Attributes:
      task: with its examples.
      scores: the metrics' values.
      predictions: numbers of choices, or texts; of a loss the texts' log-probabilities.
      choice_scores: of each example's choices, as they were compared; empty where the answer is generated.
      is_greedy: of each choice, whether the model would have written it: no token is likelier than any of its tokens.
      ties: examples whose best choices had equal scores: the first of them counts.
    """

    task: Task
    scores: Sequence[Score]
    predictions: Sequence[Any]
    choice_scores: Sequence[np.ndarray]
    is_greedy: Sequence[np.ndarray] = ()
    ties: int = 0

    def records(self) -> Iterable[dict[str, Any]]:
        """Every example, for JSON lines."""
        for i, example in enumerate(self.task.examples):
            record: dict[str, Any] = {
                "id": example.id,
                "inputs": example.prompt_text,
                "target": example.truth,
                "prediction": self.predictions[i],
            }
            if self.task.kind != "generate":
                record["choices"] = list(example.choices_text)
                record["choice_scores"] = [float(each) for each in self.choice_scores[i]]
            yield record


def result(
    task: Task,
    model: str,
    *,
    log_probs: Sequence[np.ndarray] | None = None,
    is_greedy: Sequence[np.ndarray] = (),
    unconditional: Sequence[np.ndarray] | None = None,
    texts: Sequence[str] | None = None,
    normalization: Normalization = "sum",
    seconds: float,
) -> Result:
    """Judges what a model gave on one task: log-probabilities of each example's choices, or texts.

    Raises ValueError where a score is not a number.
    """
    where = f"model {model}, task {task.name}, prompt {task.prompt}"
    choice_scores: list[np.ndarray] = []
    ties = 0
    if task.kind == "generate":
        predictions: list[Any] = list(texts)
        values = task.metric([each.truth for each in task.examples], predictions)
    else:
        choice_scores = list(log_probs)
        for example, scores in zip(task.examples, choice_scores, strict=True):
            if np.isnan(scores).any():
                raise ValueError(
                    f"{where}, example {example.id}: a choice's log-probability is NaN"
                )
        if task.kind == "loss":
            predictions = [float(each.sum()) for each in choice_scores]
            values = losses(task, predictions)
        else:
            choice_scores = [
                _compared(
                    example.choices,
                    scores,
                    None if unconditional is None else unconditional[i],
                    normalization,
                )
                for i, (example, scores) in enumerate(
                    zip(task.examples, choice_scores, strict=True)
                )
            ]
            predictions = [
                int(np.argmax(each)) for each in choice_scores
            ]  # of equal ones the first
            ties = sum(int(np.sum(each == each.max()) > 1) for each in choice_scores)
            values = task.metric([each.truth for each in task.examples], predictions)
    scores = [
        Score(
            model=model,
            task=task.name,
            prompt=task.prompt,
            metric=name,
            value=float(value),
            stderr=float(values.get(f"{name}_stderr", math.nan)),
            count=len(task.examples),
            chance=task.chance,
            seconds=round(seconds, 3),
            ties=ties,
            cut_inputs=task.cut_inputs,
            cut_targets=task.cut_targets,
        )
        for name, value in values.items()
        if not name.endswith("_stderr")
    ]
    return Result(
        task=task,
        scores=scores,
        predictions=predictions,
        choice_scores=choice_scores,
        is_greedy=is_greedy,
        ties=ties,
    )


def _compared(
    choices: Sequence[np.ndarray],
    scores: np.ndarray,
    unconditional: np.ndarray | None,
    normalization: Normalization,
) -> np.ndarray:
    if normalization == "tokens":
        return scores / np.array([len(each) for each in choices])
    if normalization == "unconditional":
        return scores - unconditional
    return scores


def losses(task: Task, log_probs: Sequence[float]) -> dict[str, float]:
    """Nats per token and bits per byte over all texts: ratios of sums, with the ratio estimator's standard error."""
    nats = -np.array(log_probs, np.float64)
    tokens = np.array([sum(map(len, each.choices)) for each in task.examples], np.float64)
    nbytes = np.array([sum(each.nbytes) for each in task.examples], np.float64)
    values = {}
    for name, amount, per in (
        ("nats_per_token", nats, tokens),
        ("bits_per_byte", nats / math.log(2), nbytes),
    ):
        if per.sum() > 0:
            ratio = amount.sum() / per.sum()
            n = len(per)
            residual = np.square(amount - ratio * per).sum()
            values[name] = ratio
            values[f"{name}_stderr"] = (
                math.sqrt(n / (n - 1) * residual) / per.sum() if n > 1 else math.nan
            )
    return values


# ---- files --------------------------------------------------------------------------------------------------------


class ScoresFile:
    """`scores.jsonl` of a folder: what is there, and more of it. One process writes it."""

    def __init__(self, path: epath.PathLike):
        """Reads what is there. Raises ValueError for a line that is not a score."""
        self.path = epath.Path(path)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.scores = [self._read(number, line) for number, line in enumerate(lines, 1)]

    def _read(self, number: int, line: str) -> Score:
        try:
            values = json.loads(line)
            for name in ("value", "stderr"):
                values[name] = math.nan if values[name] is None else values[name]
            return Score(**values)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{self.path}:{number} is not a score: {line[:200]!r} ({error})"
            ) from error

    @property
    def done(self) -> set[tuple[str, str, str]]:
        """(model, task, prompt) of all that is there."""
        return {_group(each) for each in self.scores}

    def append(self, results: Iterable[Result]) -> None:
        """More scores, all of them or, if this is killed, none. The file is put anew: a study's has some megabytes."""
        self.scores += [score for each in results for score in each.scores]
        put_whole(self.path, "".join(score.line() + "\n" for score in self.scores).encode())


def put_scores(folder: epath.Path, results: Iterable[Result]) -> None:
    """The scores of a whole run as `scores.jsonl`, in place of what is there."""
    lines = [score.line() + "\n" for each in results for score in each.scores]
    put_whole(folder / SCORES, "".join(lines).encode())


def cut(results: Iterable[Result]) -> dict[str, dict[str, int]]:
    """Of each task over its prompts: examples, and those whose inputs or targets lost tokens to the lengths."""
    found: dict[str, dict[str, int]] = {}
    for each in results:
        counts = found.setdefault(each.task.name, {"examples": 0, "inputs": 0, "targets": 0})
        counts["examples"] += len(each.task.examples)
        counts["inputs"] += each.task.cut_inputs
        counts["targets"] += each.task.cut_targets
    return found


def total_ties(scores: Iterable[Score]) -> int:
    """Of all models and tasks, each counted once, however many metrics it has."""
    return sum({_group(score): score.ties for score in scores}.values())


def _group(score: Score) -> tuple[str, str, str]:
    return score.model, score.task, score.prompt


def write_examples(folder: epath.Path, model: str, each: Result) -> None:
    """Every example of a task, in `examples/<model>/<task>_<prompt>.jsonl.gz`, whole or not at all."""
    place = folder / EXAMPLES / model.replace("/", "_").strip("._")
    place.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in each.records())
    name = f"{each.task.name}_{each.task.prompt}.jsonl.gz"
    put_whole(place / name, gzip.compress(text.encode(), mtime=0))
