"""What of a study is there, what is missing, and how long that may take: by the seconds that manifests of the same phase and size tell."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from launch.progress import duration

if TYPE_CHECKING:
    from merging.study import Item, Plan

SHOWN = 10  # missing items that are named

# What a model's scores take, one after another; of an earlier version the first in place of the two behind it.
OF_A_CELL = ("load_or_merge_seconds", "load_seconds", "merge_seconds", "evaluate_seconds")


def described(planned: Plan) -> str:
    """A line for each phase and size, the first of what is missing by name, and the time that one worker needs for it."""
    from launch.tasks import table

    rows = [["phase", "size", "done", "missing", "seconds an item", "left"]]
    missing, left, is_known = [], 0.0, True
    for phase, items in planned.items.items():
        for size in planned.settings.sizes:
            done, lacking = [], []
            for item in (each for each in items if each.size == size):
                (done if item.is_done else lacking).append(item)  # one look at the disk
            mean = statistics.fmean(map(seconds_of, done)) if done else None
            is_known &= mean is not None or not lacking
            missing += lacking
            left += len(lacking) * (mean or 0.0)
            rows.append(
                [
                    phase,
                    size,
                    f"{len(done):,}",
                    f"{len(lacking):,}",
                    "" if mean is None else f"{mean:,.1f}",
                    "" if not lacking else "?" if mean is None else duration(len(lacking) * mean),
                ]
            )
    lines = [*table(rows), ""]
    if not missing:
        return "\n".join([*lines, "nothing is missing but the report, which takes seconds"])
    named = [f"{item.phase} {item.label}" for item in missing[:SHOWN]]
    more = f", and {len(missing) - SHOWN:,} more" if len(missing) > SHOWN else ""
    told = "" if is_known else ", and what no item of its phase and size tells yet"
    return "\n".join(
        [*lines, f"missing    {', '.join(named)}{more}", f"time left  {duration(left)}{told}"]
    )


def seconds_of(item: Item) -> float:
    """That a finished item took."""
    from merging import manifest

    total = 0.0
    for folder in item.folders:
        how = manifest.read(folder)
        names = ("seconds",) if "seconds" in how else OF_A_CELL
        total += sum(how.get(name, 0.0) for name in names)
    return total
