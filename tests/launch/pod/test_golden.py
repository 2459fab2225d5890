"""What is sent for each kind of pod, as files to be read: `python -m tests.launch.pod.test_golden` writes them anew."""

from __future__ import annotations

import contextlib
import io
import pathlib
import tempfile

import pytest

from launch.pod import gke, settings, tpu_vm
from launch.pod.programs import Programs
from tests.launch.pod import conftest

GOLDEN = pathlib.Path(__file__).parent / "golden"
MESHES = ("v5e-64", "v5e-256", "v5e-256x4", "v4-128", "v5p-512")
COMMAND = [
    "python",
    "-m",
    "launch.merge",
    '--gin.BASE="gs://my-bucket/a base"',
    "--output=gs://b/m",
]
STUDY = [
    *("python", "-m", "launch.study", "--gin_file=gin_configs/studies/paper.gin"),
    "--output=gs://my-bucket/paper",
]


def tpu_vm_commands(pod: settings.Pod) -> str:
    """Everything that tpu_vm sends, in the order in which a user would."""
    told = io.StringIO()
    programs = Programs(is_dry_run=True)
    with contextlib.redirect_stdout(told):
        tpu_vm.create(pod, programs)
        programs.run(tpu_vm.ssh(pod, tpu_vm.install_script(pod)))
        tpu_vm.run(pod, COMMAND, programs)
        programs.run(tpu_vm.ssh(pod, tpu_vm.STOP))
        programs.run(tpu_vm.delete(pod))
    return told.getvalue()


def files(pod: settings.Pod, mesh: str) -> dict[str, str]:
    """Content by name of file."""
    made = {
        f"{mesh}.commands.txt": tpu_vm_commands(pod),
        f"{mesh}.jobset.yaml": gke.text(gke.manifest(pod, COMMAND)),
    }
    if pod.mesh.slices == 1:
        made[f"{mesh}.study.yaml"] = gke.text(gke.study(pod, STUDY, 8))
    return made


@pytest.mark.parametrize("mesh", MESHES)
def test_what_is_sent_is_as_written_down(make_pod, mesh: str):
    for name, content in files(make_pod(mesh), mesh).items():
        assert content == (GOLDEN / name).read_text(), f"read {name}, then write it anew"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for each in MESHES:
            pod = settings.configured([conftest.pod_file(pathlib.Path(folder), each)], [])
            for name, content in files(pod, each).items():
                (GOLDEN / name).write_text(content)
