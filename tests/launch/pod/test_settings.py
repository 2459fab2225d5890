"""A pod's settings: names that Google Cloud gives the meshes, and what is refused."""

from __future__ import annotations

import pytest

from launch import gin_config
from launch.pod import settings

MESHES = sorted(path.stem for path in (gin_config.CONFIGS / "meshes").glob("v*.gin"))


@pytest.mark.parametrize("mesh", MESHES)
def test_meshes_are_named_after_what_is_asked_for(make_pod, mesh: str):
    """v5e-256x4 is four of v5litepod-256."""
    name, _, slices = mesh.partition("x")
    pod = make_pod(mesh)
    assert pod.accelerator_type == name.replace("v5e", "v5litepod")
    assert pod.mesh.slices == int(slices or 1)
    assert pod.chips_per_host == 4
    assert pod.hosts * 4 == pod.mesh.chips * pod.mesh.slices


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("NAME = 'Night 1'", "NAME is 'Night 1': at most 40 lower-case letters"),
        ("CAPACITY = 'cheap'", "CAPACITY is 'cheap': give one of on-demand, spot, reserved"),
        ("BUCKET = '/data'", "BUCKET is '/data': give gs://NAME"),
        ("MeshShape.hosts = None", "MESH has no topology or hosts"),
        ("MeshShape.topology = 'v7:16x16'", "no chip 'v7'"),
        ("IMAGES = 'x'", "nothing uses a macro IMAGES. Did you mean IMAGE"),
    ],
)
def test_settings_that_can_not_be_are_an_error(make_pod, binding: str, message: str):
    with pytest.raises(ValueError, match=message):
        make_pod("v5e-256", binding)


def test_what_must_be_set_is_said_at_once():
    with pytest.raises(ValueError, match="Not set, and it must be") as caught:
        settings.configured(["gin_configs/runs/pod.gin"], [])
    for name in ("PROJECT", "ZONE", "IMAGE", "BUCKET", "MESH"):
        assert f"--gin.{name}=" in str(caught.value)
