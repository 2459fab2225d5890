r"""Whether small models learn the miniature: scores of a pretrained and an instruction-tuned base and of experts, judged.

  python -m launch.evaluate --gin_file=gin_configs/runs/evaluate.gin --gin.MIXTURE_OR_TASK_NAME='"held_in_mini"' \
    --gin.CHECKPOINTS='{"untrained": "/data/untrained", "pretrained": "/data/base", "instructed": "/data/instructed",
    "expert_sentiment": "/data/experts/sentiment_mini"}' --gin.INITIAL_CHECKPOINT_PATH=None --gin.OUTPUT_DIR='"/data/scores"'
  python -m tests.campaigns.learn --scores=/data/scores [--untrained=untrained] [--pretrained=pretrained] [--instructed=instructed]

A model whose name ends with a category (or with its mixture's name) is that category's expert, and is to have learnt it: where choices are ranked, 10
points above chance and above the most frequent answer; where answers are written, twice the score of the untrained base. The
instruction-tuned base is to beat the pretrained one in 6 of the 8 held-in categories. Scores are means over prompts of the main metric, then over
a category's datasets. Prints a table, a line of each expert and a last one; exit code 1 where one of these fails or a score that it needs is missing.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from launch.tasks import table
from merging.evaluation.collect import SCORES, Score, ScoresFile
from tasks import catalog
from tasks.dataset import Dataset
from tasks.metrics import METRICS
from tasks.miniature.summary import summary

POINTS = 0.10
TIMES = 2.0
CATEGORIES_TO_WIN = 6
SUFFIX = catalog.suffix("mini")

Values = Mapping[str, Mapping[str, float]]  # model -> dataset -> score


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """The datasets of one category whose answers are ranked, or written.

    Attributes:
      chance, majority: mean share that guessing, and the most frequent answer, get right.
    """

    category: str
    is_ranked: bool
    datasets: Sequence[str]
    chance: float
    majority: float

    @property
    def name(self) -> str:
        return f"{self.category} ({'ranked' if self.is_ranked else 'written'})"

    def score(self, values: Mapping[str, float]) -> float | None:
        """The mean over datasets; None where one is missing."""
        return mean([values.get(name) for name in self.datasets])


def mean(each: Sequence[float | None]) -> float | None:
    """None where one is missing."""
    return None if None in each else float(np.mean(each))


def held_in() -> list[Dataset]:
    """The miniature's datasets that count."""
    return [
        each
        for each in catalog.datasets().values()
        if "mini" in each.sources and catalog.role(each) == catalog.HELD_IN and each.is_counted
    ]


def parts(datasets: Iterable[Dataset]) -> list[Part]:
    """Each category's two kinds, those that it has. Reads every test row, for chance and majority."""
    found: dict[tuple[str, bool], list[str]] = {}
    for each in datasets:
        kind = each.category, METRICS[each.metric].is_ranked
        found.setdefault(kind, []).append(each.name)
    made = []
    for (category, is_ranked), names in found.items():
        told = [summary(name) for name in names]
        made.append(
            Part(
                category=category,
                is_ranked=is_ranked,
                datasets=names,
                chance=float(np.mean([each.chance for each in told])),
                majority=float(np.mean([each.majority for each in told])),
            )
        )
    return made


def values_of(scores: Iterable[Score], mains: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """The mean over prompts of each dataset's main metric, by model. `mains`: that metric by dataset."""
    each: dict[str, dict[str, list[float]]] = collections.defaultdict(dict)
    for score in scores:
        dataset = score.task.removesuffix(SUFFIX)
        if mains.get(dataset) == score.metric:
            each[score.model].setdefault(dataset, []).append(score.value)
    return {
        model: {name: float(np.mean(found)) for name, found in of_model.items()}
        for model, of_model in each.items()
    }


def expert_of(model: str, categories: Iterable[str]) -> str | None:
    """The category of a model's name."""
    name = model.removesuffix(SUFFIX)
    return next((each for each in categories if name.endswith(each)), None)


def learnt(part: Part, values: Mapping[str, float], untrained: float | None) -> tuple[bool, str]:
    """Whether an expert has learnt a part of its category, and in words."""
    score = part.score(values)
    if score is None:
        return False, f"{part.name} is not evaluated"
    if part.is_ranked:
        guessed = max(part.chance, part.majority)
        told = f"{score:.3f}, {100 * (score - guessed):+.0f} points beside guessing ({guessed:.3f})"
        return score >= guessed + POINTS, f"{part.name} {told}"
    if untrained is None:
        return False, f"{part.name} {score:.3f}, and the untrained base is not evaluated"
    is_good = score > 0 and score >= TIMES * untrained
    return is_good, f"{part.name} {score:.3f}, untrained {untrained:.3f}"


def judge(
    values: Values, each: Sequence[Part], *, untrained: str, pretrained: str, instructed: str
) -> list[tuple[bool, str]]:
    """(holds, in words) of every expert, and of both bases."""
    categories = list(dict.fromkeys(part.category for part in each))
    found = []
    for model, of_model in values.items():
        own = expert_of(model, categories)
        for part in each:
            if part.category == own:
                of_untrained = part.score(values.get(untrained, {}))
                holds, told = learnt(part, of_model, of_untrained)
                found.append((holds, f"{model}: {told}"))
    if not found:
        found.append((False, "no model's name ends with a category: no expert is judged"))
    wins, missing = 0, []
    for category in categories:
        names = [name for part in each if part.category == category for name in part.datasets]
        before, after = (
            mean([values.get(model, {}).get(name) for name in names])
            for model in (pretrained, instructed)
        )
        if before is None or after is None:
            missing.append(category)
        else:
            wins += after > before
    told = f"{instructed} beats {pretrained} in {wins} of {len(categories)} categories, wanted {CATEGORIES_TO_WIN}"
    lacking = f"; not evaluated by both: {', '.join(missing)}" if missing else ""
    found.append((wins >= CATEGORIES_TO_WIN, told + lacking))
    return found


def main() -> None:
    """Reads, prints, and fails where it must."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scores", required=True, help="folders of launch.evaluate, with commas")
    for name in ("untrained", "pretrained", "instructed"):
        parser.add_argument(f"--{name}", default=name, help="the model's name in the scores")
    arguments = parser.parse_args()
    files = [pathlib.Path(folder) / SCORES for folder in arguments.scores.split(",")]
    missing = [str(file) for file in files if not file.exists()]
    if missing:
        sys.exit(f"there is no {', '.join(missing)}: give outputs of launch.evaluate")
    datasets = held_in()
    mains = {each.name: METRICS[each.metric].main for each in datasets}
    values = values_of((score for file in files for score in ScoresFile(file).scores), mains)
    each = parts(datasets)
    rows = [["category", "chance", "majority", *values]]
    for part in each:
        of_models = [part.score(of_model) for of_model in values.values()]
        guesses = [f"{part.chance:.3f}" if part.is_ranked else "", f"{part.majority:.3f}"]
        shown = ["" if score is None else f"{score:.3f}" for score in of_models]
        rows.append([part.name, *guesses, *shown])
    print("\n".join(table(rows)))
    named = {key: getattr(arguments, key) for key in ("untrained", "pretrained", "instructed")}
    judged = judge(values, each, **named)
    for holds, told in judged:
        print(told if holds else f"NOT SO: {told}")
    sys.exit(not all(holds for holds, _ in judged))


if __name__ == "__main__":
    main()
