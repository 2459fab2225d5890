r"""Runs any command of this project on Cloud TPU VMs, in a container on every one of them.

  python -m launch.pod.tpu_vm create --gin_file=my_pod.gin      # asks for the TPUs and waits until they are there
  python -m launch.pod.tpu_vm install --gin_file=my_pod.gin     # fetches the image onto all of them, once
  python -m launch.pod.tpu_vm run --gin_file=my_pod.gin -- python -m launch.merge --base=gs://... --output=gs://...
  python -m launch.pod.tpu_vm logs --gin_file=my_pod.gin --worker=all
  python -m launch.pod.tpu_vm status --gin_file=my_pod.gin
  python -m launch.pod.tpu_vm stop --gin_file=my_pod.gin        # SIGTERM: a run saves its state; `run` goes on from there
  python -m launch.pod.tpu_vm delete --gin_file=my_pod.gin

`gin_configs/runs/pod.gin` says what stands in my_pod.gin. --dry_run prints the commands and runs none. `run` shows the log of
the first worker, waits for all, and fails if any failed, naming it. Its containers outlive a broken connection: `logs`
finds them again, and so does `wait`. A run that broke, but not over what the user must mend, is begun again MAX_RESTARTS times.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

from absl import flags

from launch import exit_codes, gin_config
from launch.pod import settings
from launch.pod.programs import ATTEMPTS, ProgramFailed, Programs

VERBS = ("create", "install", "run", "wait", "logs", "status", "stop", "delete")
CONTAINER = "merging"
POLL_S = 30.0  # between two looks at a queue in which requests wait for minutes to days
GRACE_S = 120  # between SIGTERM and SIGKILL; a spot machine has 30 s, but by hand a checkpoint may be written

# States of a queued resource (cloud.google.com/tpu/docs/queued-resources).
READY = "ACTIVE"
HOPELESS = ("FAILED", "SUSPENDING", "SUSPENDED", "DELETING")

flags.adopt_module_key_flags(gin_config)


def define_flags() -> None:
    """Not at import, since other entry points have flags of these names."""
    flags.DEFINE_string("worker", "0", "Of `logs`: number of a worker within its slice, or all.")
    flags.DEFINE_string("node", "0", "Of `logs`: number of a slice, or all.")


def main(verb: str, pod: settings.Pod, command: Sequence[str]) -> None:
    """Does what the verb says."""
    if bool(command) != (verb == "run"):
        raise ValueError(
            "give the command after --" if verb == "run" else f"{verb} takes no command"
        )
    programs = Programs(is_dry_run=gin_config.DRY_RUN.value)
    if verb == "create":
        create(pod, programs)
    elif verb == "install":
        programs.run(ssh(pod, install_script(pod)), attempts=ATTEMPTS)
    elif verb == "run":
        run(pod, command, programs)
    elif verb == "wait":
        failed = failures(pod, programs)
        if failed:
            raise ProgramFailed(told(failed))
    elif verb == "logs":
        programs.run(ssh(pod, logs_script(pod), worker=flags.FLAGS.worker, node=flags.FLAGS.node))
    elif verb == "status":
        programs.run(describe(pod), attempts=ATTEMPTS)
        programs.run(ssh(pod, STATUS), attempts=ATTEMPTS)
    elif verb == "stop":
        programs.run(ssh(pod, STOP), attempts=ATTEMPTS)
    else:
        programs.run(delete(pod), attempts=ATTEMPTS)


def create(pod: settings.Pod, programs: Programs) -> None:
    """Asks for the TPUs, and waits until they are there.

    Raises ProgramFailed if they are refused.
    """
    programs.run(queue(pod))
    before = None
    while (
        state := programs.ask(describe(pod, is_short=True), supposed=READY)
        .strip()
        .rpartition("/")[2]
    ) != READY:
        if state in HOPELESS:
            raise ProgramFailed(
                f"the request for {pod.name} is {state}: `status` says why; `delete` it, then ask again"
            )
        if state != before:
            print(f"{pod.name}: {state}", flush=True)
        before = state
        programs.pause(POLL_S)
    print(
        f"{pod.name}: {READY}, {pod.hosts} hosts with {pod.chips_per_host} chips each", flush=True
    )


def run(pod: settings.Pod, command: Sequence[str], programs: Programs) -> None:
    """Runs a command on all workers, and again if it broke.

    Raises ProgramFailed if a worker failed in the end.
    """
    for left in range(pod.max_restarts, -1, -1):
        programs.run(ssh(pod, start_script(pod, command)), attempts=ATTEMPTS)
        try:
            programs.run(ssh(pod, logs_script(pod), worker="0", node="0"), attempts=ATTEMPTS)
        except ProgramFailed as error:
            print(f"The log can't be shown, but the run goes on: {error}", flush=True)
        failed = failures(pod, programs)
        if not failed:
            return
        if not left or any(code in exit_codes.FOR_THE_USER for code in failed.values()):
            raise ProgramFailed(told(failed))
        print(f"{told(failed)}\nBeginning again, at most {left} times.", flush=True)


def failures(pod: settings.Pod, programs: Programs) -> dict[str, int]:
    """Waits for the containers of all workers; the exit code of each that failed, by host.

    Raises ProgramFailed where a worker gives no answer.
    """
    supposed = "".join(f"exit host-{i} 0\n" for i in range(pod.hosts))
    answer = programs.ask(ssh(pod, WAIT), supposed=supposed)
    codes = {
        host: int(code) for host, code in re.findall(r"^exit (\S+) (\d+)\s*$", answer, flags=re.M)
    }
    if len(codes) != pod.hosts:
        raise ProgramFailed(
            f"{len(codes)} of {pod.hosts} workers told how their run ended (failed among them:"
            f" {told(_failed(codes)) or 'none'}): the others have gone, or never began; see `status`"
        )
    return _failed(codes)


def told(failed: Mapping[str, int]) -> str:
    """Which workers failed, in words."""
    return "; ".join(
        f"{host} failed with exit code {code}" for host, code in sorted(failed.items())
    )


# ---- commands ---------------------------------------------------------------------------------------------------


def queue(pod: settings.Pod) -> list[str]:
    """Asks for the TPUs."""
    slices = pod.mesh.slices
    nodes = (
        [f"--node-id={pod.name}"]
        if slices == 1
        else [f"--node-count={slices}", f"--node-prefix={pod.name}"]
    )
    capacity = {"on-demand": [], "spot": ["--spot"], "reserved": ["--reserved"]}[pod.capacity]
    account = [f"--service-account={pod.service_account}"] if pod.service_account else []
    return [
        *_gcloud("create", pod),
        f"--accelerator-type={pod.accelerator_type}",
        f"--runtime-version={pod.runtime_version or pod.generation.runtime_version}",
        *nodes,
        *capacity,
        *account,
    ]


def describe(pod: settings.Pod, *, is_short: bool = False) -> list[str]:
    """Shows the request, or its state alone."""
    return [*_gcloud("describe", pod), *(["--format=value(state.state)"] if is_short else [])]


def delete(pod: settings.Pod) -> list[str]:
    """Gives the TPUs back."""
    return [*_gcloud("delete", pod), "--force", "--quiet"]


def ssh(pod: settings.Pod, script: str, *, worker: str = "all", node: str = "all") -> list[str]:
    """Runs a line of bash on some workers. They take turns, 64 at a time: it must not wait for another worker's."""
    return [
        *_gcloud("ssh", pod),
        f"--node={node}",
        f"--worker={worker}",
        f"--command={script}",
    ]


