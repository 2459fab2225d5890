"""The image's pinned versions: all that setup.py asks for, within its bounds, and nothing that these do not bring."""

from __future__ import annotations

import importlib.metadata
import pathlib
import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = pathlib.Path(__file__).parents[3]


def pinned() -> dict[str, str]:
    lines = (REPOSITORY / "launch/pod/requirements.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@pytest.fixture
def wanted(monkeypatch: pytest.MonkeyPatch) -> list[Requirement]:
    """What the image is to have."""
    said = {}
    monkeypatch.setattr("setuptools.setup", said.update)
    exec((REPOSITORY / "setup.py").read_text(), {})  # noqa: S102
    lists = [said["install_requires"], *(said["extras_require"][name] for name in ("tpu", "gcs"))]
    return [Requirement(line) for each in lists for line in each]


def test_the_image_has_what_setup_asks_for(wanted: list[Requirement]):
    have = pinned()
    for requirement in wanted:
        version = have.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not pinned"
        assert requirement.specifier.contains(version), f"{requirement}, and {version} is pinned"


def test_the_image_has_what_these_bring(wanted: list[Requirement]):
    """Followed as far as the packages are installed here in the versions that are pinned: others may bring others."""
    have, reached, left = pinned(), set(), list(wanted)
    is_whole = True
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        assert name in have, f"{requirement} is not pinned"
        for extra in ("", *requirement.extras):
            if (name, extra) in reached:
                continue
            reached.add((name, extra))
            if installed(name) != have[name]:
                is_whole = False
                continue
            found = [Requirement(line) for line in importlib.metadata.requires(name) or []]
            left += [
                each for each in found if not each.marker or each.marker.evaluate({"extra": extra})
            ]
    if is_whole:
        assert set(have) == {name for name, _ in reached}


def test_the_python_is_the_one_of_the_tests():
    page = (REPOSITORY / "launch/pod/Dockerfile").read_text()
    assert re.search(r"^FROM python:3\.11\.\d+-slim-bookworm$", page, flags=re.M)
