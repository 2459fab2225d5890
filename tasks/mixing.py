"""T0's mixing rates (arXiv 2110.08207, section 4): a dataset too large counts as one of half a million examples.

Each task, a dataset in the words of one prompt, has its number of examples as its rate; where the dataset holds more
than the cap, the cap is shared out among its prompts.
"""

from __future__ import annotations

RATE_CAP = 500_000


def examples_per_epoch(size: int, *, prompts: int, cap: int = RATE_CAP) -> int:
    """The rate of a task, and how many of its examples an epoch of a mixture takes."""
    return size if size <= cap else cap // prompts
