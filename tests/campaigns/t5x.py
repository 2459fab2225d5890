r"""T5X and this system as one workflow: trained, merged and evaluated from one to the other and back.

  python -m tests.campaigns.t5x --work_dir=/data/t5x [--steps=100] [--t5]

Needs T5X (WORKSPACE.md says how). Without --t5: a base of launch.finetune as T5X's; two experts on two miniature categories by
t5x.train, one a legacy checkpoint, one Orbax; merged by every method, T5X in and out; each merged model by t5x.eval, which ranks and
generates, and one by t5x.infer, compared with launch.evaluate example by example; t5x.train from a merged model of either flavour; an
expert of launch.finetune by t5x.eval, scanned and not, on one process and on two. With --t5: scalable T5 (scanned) and T5 1.1,
tiny, two experts of each by t5x.train, one of either flavour, merged and written in both, compared with the transcription of the
paper, evaluated by t5x.eval and trained on by t5x.train. Prints a line of each, exit code 1 where one differs; what is done is not
done again.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

import numpy as np

from merging.checkpoints import open_checkpoint
from merging.methods import METHODS
from merging.methods.ties import Ties
from tests.launch.t5x import programs
from tests.launch.t5x.programs import INFERRED, TWO_ALONG_MODEL, compared
from tests.merging.checkpoints.trees_common import read_all, same
from tests.oracle import float32

RANKED = "sentiment_mini"  # choices alone
BOTH = "closed_book_qa_mini"  # choices, and generated answers
FLAVOURS = ("t5x", "t5x_orbax")
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

    def tell(self, what: str, *, is_good: bool = True) -> None:
        self.is_good &= is_good
        print(what if is_good else f"WRONG: {what}", flush=True)

    def compare(self, what: str, *outputs: Any) -> None:
        """Tells what `programs.compared` finds in outputs of T5X and of launch.evaluate."""
        found = compared(*outputs)
        self.tell(f"{what}: {found}", is_good=found.is_good)

    def tell_gone_on(self, what: str, start: pathlib.Path, last: pathlib.Path) -> None:
        """Tells whether the run that ended with `last` began from the parameters of `start`, and changed them."""
        first, begun, ended = map(parameters, (start, last.with_name("checkpoint_0"), last))
        is_good = same(begun, first) and not same(ended, first)
        self.tell(
            f"t5x.train went on from {what}, its {len(first)} parameters, to {last}",
            is_good=is_good,
        )

    def train(
        self, name: str, start: pathlib.Path, mixture: str, flavour: str, steps: int | None = None
    ) -> pathlib.Path:
        """The checkpoint of a run of t5x.train, in either flavour."""
        steps = steps or self.steps
        folder = self.folder / name
        made = folder / f"checkpoint_{steps}"
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
                    "BATCH_SIZE": 16,
                    "train.train_eval_dataset_cfg": None,
                    "train.infer_eval_dataset_cfg": None,
                    "train.use_orbax": flavour == "t5x_orbax",
                    **TWO_ALONG_MODEL,
                },
                log=self.folder / f"{name}.log",
            )
        return made

    def infer(self, name: str, checkpoint: pathlib.Path, mixture: str) -> pathlib.Path:
        """The output of t5x.infer: texts of a mixture, and scores of its choices."""
        folder = self.folder / name
        for mode, task in (("predict", mixture), ("score", f"{mixture}_rank")):
            if not any(folder.glob(f"*-{mode}.jsonl-*.COMPLETED")):
                programs.run(
                    "t5x.infer",
                    [f"{programs.CONFIGS}/infer.gin"],
                    {
                        "MODE": mode,
                        "MIXTURE_OR_TASK_NAME": task,
                        "TASK_FEATURE_LENGTHS": LENGTHS,
                        "MAX_DECODE_STEPS": LENGTHS["targets"],
                        "CHECKPOINT_PATH": str(checkpoint),
                        "INFER_OUTPUT_DIR": str(folder),
                        "BATCH_SIZE": 100,
                        **TWO_ALONG_MODEL,
                    },
                    log=self.folder / f"{name}_{mode}.log",
                )
        return folder

    def evaluate(
        self,
        name: str,
        checkpoint: pathlib.Path,
        mixture: str,
        *,
        is_scanned: bool = True,
        processes: int = 1,
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
                    "SCAN_LAYERS": is_scanned,
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
        campaign.train("expert_a", start, RANKED, "t5x_orbax"),
        campaign.train("expert_b", start, BOTH, "t5x"),
    ]
    campaign.tell(f"trained by t5x.train: {', '.join(map(str, experts))}")
    merged, last_of = {}, {}
    for i, name in enumerate(METHODS):
        flavour = FLAVOURS[i % 2]
        last_of[flavour] = name
        merged[name] = campaign.own(
            "merge",
            f"merged/{name}/checkpoint_{campaign.steps}",
            "--gin_file=gin_configs/runs/merge.gin",
            f"--gin_file=gin_configs/methods/{name}.gin",
            f"--gin.BASE={str(start)!r}",
            f"--gin.EXPERTS={[str(each) for each in experts]!r}",
            f"--gin.FORMAT={flavour!r}",
        )
    scores = ours(campaign, "scores", merged, [BOTH])
    for name, checkpoint in merged.items():
        found = campaign.evaluate(f"by_t5x/{name}", checkpoint, BOTH)
        campaign.compare(f"merged by {name}, t5x.eval", found, scores, name)
    for flavour, name in last_of.items():
        last = campaign.train(f"goes_on_{flavour}", merged[name], RANKED, flavour, steps=20)
        campaign.tell_gone_on(f"the merge by {name} ({flavour})", merged[name], last)
    found = campaign.infer("inferred", merged["ties"], BOTH)
    campaign.compare("merged by ties, t5x.infer", found, scores, "ties", INFERRED)

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
    for flavour in FLAVOURS:
        checkpoint = as_t5x(campaign, expert, f"own_expert_{flavour}/checkpoint_0", flavour)
        found = campaign.evaluate(f"by_t5x/own_expert_{flavour}", checkpoint, BOTH)
        campaign.compare(f"expert of launch.finetune as {flavour}", found, scores, "own_expert")
    unscanned = as_t5x(
        campaign,
        expert,
        "own_expert_unscanned/checkpoint_0",
        "t5x",
        "--gin.LAYOUT='unstacked(axis=0)'",
    )
    found = campaign.evaluate("by_t5x/unscanned", unscanned, BOTH, is_scanned=False)
    campaign.compare("the same unscanned", found, scores, "own_expert")
    found = campaign.evaluate(
        "by_t5x/two_processes", folder / "own_expert_t5x/checkpoint_0", BOTH, processes=2
    )
    campaign.compare("the same on 2 processes", found, scores, "own_expert")


def of_t5x(campaign: Campaign, kind: str, mixtures: tuple[str, str] = (RANKED, BOTH)) -> None:
    """T5X's own encoder-decoder `kind`, of tests/launch/t5x/<kind>.gin, whose experts begin from the same seed."""
    experts = [
        own_train(campaign, kind, f"expert_{flavour}", mixture, flavour)
        for flavour, mixture in zip(FLAVOURS, mixtures, strict=True)
    ]
    base, other = (each.with_name("checkpoint_0") for each in experts)
    is_one = same(parameters(base), parameters(other))
    campaign.tell(f"{kind}: trained from one start: {', '.join(map(str, experts))}", is_good=is_one)
    expected = float32.merge(parameters(base), [parameters(each) for each in experts], Ties(), None)
    written = {}
    for flavour in FLAVOURS:
        merged = campaign.own(
            "merge",
            f"{kind}/merged_{flavour}/checkpoint_0",
            "--gin_file=gin_configs/runs/merge.gin",
            "--gin_file=gin_configs/methods/ties.gin",
            f"--gin.BASE={str(base)!r}",
            f"--gin.EXPERTS={[str(each) for each in experts]!r}",
            f"--gin.FORMAT={flavour!r}",
            "--gin.OPTIMIZER_STATE='base'",
            *(
                ["--gin.STACKED={'encoder/encoder': 1, 'decoder/decoder': 1}"]
                if kind == "scalable_t5"
                else []
            ),
        )
        what = f"{kind}, the merge by ties ({flavour})"
        is_good = same(parameters(merged), expected)
        campaign.tell(f"{what} has the bits of its transcription", is_good=is_good)
        found = own_evaluate(campaign, kind, f"by_t5x_{flavour}", merged, mixtures[1])
        written[flavour] = programs.examples(found)
        lines = sum(text.count("\n") for text in written[flavour].values())
        campaign.tell(
            f"{what}: t5x.eval wrote {lines} examples of {len(written[flavour])} tasks",
            is_good=lines > 0,
        )
        last = own_train(campaign, kind, f"goes_on_{flavour}", mixtures[1], flavour, start=merged)
        campaign.tell_gone_on(what, merged, last)
    is_one = written["t5x"] == written["t5x_orbax"]
    campaign.tell(f"{kind}: t5x.eval wrote the same of both flavours", is_good=is_one)


