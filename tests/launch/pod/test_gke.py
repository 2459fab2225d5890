"""JobSets: their commands as Kubernetes would read them, their schema, and a kubectl that is not there."""

from __future__ import annotations

import os
import pathlib
import re
from typing import Any

import pytest
import yaml

from launch import exit_codes
from launch.pod import gke
from launch.pod.programs import ProgramFailed, Programs
from tests.launch.pod.test_tpu_vm import QUOTED

COMMAND = ["python", "-m", "launch.merge", "--output=gs://b/merged"]
STUDY = ["python", "-m", "launch.study", "--output=gs://b/paper"]


def expanded(argument: str, variables: dict[str, str]) -> str:
    """What Kubernetes makes of an argument: $$ is $, and $(NAME) the value of a variable that there is."""
    return re.sub(
        r"\$\$|\$\((\w+)\)",
        lambda found: "$" if found[0] == "$$" else variables.get(found[1], found[0]),
        argument,
    )


def container(job: dict[str, Any]) -> dict[str, Any]:
    return job["template"]["spec"]["template"]["spec"]["containers"][0]


def run_as(job: dict[str, Any], index: int) -> list[str]:
    """What a host of a replica of a job runs."""
    return [expanded(argument, {"JOB_INDEX": str(index)}) for argument in container(job)["args"]]


def test_a_command_arrives_as_it_was_given(make_pod):
    tricky = [*QUOTED, "$(JOB_INDEX)", "$$(x) $$$", "${y}"]
    made = yaml.safe_load(gke.text(gke.manifest(make_pod(), tricky)))
    assert run_as(made["spec"]["replicatedJobs"][0], 5) == tricky


def test_slices_run_one_program(make_pod):
    [job] = gke.manifest(make_pod("v5e-256x4"), COMMAND)["spec"]["replicatedJobs"]
    assert job["replicas"] == 4
    assert job["template"]["spec"]["completions"] == job["template"]["spec"]["parallelism"] == 64
    assert container(job)["resources"]["limits"] == {"google.com/tpu": 4}


def test_a_study_goes_phase_by_phase_its_workers_apart(make_pod):
    jobs = gke.study(make_pod(), STUDY, 3)["spec"]["replicatedJobs"]
    assert [job["name"] for job in jobs] == ["bases", "experts", "cells", "report"]
    assert [job["replicas"] for job in jobs] == [3, 3, 3, 1]
    assert "dependsOn" not in jobs[0]
    for before, job in zip(jobs, jobs[1:], strict=False):
        assert job["dependsOn"] == [{"name": before["name"], "status": "Complete"}]
    command = run_as(jobs[2], 1)
    assert command[0] == "env"
    assert "--unset=MEGASCALE_NUM_SLICES" in command
    asked = ["--gin.PHASE='cells'", "--worker=1", "--num_workers=3"]
    assert command[-len(STUDY) - 3 :] == [*STUDY, *asked]
    assert run_as(jobs[3], 0)[-2:] == ["--worker=0", "--num_workers=1"]
    assert "resources" not in container(jobs[3])


def test_a_study_on_joined_slices_is_refused(make_pod):
    with pytest.raises(ValueError, match="MESH joins 4 slices"):
        gke.study(make_pod("v5e-256x4"), STUDY, 3)


