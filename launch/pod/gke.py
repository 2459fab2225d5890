r"""Runs any command of this project on GKE, as a JobSet: one or several slices, or a study phase by phase.

  python -m launch.pod.gke submit --gin_file=my_pod.gin --dry_run -- python -m launch.merge --base=gs://... --output=gs://...
  python -m launch.pod.gke submit --gin_file=my_pod.gin --workers=8 -- python -m launch.study --gin_file=... --output=gs://...
  python -m launch.pod.gke wait --gin_file=my_pod.gin           # until it is done; fails where it failed, and names the hosts
  python -m launch.pod.gke logs --gin_file=my_pod.gin --worker=all
  python -m launch.pod.gke status --gin_file=my_pod.gin
  python -m launch.pod.gke delete --gin_file=my_pod.gin

`gin_configs/runs/pod.gin` says what stands in my_pod.gin. --dry_run prints the commands and the manifest and runs nothing. Slices
of MESH run one program together. With --workers the command is a study's: so many workers, a slice each, share the items of each
phase, and a phase starts when the one before it is complete.

Wants JobSet 0.12 in the cluster. What is begun again, and what is not, stands in launch/exit_codes.py: a mistake of the user fails the
JobSet at once, a preemption begins it again and does not count, anything else counts towards MAX_RESTARTS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml
from absl import flags

from launch import exit_codes, gin_config, phases
from launch.pod import settings
from launch.pod.programs import ATTEMPTS, ProgramFailed, Programs

VERBS = ("submit", "wait", "logs", "status", "delete")
CONTAINER = "main"
POLL_S = 30.0
GRACE_S = 120  # between SIGTERM and SIGKILL: a checkpoint is written meanwhile
LOGGED_AT_ONCE = 300  # pods whose logs kubectl follows; it wants to be told

flags.adopt_module_key_flags(gin_config)


def define_flags() -> None:
    """Not at import, since other entry points have flags of these names."""
    flags.DEFINE_string("worker", "0", "Of `logs`: number of a host within its slice, or all.")
    flags.DEFINE_integer(
        "workers", None, "Of `submit`: the command is a study, shared by so many.", lower_bound=1
    )


def main(verb: str, pod: settings.Pod, command: Sequence[str]) -> None:
    """Does what the verb says."""
    if bool(command) != (verb == "submit"):
        raise ValueError(
            "give the command after --" if verb == "submit" else f"{verb} takes no command"
        )
    if pod.cluster is None:
        raise ValueError("CLUSTER is not set: give the name of the GKE cluster")
    programs = Programs(is_dry_run=gin_config.DRY_RUN.value)
    jobset = f"jobset/{pod.name}"
    if verb == "submit":
        workers = flags.FLAGS.workers
        submit(
            pod,
            manifest(pod, command) if workers is None else study(pod, command, workers),
            programs,
        )
    elif verb == "wait":
        wait(pod, programs)
    elif verb == "logs":
        programs.run(logs(pod, flags.FLAGS.worker))
    elif verb == "status":
        programs.run(kubectl(pod, "get", jobset, "--output=wide"), attempts=ATTEMPTS)
        programs.run(kubectl(pod, "get", "pods", _of(pod), "--output=wide"), attempts=ATTEMPTS)
    else:
        programs.run(kubectl(pod, "delete", jobset, "--ignore-not-found"), attempts=ATTEMPTS)


def submit(pod: settings.Pod, made: dict[str, Any], programs: Programs) -> None:
    """Hands a manifest over. Not by `apply`: what runs under this name already is an error, and is not changed."""
    programs.run(kubectl(pod, "create", "--filename=-"), stdin=text(made))


def wait(pod: settings.Pod, programs: Programs) -> None:
    """Waits until the JobSet has ended.

    Raises ProgramFailed if it failed.
    """
    asked = kubectl(pod, "get", f"jobset/{pod.name}", "--output=jsonpath={.status.terminalState}")
    while not (state := programs.ask(asked, supposed="Completed").strip()):
        programs.pause(POLL_S)
    print(f"{pod.name}: {state}", flush=True)
    if state != "Completed":
        failed = programs.ask(
            kubectl(
                pod,
                "get",
                "pods",
                _of(pod),
                "--field-selector=status.phase=Failed",
                "--output=name",
            )
        )
        names = ", ".join(name.removeprefix("pod/") for name in failed.split())
        raise ProgramFailed(f"{pod.name} failed on {names or 'hosts that have gone'}: see `logs`")


# ---- manifests --------------------------------------------------------------------------------------------------


def manifest(pod: settings.Pod, command: Sequence[str]) -> dict[str, Any]:
    """The JobSet of a command that all slices run together."""
    literal = [_literal(argument) for argument in command]
    return _jobset(pod, [_replicated_job(pod, "slice", literal, replicas=pod.mesh.slices)])


def study(pod: settings.Pod, command: Sequence[str], workers: int) -> dict[str, Any]:
    """The JobSet of a study's phases, each with workers of a slice; the report takes no TPU.

    Raises ValueError where MESH joins several slices.
    """
    if pod.mesh.slices > 1:
        raise ValueError(
            f"MESH joins {pod.mesh.slices} slices, and a study's workers have one each: choose the mesh of one slice"
        )
    jobs: list[dict[str, Any]] = []
    for phase in phases.PHASES:
        is_report = phase == phases.REPORT
        each = [
            # GKE has all replicas of a job join as slices of one program, which these are not.
            *("env", *(f"--unset=MEGASCALE_{name}" for name in MEGASCALE)),
            *map(_literal, command),
            *phases.flags_of(phase, _INDEX, workers),
        ]
        replicas = phases.workers_of(phase, workers)
        job = _replicated_job(pod, phase, each, replicas=replicas, has_tpu=not is_report)
        if jobs:
            job["dependsOn"] = [{"name": jobs[-1]["name"], "status": "Complete"}]
        jobs.append(job)
    return _jobset(pod, jobs)


MEGASCALE = ("COORDINATOR_ADDRESS", "NUM_SLICES", "PORT", "SLICE_ID")


def text(made: dict[str, Any]) -> str:
    """A manifest as YAML."""
    return yaml.dump(made, Dumper=_Dumper, sort_keys=False, width=1000)


class _Dumper(yaml.SafeDumper):
    """Writes what occurs twice twice, not as an anchor and its alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _jobset(pod: settings.Pod, jobs: list[dict[str, Any]]) -> dict[str, Any]:
    labels = {} if pod.queue is None else {"labels": {"kueue.x-k8s.io/queue-name": pod.queue}}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": pod.name,
            "namespace": pod.namespace,
            **labels,
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": pod.max_restarts,
                "rules": [
                    {
                        "name": "preempted",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                        "onJobFailureMessagePatterns": [f"rule at index [0-{len(_PREEMPTED) - 1}]"],
                    },
                    {
                        "name": "mistake",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    },
                    {"name": "broken", "action": "RestartJobSet"},
                ],
            },
            "replicatedJobs": jobs,
        },
    }


