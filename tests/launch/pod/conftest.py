"""Pods to launch on, and programs to launch them with."""

from __future__ import annotations

import pathlib

import pytest

from launch.pod import settings
from launch.pod.programs import Programs
from tests.launch.pod import fakes

SETTINGS = """
include 'gin_configs/runs/pod.gin'
include 'gin_configs/meshes/{mesh}.gin'
NAME = 'night'
PROJECT = 'my-project'
ZONE = 'us-west4-a'
IMAGE = 'us-west4-docker.pkg.dev/my-project/merging/merging:1'
BUCKET = 'gs://my-bucket'
CLUSTER = 'tpus'
"""


def pod_file(folder: pathlib.Path, mesh: str) -> str:
    """A user's settings."""
    path = folder / f"{mesh}.gin"
    path.write_text(SETTINGS.format(mesh=mesh))
    return str(path)


@pytest.fixture
def make_pod(tmp_path: pathlib.Path):
    """(mesh, bindings...) -> a pod."""

    def make(mesh: str = "v5e-16", *bindings: str) -> settings.Pod:
        return settings.configured([pod_file(tmp_path, mesh)], bindings)

    return make


@pytest.fixture
def cloud(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> fakes.Cloud:
    """Four hosts, of v5e-16."""
    made = fakes.Cloud(tmp_path, hosts=[f"t1v-w-{i}" for i in range(4)])
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    return made


@pytest.fixture
def slept() -> list[float]:
    """How long `programs` would have slept."""
    return []


@pytest.fixture
def programs(slept: list[float]) -> Programs:
    return Programs(is_dry_run=False, sleep=slept.append)
