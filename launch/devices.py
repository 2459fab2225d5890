"""Start-up of devices and processes, in one file: call `start` before any jax array exists.

It chooses the platform, gives the CPU as many virtual devices as are asked for, and joins the processes of one job.
jax is imported inside functions, so that `--help` needs none of it.

Who takes part comes from the flags, else from the environment (MERGING_COORDINATOR: host:port of process 0, MERGING_PROCESS_COUNT,
MERGING_PROCESS_INDEX), else from the cluster: Cloud TPU VMs, GKE or Slurm. XLA_FLAGS, LIBTPU_INIT_ARGS and JAX_PLATFORMS are left as
they are found: what is recommended for the overlap of collectives changes no program of libtpu 0.0.42.1 (WORKSPACE.md's log).
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from absl import flags

from launch import allocation, exit_codes, watchdog

# Process 0 may start minutes after the others on a cluster; beyond this somebody is not coming.
INITIALIZATION_TIMEOUT_S = 300

# XLA's CPU threads per virtual device. Each collective in flight parks a thread per device; with fewer than 2 per
# device (jax 0.10.2) about 32 undrained steps deadlock.
THREADS_PER_DEVICE = 2

COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address",
    None,
    "host:port of process 0; default MERGING_COORDINATOR, else one process.",
)
PROCESS_COUNT = flags.DEFINE_integer(
    "process_count", None, "Processes of this job; default MERGING_PROCESS_COUNT.", lower_bound=1
)
PROCESS_INDEX = flags.DEFINE_integer(
    "process_index",
    None,
    "Number of this process, from 0; default MERGING_PROCESS_INDEX.",
    lower_bound=0,
)
INITIALIZATION_TIMEOUT = flags.DEFINE_integer(
    "initialization_timeout",
    INITIALIZATION_TIMEOUT_S,
    "Seconds to wait for the other processes.",
    lower_bound=1,
)
HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    "heartbeat_timeout",
    watchdog.HEARTBEAT_TIMEOUT_S,
    "Seconds without a sign of life of one process after which all end.",
    lower_bound=2,
)
COMPILATION_CACHE_DIR = flags.DEFINE_string(
    "compilation_cache_dir",
    None,
    "Folder of compiled programs, which later runs take from there; '' for none; default JAX_COMPILATION_CACHE_DIR, else"
    " ~/.cache/merging-at-scale/compiled.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """Who takes part in a job. One process needs no coordinator.

    Attributes:
      coordinator: host:port of process 0.
      count: processes.
      index: of this one.
      slice: number of the TPU slice that it is on, where the job has several; None: there is one.
    """

    coordinator: str | None = None
    count: int = 1
    index: int = 0
    slice: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"process {self.index} of {self.count}: the index runs from 0 to count - 1"
            )
        if self.count > 1 and not re.fullmatch(r".+:\d+", self.coordinator or ""):
            raise ValueError(
                f"{self.count} processes need a coordinator host:port, and it is {self.coordinator!r}:"
                " give --coordinator_address or MERGING_COORDINATOR"
            )

    @property
    def name(self) -> str:
        """This process, for messages: `process 70 of 256, slice 1`."""
        where = "" if self.slice is None else f", slice {self.slice}"
        return f"process {self.index} of {self.count}{where}"


def start_from_flags() -> Processes:
    """`start`, as the flags, the environment or the cluster say."""
    allocation.keep_freed_memory()  # before jax starts threads
    os.environ.update(platform_environment(os.environ))  # before a cluster is asked for, by jax
    joined = processes(
        os.environ,
        coordinator=COORDINATOR_ADDRESS.value,
        count=PROCESS_COUNT.value,
        index=PROCESS_INDEX.value,
    )
    start(
        joined,
        timeout_s=INITIALIZATION_TIMEOUT.value,
        heartbeat_timeout_s=HEARTBEAT_TIMEOUT.value,
    )
    keep_compiled(os.environ, COMPILATION_CACHE_DIR.value)
    return joined


def keep_compiled(environment: Mapping[str, str], folder: str | None) -> None:
    """Compiled programs are kept in the folder, or where the environment or the user's cache is; "" keeps none."""
    import jax

    if folder is None and "JAX_COMPILATION_CACHE_DIR" in environment:
        return  # jax has read it
    if folder is None:
        cache = environment.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        folder = str(pathlib.Path(cache) / "merging-at-scale" / "compiled")
    jax.config.update("jax_compilation_cache_dir", folder or None)


