r"""T5X and this system as one workflow: trained, merged and evaluated from one to the other and back.

  python -m tests.campaigns.t5x --work_dir=/data/t5x [--steps=100] [--t5]

Needs T5X (WORKSPACE.md says how). Without --t5: a base of launch.finetune as T5X's; two experts on two miniature categories by t5x.train, one a legacy
checkpoint, one Orbax; merged by every method, T5X in and out; each merged model by t5x.eval and by launch.evaluate, compared example
by example; t5x.train from a merged model; an expert of launch.finetune by t5x.eval; t5x.eval on two processes. With --t5: T5 1.1 and scalable T5 (scanned), tiny,
trained by t5x.train, merged, evaluated and trained on. Prints a line of each, exit code 1 where one differs; what is done is not done again.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from merging.methods import METHODS
from tests.launch.t5x import programs
from tests.launch.t5x.programs import TWO_ALONG_MODEL, Compared, compared

RANKED, BOTH = (
    "sentiment_mini",
    "closed_book_qa_mini",
)  # choices alone; choices and generated answers
LENGTHS = {"inputs": 128, "targets": 32}
T5_TWO_ALONG_MODEL = {
    "PjitPartitioner.num_partitions": None,
    "PjitPartitioner.model_parallel_submesh": (1, 2, 1, 1),
}


class Campaign:
    """The runs of one folder."""

    def __init__(self, folder: pathlib.Path, steps: int):
        self.folder, self.steps = folder, steps
        self.is_good = True

    def tell(self, what: str, found: Compared | None = None) -> None:
        if found is not None:
            self.is_good &= found.is_good
            what = f"{what}: {found}"
        print(what, flush=True)

    def train(self, name: str, start: pathlib.Path, mixture: str, **macros: Any) -> pathlib.Path:
        """The checkpoint of a run of t5x.train."""
        steps = macros.pop("TRAIN_STEPS", self.steps)
        folder = self.folder / name
        made = folder / f"checkpoint_{steps}"
        more = [f"--gin.train.{key}={value}" for key, value in macros.items()]
        if not made.exists():
            programs.run(
                "t5x.train",
                [f"{programs.CONFIGS}/finetune.gin"],
                {
                    "MODEL_DIR": str(folder),
                    "INITIAL_CHECKPOINT_PATH": str(start),
                    "MIXTURE_OR_TASK_NAME": mixture,
                    "TASK_FEATURE_LENGTHS": LENGTHS,
                    "TRAIN_STEPS": steps,
                    "SAVE_PERIOD": steps,
                    "EVAL_PERIOD": steps,
                    "EVAL_STEPS": 1,
                    "BATCH_SIZE": 16,
                    **TWO_ALONG_MODEL,
                },
                log=self.folder / f"{name}.log",
                more=["--gin.train.infer_eval_dataset_cfg=None", *more],
            )
        return made

    def evaluate(
        self, name: str, checkpoint: pathlib.Path, mixture: str, processes: int = 1
    ) -> pathlib.Path:
        """The output of t5x.eval."""
        folder = self.folder / name
        mixture = f"{mixture}_rank"
        if not (folder / f"eval.{mixture}.ckpt").exists():
            programs.run(
                "t5x.eval",
                [f"{programs.CONFIGS}/eval.gin"],
                {
                    "MIXTURE_OR_TASK_NAME": mixture,
                    "TASK_FEATURE_LENGTHS": LENGTHS,
                    "MAX_DECODE_STEPS": LENGTHS["targets"],
                    "CHECKPOINT_PATH": str(checkpoint),
                    "EVAL_OUTPUT_DIR": str(folder),
                    "BATCH_SIZE": 128,
                    **TWO_ALONG_MODEL,
                },
                log=self.folder / f"{name}.log",
                processes=processes,
            )
        return folder

    def own(self, module: str, name: str, *arguments: str) -> pathlib.Path:
        """The output of one of our entry points."""
        folder = self.folder / name
        programs.own(
            module, *arguments, f"--gin.OUTPUT_DIR={str(folder)!r}", log=self.folder / f"{name}.log"
        )
        return folder


def both_ways(campaign: Campaign) -> None:
    """Our PaLM."""
    folder = campaign.folder
    base = campaign.own(
        "finetune",
        "base",
        "--gin_file=gin_configs/runs/pretrain.gin",
        "--gin_file=gin_configs/models/mini_xs.gin",
        f"--gin.TRAIN_STEPS={campaign.steps}",
        "--gin.BATCH_SIZE=16",
    )
    start = as_t5x(campaign, base, "base_t5x/checkpoint_0", "t5x")
    experts = [
        campaign.train("expert_a", start, RANKED),
        campaign.train("expert_b", start, BOTH, use_orbax=False),
    ]
    campaign.tell(f"trained by t5x.train: {', '.join(map(str, experts))}")
    merged = {}
    for i, name in enumerate(METHODS):
        merged[name] = campaign.own(
            "merge",
            f"merged/{name}/checkpoint_{campaign.steps}",
            "--gin_file=gin_configs/runs/merge.gin",
            f"--gin_file=gin_configs/methods/{name}.gin",
            f"--gin.BASE={str(start)!r}",
            f"--gin.EXPERTS={[str(each) for each in experts]!r}",
            f"--gin.FORMAT={('t5x', 't5x_orbax')[i % 2]!r}",
        )
    scores = ours(campaign, "scores", merged, [BOTH])
    for name, checkpoint in merged.items():
        found = campaign.evaluate(f"by_t5x/{name}", checkpoint, BOTH)
        campaign.tell(f"merged by {name}", compared(found, scores, name))

    last = campaign.train("goes_on", merged["ties"], RANKED, TRAIN_STEPS=20)
    campaign.tell(f"t5x.train went on from a merged model: {last}")

    expert = campaign.own(
        "finetune",
        "own_expert",
        "--gin_file=gin_configs/runs/expert.gin",
        f"--gin.INITIAL_CHECKPOINT_PATH={str(base)!r}",
        f"--gin.MIXTURE_OR_TASK_NAME={BOTH!r}",
        f"--gin.TASK_FEATURE_LENGTHS={LENGTHS!r}",
        f"--gin.TRAIN_STEPS={campaign.steps}",
        "--gin.LEARNING_RATE=1e-3",
        "--gin.BATCH_SIZE=16",
    )
    scores = ours(campaign, "own_scores", {"own_expert": expert}, [BOTH])
    for form in ("t5x", "t5x_orbax"):
        checkpoint = as_t5x(campaign, expert, f"own_expert_{form}/checkpoint_0", form)
        found = campaign.evaluate(f"by_t5x/own_expert_{form}", checkpoint, BOTH)
        campaign.tell(f"expert of launch.finetune as {form}", compared(found, scores, "own_expert"))
    found = campaign.evaluate(
        "by_t5x/two_processes", folder / "own_expert_t5x/checkpoint_0", BOTH, processes=2
    )
    campaign.tell("the same on 2 processes", compared(found, scores, "own_expert"))


def of_t5x(campaign: Campaign, kind: str, *, use_orbax: bool) -> None:
    """T5X's own encoder-decoder `kind`, of tests/launch/t5x/<kind>.gin, whose experts begin from the same seed."""
    files = [f"tests/launch/t5x/{kind}.gin"]
    train = functools.partial(own_train, campaign, files, use_orbax=use_orbax)
    experts = [train(f"{kind}/expert_{i}", mixture) for i, mixture in enumerate((RANKED, BOTH))]
    base = experts[0].parent / "checkpoint_0"
    merged = campaign.own(
        "merge",
        f"{kind}/merged/checkpoint_0",
        "--gin_file=gin_configs/runs/merge.gin",
        "--gin_file=gin_configs/methods/ties.gin",
        f"--gin.BASE={str(base)!r}",
        f"--gin.EXPERTS={[str(each) for each in experts]!r}",
        "--gin.OPTIMIZER_STATE='base'",
        *(
            ["--gin.STACKED={'encoder/encoder': 1, 'decoder/decoder': 1}"]
            if kind == "scalable_t5"
            else []
        ),
    )
    folder = campaign.folder / kind / "by_t5x"
    if not folder.exists():
        programs.run(
            "t5x.eval",
            ["t5x/configs/runs/eval.gin", *files],
            {
                "MIXTURE_OR_TASK_NAME": f"{BOTH}_rank",
                "TASK_FEATURE_LENGTHS": LENGTHS,
                "CHECKPOINT_PATH": str(merged),
                "EVAL_OUTPUT_DIR": str(folder),
                "DatasetConfig.split": "validation",
                "DatasetConfig.batch_size": 128,
                **T5_TWO_ALONG_MODEL,
            },
            log=campaign.folder / kind / "by_t5x.log",
        )
    campaign.tell(f"{kind}, merged by ties, by t5x.eval: {programs.metrics(folder)}")
    last = train(f"{kind}/goes_on", BOTH, start=merged, steps=10)
    campaign.tell(f"t5x.train went on from it: {last}")


