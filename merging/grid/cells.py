"""The cells of a study: which experts are merged how, at which size, from which base.

A seed picks the experts of a merge. It puts the categories in an order, and a merge of N takes the first N, so that the same
experts are merged at every size, from every base and by every method, and that a merge of more experts holds those of a
merge of fewer (arXiv 2410.03617 picks them at random; pairing and nesting are ours).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

from merging.grid.tuning import candidates
from merging.methods.method import Method

FIXED, TUNED = "fixed", "tuned"


def at_steps(steps: int) -> str:
    """The setting of merges of experts that were trained for so many steps only."""
    return f"at_{steps}_steps"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One merge of the grid.

    Attributes:
      size, base: whose experts.
      method: its name in the study.
      num_experts, seed: how many experts, and who picked them.
      categories: of the experts, in the order of the study's table.
      setting: "fixed", "tuned", or that of experts of fewer steps.
      steps: of the experts, where these are fewer; else None.
      model: its name among the models of its size and base; equal merges share one.
    """

    size: str
    base: str
    method: str
    num_experts: int
    seed: int
    categories: tuple[str, ...]
    setting: str = FIXED
    steps: int | None = None
    model: str = ""


def subset(categories: Sequence[str], num_experts: int, seed: int) -> tuple[str, ...]:
    """The categories whose experts a merge takes, in the order of the table."""
    order = sorted(
        categories, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).hexdigest()
    )
    chosen = set(order[:num_experts])
    return tuple(name for name in categories if name in chosen)


def cells(
    *,
    sizes: Sequence[str],
    bases: Sequence[str],
    methods: Mapping[str, Method],
    num_experts: Sequence[int],
    seeds: Sequence[int],
    categories: Sequence[str],
    is_tuned: bool = False,
    expert_steps: Sequence[int] = (),
) -> list[Cell]:
    """Every cell, size by size; those of chosen settings and of experts of fewer steps where asked for.

    Merges that no seed or no choice can change name one model.

    Raises ValueError for more experts than there are categories, and fewer than one.
    """
    wrong = [n for n in num_experts if not 1 <= n <= len(categories)]
    if wrong:
        raise ValueError(
            f"NUM_EXPERTS has {', '.join(map(str, wrong))}: there are {len(categories)} held-in categories, an expert each"
            f" ({', '.join(categories)})"
        )
    settings = {FIXED: None} | ({TUNED: None} if is_tuned else {})
    settings |= {at_steps(steps): steps for steps in expert_steps}
    return [
        Cell(
            size=size,
            base=base,
            method=method,
            num_experts=n,
            seed=seed,
            categories=subset(categories, n, seed),
            setting=setting,
            steps=steps,
            model=model_name(
                method,
                n,
                seeds[0] if n == len(categories) and not made.draws_masks else seed,
                FIXED if setting == TUNED and not candidates(made) else setting,
            ),
        )
        for size in sizes
        for base in bases
        for setting, steps in settings.items()
        for method, made in methods.items()
        for n in num_experts
        for seed in seeds
    ]


def model_name(method: str, num_experts: int, seed: int, setting: str = FIXED) -> str:
    """`ties_n4_s0`, `ties_n4_s0_tuned`."""
    tuned = "" if setting == FIXED else f"_{setting}"
    return f"{method}_n{num_experts}_s{seed}{tuned}"