def start(
    joined: Processes | None = None,
    *,
    timeout_s: int = INITIALIZATION_TIMEOUT_S,
    heartbeat_timeout_s: int = watchdog.HEARTBEAT_TIMEOUT_S,
) -> None:
    """Chooses platform and threads, then joins the other processes.

    Where they do not come within `timeout_s`, this process says who is missing and ends.
    """
    joined = joined or Processes()
    os.environ.update(platform_environment(os.environ))
    import jax

    if "JAX_PLATFORMS" in os.environ:  # read by jax when it was imported, perhaps before this
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    if joined.count == 1:
        return
    who = joined.name.capitalize()
    print(
        f"{who}: waiting at most {timeout_s} s for the others at {joined.coordinator}.",
        file=sys.stderr,
        flush=True,
    )
    try:
        connections = watchdog.meet(
            joined.coordinator, count=joined.count, index=joined.index, timeout_s=timeout_s
        )
    except watchdog.PeersMissing as missing:
        print(f"{who}: {missing}.", file=sys.stderr)
        end(exit_codes.BROKEN, joined)
    is_joined = watchdog.watch(
        connections, count=joined.count, index=joined.index, timeout_s=heartbeat_timeout_s
    )
    is_local = (joined.coordinator or "").rpartition(":")[0] in ("127.0.0.1", "localhost")
    jax.distributed.initialize(
        joined.coordinator,
        joined.count,
        joined.index,
        initialization_timeout=timeout_s,
        heartbeat_timeout_seconds=heartbeat_timeout_s,
        coordinator_bind_address=joined.coordinator
        if is_local
        else None,  # default: every interface
    )
    is_joined.set()
    sys.excepthook = lambda *error: _fail(joined, heartbeat_timeout_s, *error)