def own_evaluate(
    campaign: Campaign, kind: str, name: str, checkpoint: pathlib.Path, mixture: str
) -> pathlib.Path:
    """The output of t5x.eval by T5X's own run file."""
    folder = campaign.folder / kind / name
    mixture = f"{mixture}_rank"
    if not (folder / f"eval.{mixture}.ckpt").exists():
        programs.run(
            "t5x.eval",
            ["t5x/configs/runs/eval.gin", f"tests/launch/t5x/{kind}.gin"],
            {
                "MIXTURE_OR_TASK_NAME": mixture,
                "TASK_FEATURE_LENGTHS": LENGTHS,
                "CHECKPOINT_PATH": str(checkpoint),
                "EVAL_OUTPUT_DIR": str(folder),
                "DatasetConfig.split": "validation",
                "DatasetConfig.batch_size": 128,
                **T5_TWO_ALONG_MODEL,
            },
            log=campaign.folder / kind / f"{name}.log",
        )
    return folder


def own_train(
    campaign: Campaign,
    kind: str,
    name: str,
    mixture: str,
    flavour: str,
    *,
    start: pathlib.Path | None = None,
) -> pathlib.Path:
    """The checkpoint of a run of t5x.train by T5X's own run file; without a start the parameters are drawn by a seed."""
    steps = campaign.steps
    folder = campaign.folder / kind / name
    made = folder / f"checkpoint_{steps}"
    if not made.exists():
        macros = {
            "MODEL_DIR": str(folder),
            "INITIAL_CHECKPOINT_PATH": str(start),
            "MIXTURE_OR_TASK_NAME": mixture,
            "TASK_FEATURE_LENGTHS": LENGTHS,
            "USE_CACHED_TASKS": False,
            "TRAIN_STEPS": steps,
            "BATCH_SIZE": 16,
            "RANDOM_SEED": 0,
            "SaveCheckpointConfig.period": steps,
            "train.train_eval_dataset_cfg": None,
            "train.infer_eval_dataset_cfg": None,
            "train.use_orbax": flavour == "t5x_orbax",
            **T5_TWO_ALONG_MODEL,
        }
        if start is None:
            macros["CheckpointConfig.restore"] = None
        programs.run(
            "t5x.train",
            ["t5x/configs/runs/finetune.gin", f"tests/launch/t5x/{kind}.gin"],
            macros,
            log=campaign.folder / kind / f"{name}.log",
        )
    return made


def parameters(checkpoint: pathlib.Path) -> dict[str, np.ndarray]:
    """Leaves by name, of either flavour."""
    return read_all(open_checkpoint(checkpoint))


def as_t5x(
    campaign: Campaign, checkpoint: pathlib.Path, name: str, flavour: str, *more: str
) -> pathlib.Path:
    return campaign.own(
        "convert",
        name,
        "--gin_file=gin_configs/runs/convert.gin",
        f"--gin.INPUT={str(checkpoint)!r}",
        f"--gin.FORMAT={flavour!r}",
        *more,
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
        of_t5x(campaign, "scalable_t5")
        of_t5x(campaign, "t5")
    else:
        both_ways(campaign)
    sys.exit(not campaign.is_good)


if __name__ == "__main__":
    main()
