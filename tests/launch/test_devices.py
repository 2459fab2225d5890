"""What start-up puts into the environment, and who takes part. Joining itself is tested in test_local.py."""

from __future__ import annotations

import http.server
import os
import threading

import jax
import pytest

from launch import devices

COUNT_FLAG = "--xla_force_host_platform_device_count"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Says what is installed and plugged in."""

    def set_machine(*, libtpu: bool = False, tpu: bool = False, gpu: bool = False) -> None:
        monkeypatch.setattr(devices, "_has_module", lambda name: libtpu and name == "libtpu")
        monkeypatch.setattr(devices, "_has_tpu", lambda: tpu)
        monkeypatch.setattr(devices, "_has_gpu", lambda: gpu)
        monkeypatch.setattr(os, "cpu_count", lambda: 2)

    set_machine()
    return set_machine


def test_tests_run_on_8_cpu_devices_with_threads_enough():
    assert jax.default_backend() == "cpu"
    assert jax.local_device_count() == 8
    assert int(os.environ["NPROC"]) >= 16


@pytest.mark.parametrize(
    ("libtpu", "tpu", "gpu", "platforms"),
    [
        (False, False, False, None),
        (True, True, False, None),
        (True, False, False, "cpu"),
        (True, False, True, "cuda,cpu"),
        (False, False, True, None),
    ],
)
def test_a_libtpu_without_a_tpu_is_left_alone(machine, libtpu, tpu, gpu, platforms):
    machine(libtpu=libtpu, tpu=tpu, gpu=gpu)
    added = devices.platform_environment({})
    assert added.get("JAX_PLATFORMS") == platforms
    assert added.get("TPU_SKIP_MDS_QUERY") == (None if platforms is None else "1")


def test_a_platform_that_the_user_chose_stays(machine):
    machine(libtpu=True)
    assert "JAX_PLATFORMS" not in devices.platform_environment({"JAX_PLATFORMS": "tpu"})
    assert "TPU_SKIP_MDS_QUERY" not in devices.platform_environment({"JAX_PLATFORMS": "tpu"})


def test_tensorflow_is_quiet_unless_asked(machine):
    assert devices.platform_environment({})["TF_CPP_MIN_LOG_LEVEL"] == "3"
    asked = {"TF_CPP_MIN_LOG_LEVEL": "0"}
    assert devices.platform_environment(asked)["TF_CPP_MIN_LOG_LEVEL"] == "0"


@pytest.mark.parametrize(
    ("flags", "nproc", "threads"),
    [
        ("", None, None),
        (f"{COUNT_FLAG}=1", None, None),
        (f"{COUNT_FLAG}=8", None, "16"),
        (f"--xla_other=3 {COUNT_FLAG}=4", None, "8"),
        (f"{COUNT_FLAG}=8", "4", "16"),
        (f"{COUNT_FLAG}=8", "64", "64"),
    ],
)
def test_virtual_devices_get_two_threads_each(machine, flags, nproc, threads):
    environment = {"XLA_FLAGS": flags} | ({"NPROC": nproc} if nproc else {})
    assert devices.platform_environment(environment).get("NPROC") == threads


def test_the_number_of_virtual_devices_replaces_an_earlier_one(machine):
    environment = {"XLA_FLAGS": f"--xla_other=3 {COUNT_FLAG}=8", "JAX_PLATFORMS": "tpu"}
    added = devices.cpu_environment(environment, devices=4)
    assert added["XLA_FLAGS"] == f"--xla_other=3 {COUNT_FLAG}=4"
    assert added["JAX_PLATFORMS"] == "cpu"
    assert added["NPROC"] == "8"
    assert devices.virtual_devices(added) == 4


def test_a_count_of_one_is_one_process_wherever_it_runs():
    assert devices.processes(SLURM, count=1) == devices.Processes()


SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_NODELIST": "node[007-009,012]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}


def test_slurm_says_who_takes_part(machine, monkeypatch: pytest.MonkeyPatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    found = devices.processes(os.environ)
    assert (found.count, found.index) == (4, 2)
    assert found.coordinator == f"node007:{61440 + 4100 % 4096}"
    alone = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}
    assert devices.processes(alone) == devices.Processes()  # the script of a job, outside of srun


def test_gke_says_who_takes_part(machine, monkeypatch: pytest.MonkeyPatch):
    """Host 1 of slice 2 of 3, with two hosts each."""
    machine(tpu=True, libtpu=True)
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    said = {
        "TPU_WORKER_HOSTNAMES": "localhost,elsewhere",
        "TPU_WORKER_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
        "MEGASCALE_NUM_SLICES": "3",
        "MEGASCALE_SLICE_ID": "2",
    }
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert devices.processes(os.environ) == devices.Processes(
        coordinator="localhost:8482", count=6, index=5, slice=2
    )
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert devices.processes(os.environ) == devices.Processes()


class Metadata(http.server.BaseHTTPRequestHandler):
    """What a TPU VM can ask for: worker 1 of the two of its slice."""

    VALUES = {
        "agent-worker-number": "1",
        "worker-network-endpoints": "unused:0:127.0.0.1,unused:1:127.0.0.2",
        "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-8'\nMEGASCALE_NUM_SLICES: '1'\n",
    }

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.VALUES[self.path.rpartition("/")[2]].encode())

    def log_message(self, *args: object) -> None:
        """Says nothing."""


def test_a_tpu_vm_says_who_takes_part(machine, monkeypatch: pytest.MonkeyPatch):
    machine(tpu=True, libtpu=True)
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        for name in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES"):
            monkeypatch.delenv(name, raising=False)
        found = devices.processes(os.environ)
        server.shutdown()
    assert found == devices.Processes(coordinator="127.0.0.1:8482", count=2, index=1)


def test_a_cluster_that_can_not_be_read_is_an_error(machine, monkeypatch: pytest.MonkeyPatch):
    for name, value in SLURM.items():
        if name != "SLURM_PROCID":
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="looks like a process of a Slurm cluster"):
        devices.processes(os.environ)


def test_processes_come_from_flags_else_from_the_environment():
    environment = {
        "MERGING_COORDINATOR": "host:1",
        "MERGING_PROCESS_COUNT": "4",
        "MERGING_PROCESS_INDEX": "3",
    }
    assert devices.processes({}) == devices.Processes()
    assert devices.processes(environment) == devices.Processes(
        coordinator="host:1", count=4, index=3
    )
    assert devices.processes(environment, coordinator="other:2", count=2, index=0) == (
        devices.Processes(coordinator="other:2", count=2, index=0)
    )


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MERGING_PROCESS_COUNT": "2"}, "coordinator and index is not set"),
        ({"MERGING_PROCESS_COUNT": "two"}, "MERGING_PROCESS_COUNT is 'two': give a whole number"),
        (
            {
                "MERGING_COORDINATOR": "h:1",
                "MERGING_PROCESS_COUNT": "2",
                "MERGING_PROCESS_INDEX": "2",
            },
            "process 2 of 2: the index runs from 0",
        ),
        (
            {
                "MERGING_COORDINATOR": "h",
                "MERGING_PROCESS_COUNT": "2",
                "MERGING_PROCESS_INDEX": "0",
            },
            "need a coordinator host:port, and it is 'h'",
        ),
    ],
)
def test_processes_that_can_not_be_are_an_error(environment: dict[str, str], message: str):
    with pytest.raises(ValueError, match=message):
        devices.processes(environment)
