r"""Experts of a real model on real tasks, merged, evaluated and opened by `transformers`: every stage as its user runs it.

  python -m tests.campaigns.real_experts --checkpoint=/data/SmolLM2-135M-Instruct --data=/data/real/tasks --work_dir=/data/r4 \
    [--steps=40] [--limit=200] [--list]

From a Hugging Face folder: an expert of each of two tasks, by one prompt of each (batches of 16 rows of 64 tokens, rate 2e-5,
safetensors), both merged by four methods, base, experts and merges evaluated on both tasks. Each is opened by `transformers` and goes on from a prompt
(extra `peers`). Prints the table of scores; exit code 1 where the expert of rotten_tomatoes is below 0.82, or a model can't be opened. What is done is
not done again: every stage knows it, so --list, which prints the commands alone, says how to run one by hand.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import shlex
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from launch.tasks import table
from merging.evaluation.collect import SCORES, Score, ScoresFile
from tasks import catalog
from tests.launch.t5x import programs

TASKS = {"rotten_tomatoes": "tone", "trec": "asks"}  # and the prompt of each
METHODS = ("averaging", "task_arithmetic", "ties", "dare_ties")
WANTED = {"rotten_tomatoes": 0.82}  # of its expert, on its own task
PROMPT = "Review: a warm, funny and quick film.\nThe tone of this review is"
NEW_TOKENS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Campaign:
    """The runs of one folder.

    Attributes:
      checkpoint: a Hugging Face folder with its tokenizer.json.
      data: folder of JSON lines.
      folder: of outputs and logs.
      steps: of each expert.
      limit: examples of each task that are evaluated.
    """

    checkpoint: pathlib.Path
    data: pathlib.Path
    folder: pathlib.Path
    steps: int
    limit: int

    @property
    def experts(self) -> dict[str, pathlib.Path]:
        return {task: self.folder / task for task in TASKS}

    @property
    def models(self) -> dict[str, pathlib.Path]:
        """All that are evaluated and opened."""
        merged = {method: self.folder / method for method in METHODS}
        return {"base": self.checkpoint, **self.experts, **merged}

    def commands(self) -> Iterator[tuple[str, str, list[str]]]:
        """(name, module of launch, its arguments), in the order in which they need one another."""
        of_tasks = {
            "VOCABULARY": str(self.checkpoint / "tokenizer.json"),
            "LOCAL_DATA": str(self.data),
        }
        for task, folder in self.experts.items():
            macros = {
                "MIXTURE_OR_TASK_NAME": registered(task),
                "INITIAL_CHECKPOINT_PATH": str(self.checkpoint),
                "OUTPUT_DIR": str(folder),
                "TASK_FEATURE_LENGTHS": {"inputs": 56, "targets": 8},
                "TRAIN_STEPS": self.steps,
                "BATCH_SIZE": 16,
                "LEARNING_RATE": 2e-5,
                "DROPOUT_RATE": 0.0,
                "FORMAT": "safetensors",
                "CACHE_DIR": str(self.folder / "packed"),
            }
            yield (
                task,
                "finetune",
                ["--gin_file=gin_configs/runs/expert.gin", *bound(macros | of_tasks)],
            )
        for method in METHODS:
            yield (
                method,
                "merge",
                [
                    f"--base={self.checkpoint}",
                    f"--experts={','.join(map(str, self.experts.values()))}",
                    f"--method={method}",
                    f"--output={self.folder / method}",
                ],
            )
        macros = {
            "CHECKPOINTS": {name: str(path) for name, path in self.models.items()},
            "INITIAL_CHECKPOINT_PATH": None,
            "MIXTURE_OR_TASK_NAME": [registered(task) for task in TASKS],
            "TASK_FEATURE_LENGTHS": {"inputs": 192, "targets": 16},
            "LIMIT": self.limit,
            "OUTPUT_DIR": str(self.folder / "scores"),
        }
        yield (
            "scores",
            "evaluate",
            [
                "--gin_file=gin_configs/runs/evaluate.gin",
                *bound(macros | of_tasks),
            ],
        )

    def run(self) -> None:
        """Every stage to its end. Raises RuntimeError with the last lines of one that fails."""
        for name, module, arguments in self.commands():
            print(f"launch.{module} {name}", flush=True)
            programs.own(module, *arguments, log=self.folder / f"{name}.log")


def registered(task: str) -> str:
    """By one of its prompts."""
    return catalog.task_name(catalog.datasets()[task], TASKS[task], "local")


def bound(macros: dict[str, object]) -> list[str]:
    return [f"--gin.{name}={value!r}" for name, value in macros.items()]


def told(scores: Sequence[Score], models: Sequence[str]) -> tuple[list[str], bool]:
    """The table of scores, a line a model, and whether the experts are as good as is wanted."""
    values = {
        (each.model, each.task.removesuffix("_local")): each.value
        for each in scores
        if each.metric == "accuracy"
    }
    rows = [["model", *TASKS]]
    rows += [[model, *(f"{values[model, task]:.3f}" for task in TASKS)] for model in models]
    lines, is_good = list(table(rows)), True
    for task, wanted in WANTED.items():
        found = values[task, task]
        is_good &= found >= wanted
        words = "reaches" if found >= wanted else "NOT SO: is to reach"
        lines.append(f"the expert of {task} {words} {wanted}: {found:.3f}")
    return lines, is_good


def generated(folder: pathlib.Path, tokenizer_of: pathlib.Path) -> str:
    """What a model goes on with behind the prompt, by `transformers` alone. Raises what it raises, and ValueError for logits that aren't finite."""
    import torch
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_of / "tokenizer.json")
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.tensor([tokenizer.encode(PROMPT)])
    with torch.inference_mode():
        if not np.isfinite(model(tokens).logits.numpy()).all():
            raise ValueError(f"{folder}: its logits are not finite")
        found = model.generate(tokens, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(found[0, tokens.shape[1] :])


def main() -> None:
    """Runs what is missing, prints, and fails where it must."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("checkpoint", "data", "work_dir"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--list", action="store_true", help="prints the commands, and runs none")
    arguments = parser.parse_args()
    campaign = Campaign(
        checkpoint=arguments.checkpoint.resolve(),
        data=arguments.data.resolve(),
        folder=arguments.work_dir.resolve(),
        steps=arguments.steps,
        limit=arguments.limit,
    )
    if arguments.list:
        for _, module, more in campaign.commands():
            print(shlex.join(["python", "-m", f"launch.{module}", *more]))
        return
    campaign.run()
    for name, folder in campaign.models.items():
        text = generated(folder, campaign.checkpoint)
        print(f"{name} by transformers: {text!r}", flush=True)
    scores = ScoresFile(campaign.folder / "scores" / SCORES).scores
    lines, is_good = told(scores, list(campaign.models))
    print("\n".join(lines))
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
