"""TPU VMs through a gcloud that is not there: order, quoting, trying again, and that one failed worker is a failure."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

from launch import exit_codes
from launch.pod import tpu_vm
from launch.pod.programs import ProgramFailed
from tests.launch.pod import conftest

COMMAND = ["python", "-m", "launch.merge", "--output=gs://b/merged"]


def verbs(cloud) -> list[str]:
    return [call["arguments"][3] for call in cloud.calls("gcloud")]


def started(cloud) -> list[str]:
    """Hosts on which a container was started, in order."""
    return [host for host, arguments in cloud.docker_calls() if arguments[0] == "run"]


def test_create_waits_until_the_tpus_are_there(cloud, make_pod, programs, slept, capsys):
    cloud.plan(states=["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    tpu_vm.create(make_pod(), programs)
    assert verbs(cloud) == ["create", *["describe"] * 4]
    assert slept == [tpu_vm.POLL_S] * 3
    assert capsys.readouterr().out.splitlines() == [
        "night: WAITING_FOR_RESOURCES",
        "night: PROVISIONING",
        "night: ACTIVE, 4 hosts with 4 chips each",
    ]


def test_a_request_that_was_refused_is_an_error(cloud, make_pod, programs):
    cloud.plan(states=["WAITING_FOR_RESOURCES", "FAILED"])
    with pytest.raises(ProgramFailed, match="the request for night is FAILED: `status` says why"):
        tpu_vm.create(make_pod(), programs)


def test_create_is_not_tried_again(cloud, make_pod, programs, slept):
    """A second request of the same name would hide why the first one failed."""
    cloud.plan(failures={"create": 1})
    with pytest.raises(ProgramFailed, match="queued-resources create ... ended with exit code 255"):
        tpu_vm.create(make_pod(), programs)
    assert verbs(cloud) == ["create"]
    assert not slept


QUOTED = [
    '--gin.BASE="gs://b/a b"',
    "--gin.EXPERTS=['gs://b/it''s', \"gs://b/$HOME\"]",
    "--gin.PATTERNS={'*self_attn*': {\"scale\": 0.5}}",
    "--gin.NOTE='`x`; $(y) && z | \\ # !'",
    "",
    "two\nlines",
]


def test_a_command_arrives_as_it_was_given(cloud, make_pod, programs):
    tpu_vm.run(make_pod("v5e-16", "ENVIRONMENT = {'NOTE': 'a \"b\" $c'}"), QUOTED, programs)
    runs = [arguments for _, arguments in cloud.docker_calls() if arguments[0] == "run"]
    assert len(runs) == 4
    for arguments in runs:
        image = arguments.index("us-west4-docker.pkg.dev/my-project/merging/merging:1")
        assert arguments[image + 1 :] == QUOTED
        assert '--env=NOTE=a "b" $c' in arguments


def test_run_starts_all_then_shows_a_log_then_waits_for_all(cloud, make_pod, programs):
    tpu_vm.run(make_pod(), COMMAND, programs)
    assert verbs(cloud) == ["ssh"] * 3
    each = ["rm", "run"] * 4 + ["logs"] + ["wait"] * 4
    calls = cloud.docker_calls()
    assert [arguments[0] for _, arguments in calls] == each
    assert [host for host, _ in calls[-4:]] == cloud.hosts


@pytest.mark.parametrize(
    ("mesh", "led"), [("v5e-16", "[t1v-w-{0}]"), ("v5e-256x4", "[slice {0} t1v-w-{0}]")]
)
def test_lines_of_logs_say_whose_they_are(cloud, make_pod, programs, capfd, mesh: str, led: str):
    programs.run(tpu_vm.ssh(make_pod(mesh), tpu_vm.logs_script(make_pod(mesh))))
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("[")]
    assert len(cloud.hosts) == 4
    assert lines == [
        f"{led.format(i)} {line}" for i in range(4) for line in ("training begins", "step 1")
    ]


def test_one_failed_worker_is_a_failure_that_names_it(cloud, make_pod, programs):
    """A mistake of the user is not tried again."""
    cloud.plan(codes={"t1v-w-2": [exit_codes.MISTAKE]})
    with pytest.raises(ProgramFailed, match="^t1v-w-2 failed with exit code 1$"):
        tpu_vm.run(make_pod(), COMMAND, programs)
    assert started(cloud) == cloud.hosts


def test_what_broke_is_begun_again_on_all(cloud, make_pod, programs, capsys):
    cloud.plan(codes={"t1v-w-1": [134, 0], "t1v-w-3": [exit_codes.BROKEN, exit_codes.PREEMPTED, 0]})
    tpu_vm.run(make_pod(), COMMAND, programs)
    assert started(cloud) == cloud.hosts * 3
    told = capsys.readouterr().out
    assert "t1v-w-1 failed with exit code 134; t1v-w-3 failed with exit code 70" in told


def test_it_is_not_begun_again_for_ever(cloud, make_pod, programs):
    cloud.plan(codes={"t1v-w-0": [137]})
    with pytest.raises(ProgramFailed, match="t1v-w-0 failed with exit code 137"):
        tpu_vm.run(make_pod("v5e-16", "MAX_RESTARTS = 1"), COMMAND, programs)
    assert started(cloud) == cloud.hosts * 2


def test_a_worker_that_gives_no_answer_is_a_failure(cloud, make_pod, programs):
    cloud.forget("t1v-w-3")
    with pytest.raises(ProgramFailed, match="3 of 4 workers told how their run ended"):
        tpu_vm.run(make_pod(), COMMAND, programs)


def test_connections_are_tried_again(cloud, make_pod, programs, slept):
    cloud.plan(failures={"ssh": 3})
    tpu_vm.run(make_pod(), COMMAND, programs)
    assert verbs(cloud) == ["ssh"] * 6
    assert slept == [5, 10, 20]
    cloud.plan(failures={"ssh": 4})
    with pytest.raises(ProgramFailed, match="exit code 255 after 4 attempts"):
        tpu_vm.run(make_pod(), COMMAND, programs)


def test_the_command_line(cloud, tmp_path: pathlib.Path):
    """As a user starts it; the exit code tells of the one worker."""
    cloud.plan(codes={"t1v-w-2": [1]})
    file = conftest.pod_file(tmp_path, "v5e-16")
    command = [sys.executable, "-m", "launch.pod.tpu_vm", "run", f"--gin_file={file}", "--"]
    done = subprocess.run([*command, *QUOTED], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "Error: t1v-w-2 failed with exit code 1"
    assert cloud.docker_calls()[1][1][-len(QUOTED) :] == QUOTED


def test_without_gcloud_it_is_said_what_is_missing(make_pod, programs, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ProgramFailed, match="gcloud is not on the PATH: install it"):
        tpu_vm.create(make_pod(), programs)
