"""What runs have put into their files of scores, but for the seconds, which no two runs share."""

from __future__ import annotations

import json
import pathlib
from typing import Any

FILE = "scores.jsonl"


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a folder's own file."""
    found = [json.loads(line) for line in (folder / FILE).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


def read_all(folder: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of every folder below that has a file, by its path from here."""
    folders = sorted(path.parent for path in folder.rglob(FILE))
    return {str(each.relative_to(folder)): read(each) for each in folders}
