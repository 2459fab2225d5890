"""What tpu_vm and gke are told of a pod, from one gin file (gin_configs/runs/pod.gin lists the macros), and their command line.

python -m launch.pod.tpu_vm VERB --gin_file=my_pod.gin [--dry_run] -- COMMAND...
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from absl import app

from launch import gin_config

if TYPE_CHECKING:  # the library brings jax, which --help does without
    from merging.partitioning import MeshShape

CAPACITIES = ("on-demand", "spot", "reserved")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """How Google Cloud names one generation of TPUs.

    Attributes:
      vm: the first part of an accelerator type, `v5litepod-256`.
      counts_per_chip: what the second part counts: cores (2 a chip) or chips.
      runtime_version: image of TPU VMs.
      gke: value of the node label cloud.google.com/gke-tpu-accelerator.
      source: pages of cloud.google.com, read in November 2026.
    """

    vm: str
    counts_per_chip: int
    runtime_version: str
    gke: str
    source: str = "tpu/docs/runtimes, kubernetes-engine/docs/concepts/plan-tpus"


# By the generation in a topology's name.
GENERATIONS = {
    "v4": Generation(
        vm="v4", counts_per_chip=2, runtime_version="tpu-ubuntu2204-base", gke="tpu-v4-podslice"
    ),
    "v5e": Generation(
        vm="v5litepod",
        counts_per_chip=1,
        runtime_version="v2-alpha-tpuv5-lite",
        gke="tpu-v5-lite-podslice",
    ),
    "v5p": Generation(
        vm="v5p", counts_per_chip=2, runtime_version="v2-alpha-tpuv5", gke="tpu-v5p-slice"
    ),
    "v6e": Generation(
        vm="v6e", counts_per_chip=1, runtime_version="v2-alpha-tpuv6e", gke="tpu-v6e-slice"
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pod:
    """Slices of TPUs and what runs on them; gin_configs/runs/pod.gin says what each setting means."""

    name: str
    project: str
    zone: str
    image: str
    bucket: str
    mesh: MeshShape
    capacity: str = "on-demand"
    service_account: str | None = None
    max_restarts: int = 3
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    runtime_version: str | None = None
    cluster: str | None = None
    cluster_location: str | None = None
    namespace: str = "default"
    queue: str | None = None
    reservation: str | None = None

    def __post_init__(self) -> None:
        wrong = []
        # Hosts are named after it, and the name of a host may have 63 characters.
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", self.name):
            wrong.append(
                f"NAME is {self.name!r}: at most 40 lower-case letters, digits and hyphens, a letter first"
            )
        if self.capacity not in CAPACITIES:
            wrong.append(f"CAPACITY is {self.capacity!r}: give one of {', '.join(CAPACITIES)}")
        if not re.fullmatch(r"gs://[^/]+(/.+)?", self.bucket):
            wrong.append(f"BUCKET is {self.bucket!r}: give gs://NAME or gs://NAME/FOLDER")
        if self.mesh.topology is None or self.mesh.hosts is None:
            wrong.append("MESH has no topology or hosts: give one of a TPU (gin_configs/meshes)")
        elif self._generation_name not in GENERATIONS:
            wrong.append(
                f"MESH is of {self.mesh.topology}, and no chip {self._generation_name!r} is in"
                f" launch/pod/settings.py; known are {', '.join(GENERATIONS)}"
            )
        if wrong:
            raise ValueError("\n".join(wrong))

    @property
    def generation(self) -> Generation:
        """How the TPUs are named."""
        return GENERATIONS[self._generation_name]

    @property
    def topology(self) -> str:
        """Of one slice, `16x16`."""
        return self.mesh.topology.partition(":")[2]

    @property
    def accelerator_type(self) -> str:
        """Of one slice, `v5litepod-256`."""
        return f"{self.generation.vm}-{self.mesh.chips * self.generation.counts_per_chip}"

    @property
    def hosts(self) -> int:
        """Machines of all slices."""
        return self.mesh.hosts * self.mesh.slices

    @property
    def chips_per_host(self) -> int:
        """TPU chips of one machine."""
        return self.mesh.chips // self.mesh.hosts

    @property
    def variables(self) -> dict[str, str]:
        """The environment of every process."""
        return {
            # A pod's hosts compile the same programs, again after each restart.
            "JAX_COMPILATION_CACHE_DIR": f"{self.bucket.rstrip('/')}/compiled",
            "PYTHONUNBUFFERED": "1",  # else a process that is killed takes its last lines with it
            **self.environment,
        }

    @property
    def _generation_name(self) -> str:
        return self.mesh.topology.partition(":")[0]


def configured(
    files: Sequence[str], bindings: Sequence[str], *, search_paths: Sequence[str] = (".",)
) -> Pod:
    """What gin files and bindings say about a pod."""
    from merging.partitioning import MeshShape

    gin_config.register(Pod, name="pod")
    gin_config.register_values(MeshShape)
    gin_config.parse(files, bindings, search_paths=search_paths)
    return Pod(**gin_config.resolve(Pod, name="pod").arguments)


def run(main: Callable[[str, Pod, list[str]], None], *, verbs: Sequence[str]) -> None:
    """Parses the command line and calls `main` with the verb, the pod and the command behind `--`.

    What the user got wrong, and what an outside program failed at, is one message and exit code 1.
    """
    argv = sys.argv
    at = argv.index("--") if "--" in argv else len(argv)
    command = argv[at + 1 :]  # as it is: its flags are those of another program

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            return app.parse_flags_with_usage(gin_config.rewrite_arguments(argv))
        except ValueError as error:
            sys.exit(str(error))

    def called(argv: Sequence[str]) -> None:
        if len(argv) != 2 or argv[1] not in verbs:
            raise app.UsageError(f"give one of {', '.join(verbs)}; found {' '.join(argv[1:])!r}")
        if not gin_config.GIN_FILE.value:
            raise app.UsageError(
                "give --gin_file=FILE; gin_configs/runs/pod.gin says what stands in it"
            )
        try:
            pod = configured(
                gin_config.GIN_FILE.value,
                gin_config.GIN_BINDINGS.value,
                search_paths=gin_config.GIN_SEARCH_PATHS.value,
            )
            main(argv[1], pod, command)
        except (ValueError, OSError) as error:
            print(f"Error: {error}", file=sys.stderr)
            sys.exit(1)

    app.run(called, argv=argv[:at], flags_parser=parse)