def own_train(
    campaign: Campaign,
    files: Sequence[str],
    name: str,
    mixture: str,
    *,
    use_orbax: bool,
    start: pathlib.Path | None = None,
    steps: int | None = None,
) -> pathlib.Path:
    """The checkpoint of a run of t5x.train by T5X's own run file; without a start the parameters are drawn by a seed."""
    steps = steps or campaign.steps
    folder = campaign.folder / name
    made = folder / f"checkpoint_{steps}"
    if not made.exists():
        macros = {
            "MODEL_DIR": str(folder),
            "INITIAL_CHECKPOINT_PATH": str(start),
            "MIXTURE_OR_TASK_NAME": mixture,
            "TASK_FEATURE_LENGTHS": LENGTHS,
            "USE_CACHED_TASKS": False,
            "TRAIN_STEPS": steps,
            "EVAL_PERIOD": steps,
            "EVAL_STEPS": 1,
            "BATCH_SIZE": 16,
            "RANDOM_SEED": 0,
            "SaveCheckpointConfig.period": steps,
            "train.infer_eval_dataset_cfg": None,
            "train.use_orbax": use_orbax,
            **T5_TWO_ALONG_MODEL,
        }
        if start is None:
            macros["CheckpointConfig.restore"] = None
        programs.run(
            "t5x.train",
            ["t5x/configs/runs/finetune.gin", *files],
            macros,
            log=campaign.folder / f"{name}.log",
        )
    return made


