"""TPU topologies that are not there: their devices as the TPU's compiler describes them, on any machine that has libtpu."""

from __future__ import annotations

import importlib.metadata
import math
import os
from collections.abc import Sequence
from typing import Any

# Without the first, libtpu waits for the cloud's metadata server; the next two keep it from complaining about that; and
# without the last, two processes that compile at the same time fail over the lock of a device that neither uses.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def described_devices(topology: str, *, slices: int = 1) -> Sequence[Any]:
    """The chips of some slices of a topology, `v5e:16x16`, one device each.

    Raises ValueError where the compiler is absent or does not know the topology.
    """
    os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
    import jax
    from jax.experimental import topologies

    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            "libtpu is not installed, and it has the TPU's compiler: pip install 'merging-at-scale[tpu]'"
        ) from None
    jax.config.update("jax_platforms", "cpu")  # the compiler is asked for by name; no device is
    # What is compiled without a device can be written to a cache and not be read from it: a warning each time.
    jax.config.update("jax_enable_compilation_cache", False)
    options: dict[str, Any] = {} if slices == 1 else {"num_slices": slices}
    if topology.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # one device a chip, as on a pod, not one a core
    try:
        chips = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
        dims = [int(size) for size in topology.split(":")[1].split("x")]
        if math.prod(dims) * slices != len(chips.devices):
            raise ValueError(f"it has {len(chips.devices)} devices, which is not one a chip")
    except (jax.errors.JaxRuntimeError, ValueError, IndexError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(
            f"topology {topology} can't be compiled for ({said}): give a generation and its chips, as in"
            " v5e:16x16, v5p:4x4x4 or v6e:16x16"
        ) from error
    return chips.devices
