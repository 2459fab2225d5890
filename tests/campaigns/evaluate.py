r"""Our choice log-likelihoods beside those of `transformers` in float32, on every example of real tasks.

  MERGING_REAL_DATA=/data/real MERGING_REAL_CHECKPOINTS=/data/checkpoints \
    python -m tests.campaigns.evaluate --tasks=copa,rte,wic,trec,mrpc,openbookqa [--limit=100] [--prompts=1]

Prints, of each task, the examples, the greatest difference of a log-likelihood, the predictions that differ and the near-ties; exit code 1 where
a difference is above the tolerance, or a prediction differs that is no near-tie. Examples/s are of this run only.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

TASKS = ("copa", "rte", "wic", "trec", "mrpc", "openbookqa")
TOLERANCE = 1e-3
NEAR_TIE = 2 * TOLERANCE  # choices whose scores differ by less may come in either order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """One task of one prompt."""

    name: str
    examples: int
    greatest: float
    different: int
    near_ties: int
    ours_s: float
    theirs_s: float

    @property
    def is_good(self) -> bool:
        return self.greatest <= TOLERANCE and self.different <= self.near_ties


def compare(
    folder: pathlib.Path,
    real_data: pathlib.Path,
    tasks: Sequence[str],
    *,
    limit: int | None,
    prompts: int | None,
) -> Iterator[Compared]:
    """Each task's comparison."""
    import jax

    from launch.evaluation import Examples, evaluation_tasks
    from merging.evaluation.evaluator import Evaluator, Options
    from merging.models import huggingface
    from merging.models.families import model_of
    from merging.models.parameters import read_params
    from merging.partitioning import MeshShape
    from tasks import catalog

    registered = {
        "vocabulary": str(folder / "tokenizer.json"),
        "local_data": str(real_data / "tasks"),
    }
    datasets = [catalog.datasets()[task] for task in tasks]
    names = [
        catalog.task_name(each, prompt, "local") for each in datasets for prompt in each.prompts
    ]
    asked = Examples(
        mixture_or_task_name=names,
        lengths={"inputs": 1024, "targets": 256},
        limit=limit,
        num_prompts=prompts,
    )
    made, _ = evaluation_tasks(asked, registered)
    config = huggingface.read_config(folder, param_dtype="float32", dtype="float32")
    mesh = MeshShape().mesh(jax.devices()[:1])
    evaluator = Evaluator(model_of(config), made, mesh=mesh, options=Options(batch_tokens=2_048))
    started = time.monotonic()
    results = evaluator(read_params(folder, config, mesh), folder.name)
    ours_s = time.monotonic() - started
    model = reference(folder)
    for result in results:
        started = time.monotonic()
        wanted = [
            log_likelihoods(model, example.prompt, example.choices)
            for example in result.task.examples
        ]
        theirs_s = time.monotonic() - started
        best = [np.sort(each)[::-1] for each in wanted]
        yield Compared(
            name=f"{result.task.name} {result.task.prompt}",
            examples=len(wanted),
            greatest=max(
                float(np.abs(a - b).max())
                for a, b in zip(result.choice_scores, wanted, strict=True)
            ),
            different=sum(
                int(np.argmax(b)) != a for a, b in zip(result.predictions, wanted, strict=True)
            ),
            near_ties=sum(len(each) > 1 and each[0] - each[1] < NEAR_TIE for each in best),
            ours_s=ours_s / len(results),
            theirs_s=theirs_s,
        )


def reference(folder: pathlib.Path) -> Any:
    """The model of `transformers`, in float32."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def log_likelihoods(model: Any, prompt: np.ndarray, choices: Sequence[np.ndarray]) -> np.ndarray:
    """Of each choice behind the prompt: whole rows, no cache; what fills the shorter up stands behind them, where no token sees it."""
    import torch

    longest = max(map(len, choices))
    rows = np.zeros((len(choices), len(prompt) + longest), np.int64)
    for row, choice in zip(rows, choices, strict=True):
        row[: len(prompt) + len(choice)] = [*prompt, *choice]
    with torch.inference_mode():
        logits = model(torch.tensor(rows[:, :-1]), logits_to_keep=longest).logits
        log_probs = torch.log_softmax(logits.double(), dim=-1)
    return np.array(
        [
            float(of_row[torch.arange(len(choice)), torch.tensor(choice.astype(np.int64))].sum())
            for of_row, choice in zip(log_probs, choices, strict=True)
        ]
    )


def main() -> None:
    """Compares, prints, and fails where it must."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--prompts", type=int, default=None)
    parser.add_argument("--model", default="smollm2")
    asked = parser.parse_args()
    folder = pathlib.Path(os.environ["MERGING_REAL_CHECKPOINTS"]) / asked.model
    data = pathlib.Path(os.environ["MERGING_REAL_DATA"])
    is_good = True
    for each in compare(
        folder, data, asked.tasks.split(","), limit=asked.limit, prompts=asked.prompts
    ):
        is_good &= each.is_good
        print(
            f"{each.name:32} {each.examples:5,} examples, greatest difference {each.greatest:.2e},"
            f" {each.different} predictions differ, {each.near_ties} near-ties",
            flush=True,
        )
    sys.exit(0 if is_good else "not equal")


if __name__ == "__main__":
    main()
