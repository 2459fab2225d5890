"""WORKSPACE.md's tree names every file of the library and the entry points, and none that is not there."""

from __future__ import annotations

import pathlib
import re

REPOSITORY = pathlib.Path(__file__).parent.parent


def test_the_tree_is_true():
    page = (REPOSITORY / "WORKSPACE.md").read_text()
    tree = page.split("## The tree")[1].split("```")[1]
    named: set[str] = set()
    folders: list[tuple[int, str]] = []  # (indentation, path) of the folders that a line lies in
    for line in filter(str.strip, tree.splitlines()):
        depth = len(line) - len(line.lstrip())
        folders = [(d, f) for d, f in folders if d < depth]
        parent = folders[-1][1] if folders else ""
        head = re.match(r"\s*((\S+\.(py|sh)\s*)+|\S+/)", line)[1].split()
        for name in head:
            if name.endswith("/"):
                folders.append((depth, parent + name))
            else:
                named.add(parent + name)
    found = {
        str(path.relative_to(REPOSITORY))
        for folder in ("merging", "launch", "tasks")
        for path in (REPOSITORY / folder).rglob("*")
        if path.suffix in (".py", ".sh") and path.name != "__init__.py"
    }
    assert named == found