def as_t5x(campaign: Campaign, checkpoint: pathlib.Path, name: str, form: str) -> pathlib.Path:
    return campaign.own(
        "convert",
        name,
        "--gin_file=gin_configs/runs/convert.gin",
        f"--gin.INPUT={str(checkpoint)!r}",
        f"--gin.FORMAT={form!r}",
    )


def ours(
    campaign: Campaign, name: str, models: dict[str, pathlib.Path], mixtures: list[str]
) -> pathlib.Path:
    """The output of launch.evaluate."""
    return campaign.own(
        "evaluate",
        name,
        "--gin_file=gin_configs/runs/evaluate.gin",
        f"--gin.CHECKPOINTS={ {key: str(path) for key, path in models.items()}!r}",
        f"--gin.MIXTURE_OR_TASK_NAME={mixtures!r}",
        f"--gin.TASK_FEATURE_LENGTHS={LENGTHS!r}",
        "--gin.WRITE_EXAMPLES=True",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work_dir", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--t5", action="store_true")
    arguments = parser.parse_args()
    campaign = Campaign(arguments.work_dir.resolve(), arguments.steps)
    if arguments.t5:
        of_t5x(campaign, "t5", use_orbax=True)
        of_t5x(campaign, "scalable_t5", use_orbax=False)
    else:
        both_ways(campaign)
    sys.exit(not campaign.is_good)


if __name__ == "__main__":
    main()
