"""What a study will cost, before it runs: operations by formula, at a chip's published peak and a share of it that is reached.

Operations are those of PaLM's appendix B (6 N + attention a trained token, a third of that a token that is only read), which
`launch.compile` finds in compiled steps to some percent. Tokens of evaluations are upper bounds: every example as long as it may be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from launch.chips import CHIPS, GB
from launch.study_data import Sources

if TYPE_CHECKING:
    from merging.grid.study_file import Dataset
    from merging.study import Plan, Training

EXAMPLES = 1_000  # of a task where LIMIT sets none: what most validation splits have at least
PROMPTS = 5  # of a dataset where NUM_PROMPTS sets none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Price:
    """Of one size.

    Attributes:
      size: its name.
      parameters: of a model.
      steps: of all training.
      train_flops, evaluate_flops: operations.
      merges: different ones.
      merge_bytes: that they read from and write to the devices' memory, once.
      evaluations: models times datasets.
      stored_bytes: of all checkpoints, float32.
    """

    size: str
    parameters: int
    steps: int
    train_flops: float
    evaluate_flops: float
    merges: int
    merge_bytes: int
    evaluations: int
    stored_bytes: int

    def chip_hours(self, chip: str, mfu: float) -> float:
        """Hours of one chip for all products; merges come to minutes."""
        flops = self.train_flops + self.evaluate_flops
        return flops / (CHIPS[chip].flops_per_s * mfu) / 3600


def prices(planned: Plan, sources: Sources) -> list[Price]:
    """The price of each size, all that is done already included."""
    from merging.study import Training
    from merging.training.curves import flops_per_token

    s = planned.settings
    datasets = [each for name in planned.data.categories for each in _datasets(planned, name)]
    tasks = _tasks(datasets) * (sources.num_prompts or PROMPTS)
    row = sum(sources.lengths.values())
    tokens = tasks * (sources.limit or EXAMPLES) * row
    held_in = [each for name in planned.held_in for each in _datasets(planned, name)]
    chosen_by = _tasks(held_in) * (sources.num_prompts or PROMPTS) * sources.tuning_limit * row
    choices = _choices(planned)
    found = []
    for size in s.sizes:
        config = planned.config(size)
        trained: list[Training] = [how for how in s.bases.values() if isinstance(how, Training)]
        of_each = [s.expert] * len(planned.held_in) + ([s.multitask] if s.multitask else [])
        trained = [how.of_size(size) for how in [*trained, *of_each * len(s.bases)]]
        models = [item for item in planned.items["cells"] if item.size == size]
        merges = [cell for base in s.bases for cell in planned.merges(size, base).values()]
        number = config.num_params()
        found.append(
            Price(
                size=size,
                parameters=number,
                steps=sum(how.train_steps for how in trained),
                train_flops=sum(
                    how.train_steps
                    * how.batch_size
                    * sum(how.lengths.values())
                    * flops_per_token(config, sum(how.lengths.values()))
                    for how in trained
                ),
                evaluate_flops=(len(models) * tokens + choices * chosen_by)
                * flops_per_token(config, row)
                / 3,
                merges=len(merges),
                merge_bytes=sum(4 * number * (cell.num_experts + 2) for cell in merges),
                evaluations=len(models) * len(datasets),
                stored_bytes=4 * number * (len(trained) + len(merges) * s.keep_merged),
            )
        )
    return found


def _datasets(planned: Plan, category: str) -> list[Dataset]:
    return list(planned.data.categories[category].datasets.values())


def _tasks(datasets: Sequence[Dataset]) -> int:
    return sum(len(each.tasks) for each in datasets)


def _choices(planned: Plan) -> int:
    """Models that are scored to choose the settings of a size."""
    from merging.grid.tuning import candidates

    s = planned.settings
    each = sum(len(candidates(method)) for method in s.methods.values()) if s.tune else 0
    return each * len(s.num_experts) * len(s.bases)


def described(found: Sequence[Price], chip: str, mfu: float) -> str:
    """A line for each size, and one for all."""
    from launch.tasks import table

    head = [
        "size", "parameters", "steps", "train EFLOP", "merges", "GB merged", "evaluations", "evaluate EFLOP",
        "GB stored", f"{chip} chip-hours",
    ]  # fmt: skip
    rows = [head]
    for each in found:
        rows.append(
            [
                each.size,
                f"{each.parameters:,}",
                f"{each.steps:,}",
                f"{each.train_flops / 1e18:,.3g}",
                f"{each.merges:,}",
                f"{each.merge_bytes / GB:,.3g}",
                f"{each.evaluations:,}",
                f"{each.evaluate_flops / 1e18:,.3g}",
                f"{each.stored_bytes / GB:,.3g}",
                f"{each.chip_hours(chip, mfu):,.3g}",
            ]
        )
    hours = sum(each.chip_hours(chip, mfu) for each in found)
    told = f"in all {hours:,.3g} {chip} chip-hours at {mfu:.0%} of the peak; merging not counted, its bytes pass in minutes"
    return "\n".join([*table(rows), told])