def outcome(made: dict[str, Any], *, code: int | None) -> str:
    """What JobSet does where a pod ends with a code, or is taken away (None): transcribed from its and Kubernetes' documentation."""
    [job] = made["spec"]["replicatedJobs"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for number, rule in enumerate(job["template"]["spec"]["podFailurePolicy"]["rules"]):
        wanted = rule.get("onExitCodes", {}).get("values", [])
        if code in wanted or (code is None and "onPodConditions" in rule):
            reason, message = "PodFailurePolicy", f"Pod matching FailJob rule at index {number}"
            break
    for rule in made["spec"]["failurePolicy"]["rules"]:
        reasons = rule.get("onJobFailureReasons", [reason])
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in reasons and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize(
    ("code", "action"),
    [
        (exit_codes.MISTAKE, "FailJobSet"),
        (exit_codes.INPUT_MISSING, "FailJobSet"),
        (exit_codes.BROKEN, "RestartJobSet"),
        (134, "RestartJobSet"),  # jax ends a process whose peers have gone by SIGABRT
        (137, "RestartJobSet"),  # out of memory
        (exit_codes.PREEMPTED, "RestartJobSetAndIgnoreMaxRestarts"),
        (None, "RestartJobSetAndIgnoreMaxRestarts"),
    ],
)
def test_what_is_begun_again(make_pod, code: int | None, action: str):
    assert outcome(gke.manifest(make_pod(), COMMAND), code=code) == action


def test_spot_reserved_queue_and_account(make_pod):
    def spec(*bindings: str) -> dict[str, Any]:
        [job] = gke.manifest(make_pod("v5e-16", *bindings), COMMAND)["spec"]["replicatedJobs"]
        return job["template"]["spec"]["template"]["spec"]

    assert spec("CAPACITY = 'spot'")["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    reserved = spec("CAPACITY = 'reserved'", "RESERVATION = 'ours'")
    assert reserved["nodeSelector"]["cloud.google.com/reservation-name"] == "ours"
    with pytest.raises(ValueError, match="RESERVATION is not set"):
        spec("CAPACITY = 'reserved'")
    assert spec("SERVICE_ACCOUNT = 'merger'")["serviceAccountName"] == "merger"
    queued = gke.manifest(make_pod("v5e-16", "QUEUE = 'team'"), COMMAND)
    assert queued["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team"}


# ---- the schema -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """JobSet's, in which a field that it does not know is an error, as it is to `kubectl create`."""
    path = os.environ.get("JOBSET_CRD")
    if not path:
        pytest.skip(
            "JOBSET_CRD names no copy of config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml of"
            " github.com/kubernetes-sigs/jobset"
        )
    definition = yaml.load(
        pathlib.Path(path).read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    )
    [found] = [
        version["schema"]["openAPIV3Schema"]
        for version in definition["spec"]["versions"]
        if version["name"] == "v1alpha2"
    ]
    found["properties"]["metadata"] = {"type": "object"}
    return closed(found)


def closed(node: Any) -> Any:
    """A schema whose objects have no other properties than those it names."""
    if isinstance(node, dict):
        made = {key: closed(value) for key, value in node.items()}
        if isinstance(node.get("properties"), dict) and node.get("type") == "object":
            made["additionalProperties"] = False
        if node.get("x-kubernetes-int-or-string"):
            made.pop("type", None)
        return made
    return [closed(each) for each in node] if isinstance(node, list) else node


def test_manifests_are_of_the_schema(schema, make_pod):
    validator = pytest.importorskip("jsonschema").Draft4Validator(schema)
    full = ["QUEUE = 'team'", "SERVICE_ACCOUNT = 'merger'", "CAPACITY = 'spot'"]
    for made in (
        gke.manifest(make_pod("v5e-256x4", *full), COMMAND),
        gke.study(make_pod("v5p-512", *full), STUDY, 8),
    ):
        assert not [error.message for error in validator.iter_errors(made)]
    made["spec"]["replicatedJobs"][1]["dependsOn"][0]["state"] = "Complete"
    assert list(validator.iter_errors(made))


# ---- kubectl ----------------------------------------------------------------------------------------------------


def test_submit_hands_the_manifest_over(cloud, make_pod, programs):
    pod = make_pod()
    gke.submit(pod, gke.manifest(pod, COMMAND), programs)
    [call] = cloud.calls("kubectl")
    context = "--context=gke_my-project_us-west4-a_tpus"
    assert call["arguments"] == [context, "--namespace=default", "create", "--filename=-"]
    assert yaml.safe_load(call["stdin"]) == gke.manifest(pod, COMMAND)


def test_wait_ends_with_the_jobset(cloud, make_pod, programs: Programs, slept):
    cloud.plan(states=["", "", "Completed"], failures={"get": 2})
    gke.wait(make_pod(), programs)
    assert slept == [5, 10, gke.POLL_S, gke.POLL_S]


def test_a_jobset_that_failed_is_a_failure_that_names_the_hosts(cloud, make_pod, programs):
    cloud.plan(states=["", "Failed"], failed="pod/night-slice-0-2-x7k")
    with pytest.raises(ProgramFailed, match="night failed on night-slice-0-2-x7k: see `logs`"):
        gke.wait(make_pod(), programs)


def test_a_cluster_must_be_named(make_pod):
    with pytest.raises(ValueError, match="CLUSTER is not set"):
        gke.main("status", make_pod("v5e-16", "CLUSTER = None"), [])