def install_script(pod: settings.Pod) -> str:
    """Fetches the image."""
    registry = shlex.quote(pod.image.partition("/")[0])
    image = shlex.quote(pod.image)
    # jax asks for it on v5e and newer: the TPU's runtime starts and ends faster.
    pages = "echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
    login = f"sudo gcloud auth configure-docker {registry} --quiet"
    return f"{pages} && {login} && sudo docker pull {image}"


def start_script(pod: settings.Pod, command: Sequence[str]) -> str:
    """Starts the container, in place of an earlier one."""
    docker = ["sudo", "docker", "run", "--detach", f"--name={CONTAINER}"]
    # For the chips; for the addresses of the other workers; for libtpu, which pins memory.
    docker += ["--privileged", "--net=host", "--ulimit=memlock=-1"]
    docker += [f"--env={name}={value}" for name, value in pod.variables.items()]
    removed = f"sudo docker rm --force {CONTAINER} >/dev/null 2>&1"
    return f"{removed}; {shlex.join([*docker, pod.image, *command])}"


def logs_script(pod: settings.Pod) -> str:
    """Follows the log, its lines led by the host's name, and by the slice's number where there are several."""
    led = "$(hostname)"
    if pod.mesh.slices > 1:
        asked = "curl --silent --header Metadata-Flavor:Google " + TPU_ENVIRONMENT
        led = f"slice $({asked} | sed -n \"s/^MEGASCALE_SLICE_ID: *'\\(.*\\)'/\\1/p\") {led}"
    # Without pipefail a log that is not there would be none that is empty.
    return f'set -o pipefail; led="[{led}]"; sudo docker logs --follow {CONTAINER} 2>&1 | sed --unbuffered "s/^/$led /"'


# Where jax too reads which slice a machine is on.
TPU_ENVIRONMENT = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/tpu-env"
STATUS = f"sudo docker ps --all --filter=name={CONTAINER} --format='{{{{.Status}}}}'"
STOP = f"sudo docker stop --time={GRACE_S} {CONTAINER}"
WAIT = f"echo exit $(hostname) $(sudo docker wait {CONTAINER})"


def _gcloud(verb: str, pod: settings.Pod) -> list[str]:
    return [
        *("gcloud", "compute", "tpus", "queued-resources", verb, pod.name),
        f"--project={pod.project}",
        f"--zone={pod.zone}",
    ]


def _failed(codes: Mapping[str, int]) -> dict[str, int]:
    return {host: code for host, code in codes.items() if code}


if __name__ == "__main__":
    define_flags()
    settings.run(main, verbs=VERBS)