def end(code: int, joined: Processes) -> NoReturn:
    """Ends this process. One that has failed does not wait for the others, which an ordinary exit does (jax 0.10.2).

    Processes that were asked to stop all end: one that left earlier would be taken for one that has died.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if code not in (0, exit_codes.PREEMPTED) and joined.count > 1:
        os._exit(code)
    sys.exit(code)


def _fail(joined: Processes, heartbeat_timeout_s: int, *error: Any) -> NoReturn:
    sys.__excepthook__(*error)
    print(f"{joined.name.capitalize()} failed.", file=sys.stderr, flush=True)
    import jax

    is_of_collective = issubclass(error[0], jax.errors.JaxRuntimeError)
    if is_of_collective and "RESOURCE_EXHAUSTED" not in str(error[1]):
        # Most likely over a process that has gone. jax names it, and ends this one, when its heartbeats are missed.
        at_most = 1.5 * heartbeat_timeout_s
        print(f"Waiting {at_most:.0f} s to hear if another has gone.", file=sys.stderr, flush=True)
        time.sleep(at_most)
    end(exit_codes.BROKEN, joined)


def processes(
    environment: Mapping[str, str],
    *,
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
) -> Processes:
    """The given values, else those of the environment, all three or none; else those of the cluster. A count of 1 alone is one process."""
    said = {
        "coordinator": coordinator or environment.get("MERGING_COORDINATOR"),
        "count": _integer(environment, "MERGING_PROCESS_COUNT") if count is None else count,
        "index": _integer(environment, "MERGING_PROCESS_INDEX") if index is None else index,
    }
    missing = [name for name, value in said.items() if value is None]
    if len(missing) == len(said):
        return _of_cluster(environment)
    if said["count"] == 1 and said["coordinator"] is None and not said["index"]:
        return Processes()
    if missing:
        raise ValueError(
            f"Of coordinator, count and index of the processes, {' and '.join(missing)} is not set:"
            " give --coordinator_address, --process_count and --process_index, or MERGING_COORDINATOR,"
            " MERGING_PROCESS_COUNT and MERGING_PROCESS_INDEX, or none of them"
        )
    return Processes(**said, slice=_slice(environment.get, said["index"], said["count"]))


def _of_cluster(environment: Mapping[str, str]) -> Processes:
    """Who takes part, as jax reads it from a cluster; one process where there is none."""
    method = cluster(environment)
    if method is None:
        return Processes()
    # jax offers this within `initialize` only, before which the processes meet.
    from jax._src.clusters import ClusterEnv
    from jax._src.clusters.cloud_tpu_cluster import get_tpu_env_value

    try:
        coordinator, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, method, INITIALIZATION_TIMEOUT_S
        )
        # Of TPUs jax has just asked the same: the environment, then the metadata server.
        ask = environment.get if method == "slurm" else get_tpu_env_value
        of_slice = _slice(ask, index, count)
    except (KeyError, ValueError, RuntimeError, OSError) as error:
        raise ValueError(
            f"this looks like a process of a {CLUSTERS[method]} cluster, and who takes part can't be read from it"
            f" ({type(error).__name__}: {error}): give --coordinator_address, --process_count and --process_index, or"
            " --process_count=1 to run alone"
        ) from error
    return Processes(coordinator=coordinator, count=count, index=index, slice=of_slice)


def _slice(ask: Callable[[str], str | None], index: int, count: int) -> int | None:
    """The slice of a process: slices have equally many, one after another. None where there is one slice."""
    slices = int(ask("MEGASCALE_NUM_SLICES") or 1)
    return index * slices // count if slices > 1 else None


# jax's names of the clusters that are looked for.
CLUSTERS = {"gketpu": "GKE", "gcetpu": "Cloud TPU", "slurm": "Slurm"}


def cluster(environment: Mapping[str, str]) -> str | None:
    """Which cluster started this process; None: none."""
    is_tpu = _has_tpu() and _has_module("libtpu")
    if is_tpu and "tpu" in (environment.get("JAX_PLATFORMS") or "tpu"):
        if environment.get("TPU_WORKER_HOSTNAMES") or environment.get("TPU_PROCESS_ADDRESSES"):
            return "gketpu"
        return None if environment.get("TPU_SKIP_MDS_QUERY") else "gcetpu"
    # In a job's script, outside of `srun`, there is no step: that is one process.
    if environment.get("SLURM_STEP_NODELIST") and environment.get("SLURM_NTASKS", "1") != "1":
        return "slurm"
    return None


def platform_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to an environment so that jax starts quickly, on what is there, and without deadlocks."""
    added = {}
    # TensorFlow, which reads text here, calls a missing GPU an error; what is one raises besides.
    added["TF_CPP_MIN_LOG_LEVEL"] = environment.get("TF_CPP_MIN_LOG_LEVEL", "3")
    # numpy's BLAS, read when numpy is imported: it has small products only, and its idle threads spin on the workers' cores.
    added["OPENBLAS_NUM_THREADS"] = environment.get("OPENBLAS_NUM_THREADS", "1")
    platforms = environment.get("JAX_PLATFORMS")
    if not platforms and _has_module("libtpu") and not _has_tpu():
        # Else jax asks the cloud's metadata server for a TPU, and gives up only after its timeouts.
        platforms = "cuda,cpu" if _has_gpu() else "cpu"
        added["JAX_PLATFORMS"] = platforms
    if platforms and "tpu" not in platforms:
        added["TPU_SKIP_MDS_QUERY"] = environment.get("TPU_SKIP_MDS_QUERY", "1")
    if _has_module("gcsfs"):
        # Else epath reads gs:// through TensorFlow where that is installed, which brings it in and knows no emulator.
        added["EPATH_USE_TF"] = environment.get("EPATH_USE_TF", "false")
    # tensorstore's requests to object storage wait for ever by themselves; so many seconds without a byte are a failure.
    for name, value in (("TIME_SECONDS", "60"), ("LIMIT_BYTES", "1")):
        name = f"TENSORSTORE_CURL_LOW_SPEED_{name}"
        added[name] = environment.get(name, value)
    devices = virtual_devices(environment)
    if devices > 1:
        threads = max(
            int(environment.get("NPROC") or os.cpu_count() or 1), THREADS_PER_DEVICE * devices
        )
        added["NPROC"] = str(threads)
    return added


def cpu_environment(environment: Mapping[str, str], *, devices: int) -> dict[str, str]:
    """What to add to an environment for so many virtual CPU devices in one process."""
    others = [
        f for f in environment.get("XLA_FLAGS", "").split() if not f.startswith(_DEVICE_COUNT)
    ]
    added = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join([*others, f"{_DEVICE_COUNT}={devices}"]),
    }
    return added | platform_environment({**environment, **added})


def virtual_devices(environment: Mapping[str, str]) -> int:
    """The number of CPU devices that XLA_FLAGS asks for; 1 where it asks for none."""
    counts = re.findall(rf"{_DEVICE_COUNT}=(\d+)", environment.get("XLA_FLAGS", ""))
    return int(counts[-1]) if counts else 1


_DEVICE_COUNT = "--xla_force_host_platform_device_count"


def _integer(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name)
    if value is None:
        return None
    if not value.isdigit():
        raise ValueError(f"{name} is {value!r}: give a whole number")
    return int(value)


def _has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _has_tpu() -> bool:
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def _has_gpu() -> bool:
    has_plugin = any(_has_module(f"jax_cuda{version}_plugin") for version in (12, 13))
    return has_plugin and bool(glob.glob("/dev/nvidia[0-9]*"))