# The first that matches counts, so a host that is taken away is preempted whatever its program exits with.
_PREEMPTED = [
    {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    {
        "action": "FailJob",
        "onExitCodes": {
            "containerName": CONTAINER,
            "operator": "In",
            "values": [int(exit_codes.PREEMPTED)],
        },
    },
]
_MISTAKE = {
    "action": "FailJob",
    "onExitCodes": {
        "containerName": CONTAINER,
        "operator": "In",
        "values": sorted(exit_codes.FOR_THE_USER),
    },
}

_INDEX = "$(JOB_INDEX)"  # Kubernetes puts the variable's value in its place


def _replicated_job(
    pod: settings.Pod,
    name: str,
    command: Sequence[str],
    *,
    replicas: int,
    has_tpu: bool = True,
) -> dict[str, Any]:
    hosts = pod.mesh.hosts if has_tpu else 1
    # All hosts of a slice are of one node pool, and no other job is on it.
    place = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "name": name,
        "replicas": replicas,
        "template": {
            **({"metadata": {"annotations": place}} if has_tpu else {}),
            "spec": {
                "completionMode": "Indexed",
                "completions": hosts,
                "parallelism": hosts,
                "backoffLimit": 0,  # a host alone can't begin again: all of the slice do, or none
                "podFailurePolicy": {"rules": [*_PREEMPTED, _MISTAKE]},
                "template": {"spec": _pod(pod, command, has_tpu=has_tpu)},
            },
        },
    }


def _pod(pod: settings.Pod, command: Sequence[str], *, has_tpu: bool) -> dict[str, Any]:
    variables = dict(pod.variables) | ({} if has_tpu else {"JAX_PLATFORMS": "cpu"})
    index = {"fieldRef": {"fieldPath": "metadata.labels['jobset.sigs.k8s.io/job-index']"}}
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": pod.image,
        "args": list(command),  # `command` would replace tini
        "env": [
            {"name": "JOB_INDEX", "valueFrom": index},
            *({"name": name, "value": _literal(value)} for name, value in variables.items()),
        ],
    }
    if has_tpu:
        container["resources"] = {"limits": {"google.com/tpu": pod.chips_per_host}}
    account = {} if pod.service_account is None else {"serviceAccountName": pod.service_account}
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_S,
        **account,
        **({"nodeSelector": _nodes(pod)} if has_tpu else {}),
        "containers": [container],
    }


def _nodes(pod: settings.Pod) -> dict[str, str]:
    selected = {
        "cloud.google.com/gke-tpu-accelerator": pod.generation.gke,
        "cloud.google.com/gke-tpu-topology": pod.topology,
    }
    if pod.capacity == "spot":
        selected["cloud.google.com/gke-spot"] = "true"
    if pod.capacity == "reserved":
        if pod.reservation is None:
            raise ValueError("CAPACITY is 'reserved', and RESERVATION is not set: give its name")
        selected["cloud.google.com/reservation-name"] = pod.reservation
    return selected


def _literal(value: str) -> str:
    """A string that Kubernetes, to which $ is special, leaves as it is."""
    return str(value).replace("$", "$$")


# ---- commands ---------------------------------------------------------------------------------------------------


def kubectl(pod: settings.Pod, *arguments: str) -> list[str]:
    """kubectl, on the pod's cluster."""
    location = pod.cluster_location or pod.zone
    return [
        "kubectl",
        f"--context=gke_{pod.project}_{location}_{pod.cluster}",
        f"--namespace={pod.namespace}",
        *arguments,
    ]


def logs(pod: settings.Pod, worker: str) -> list[str]:
    """Follows the logs of one host of every slice, or of all."""
    host = "" if worker == "all" else f",batch.kubernetes.io/job-completion-index={worker}"
    return kubectl(
        pod,
        "logs",
        _of(pod) + host,
        "--follow",
        "--prefix",
        "--tail=-1",
        f"--max-log-requests={LOGGED_AT_ONCE}",
    )


def _of(pod: settings.Pod) -> str:
    return f"--selector=jobset.sigs.k8s.io/jobset-name={pod.name}"


if __name__ == "__main__":
    define_flags()
    settings.run(main, verbs=VERBS)
