"""What a merge will take on a TPU, before it runs there: bytes by the plan, seconds at published rates, each a bound by itself.

No part is quicker than its bytes or operations at the rate that the vendor publishes; reading, computing and writing of different
pieces overlap, so the longest part bounds the whole. A rate that is not published is not made up: its line says so, and the way
from a host to its chips, of which no page tells, has no line.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from launch.chips import chip_of

if TYPE_CHECKING:  # these bring jax, which --help does without
    from merging.engine.plan import Plan
    from merging.partitioning import MeshShape

# Of one element of one expert in one pass: subtract the base, compare, select, add. Methods do more; a bound needs no more.
OPERATIONS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class On:
    """What a merge is priced for.

    Attributes:
      mesh: of a TPU; None: nothing is priced.
      storage_bytes_per_s: what the storage gives to all hosts together, a bucket by its quota; None: not known.
    """

    mesh: MeshShape | None = None
    storage_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        if self.mesh is not None and None in (self.mesh.topology, self.mesh.hosts):
            raise ValueError(
                "MESH is of no TPU: give one of gin_configs/meshes that names a topology and hosts"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Price:
    """Of the whole merge. Leaves are not cut between hosts, so one host has most to do, and the others wait for it.

    Attributes:
      hosts, chips: of all slices.
      read_bytes, written_bytes: by the busiest host, in all passes.
      share: of all bytes that are the busiest host's; 1 / hosts where they share evenly.
      storage_s: all bytes at the storage's rate. network_s: the busiest host's, in the direction that takes longer.
      memory_s: its inputs into its chips' memory and out of it once a pass, its outputs once.
      compute_s: OPERATIONS at the peak of its chips.
      host_bytes: buffers of one host. chip_bytes: what of these is on one chip.
    """

    hosts: int
    chips: int
    read_bytes: float
    written_bytes: float
    share: float
    storage_s: float | None
    network_s: float | None
    memory_s: float
    compute_s: float
    host_bytes: int
    chip_bytes: float

    @property
    def bounds(self) -> dict[str, float]:
        """Seconds of each part that is known, by what they are spent on."""
        parts = {
            "storage": self.storage_s,
            "network": self.network_s,
            "HBM": self.memory_s,
            "compute": self.compute_s,
        }
        return {name: seconds for name, seconds in parts.items() if seconds is not None}


def price(planned: Plan, on: On) -> Price:
    """The price of a plan. Raises ValueError for a chip that is not known."""
    mesh, chip = on.mesh, chip_of(on.mesh.topology)
    hosts, chips = mesh.hosts * mesh.slices, mesh.chips * mesh.slices
    beside = sum(spec.nbytes for spec in planned.beside.values())
    shares = []
    for names in planned.shares(hosts):
        read = planned.passes * planned.input_bytes_of(names)
        written = sum(planned.specs[name].nbytes for name in names) + beside / hosts
        shares.append((read, len(planned.merges) * written, names))
    read, written, names = max(shares, key=lambda share: share[0] + share[1])
    moved = planned.passes * planned.input_bytes + planned.output_bytes
    elements = sum(planned.base_specs[name].size for name in names)
    operations = OPERATIONS * elements * len(planned.experts) * len(planned.merges) * planned.passes
    its_chips = chips / hosts
    network_s = None
    if chip.network_bytes_per_s is not None:
        network_s = max(read, written) / (its_chips * chip.network_bytes_per_s)
    budget = planned.settings.memory_budget_bytes
    return Price(
        hosts=hosts,
        chips=chips,
        read_bytes=read,
        written_bytes=written,
        share=(read + written) / moved,
        storage_s=on.storage_bytes_per_s and moved / on.storage_bytes_per_s,
        network_s=network_s,
        memory_s=2 * (read + written) / (its_chips * chip.memory_bytes_per_s),
        compute_s=operations / (its_chips * chip.flops_per_s),
        host_bytes=budget,
        chip_bytes=budget / its_chips,
    )


def described(found: Price, on: On) -> str:
    """A fact a line, as a plan describes itself."""
    from merging.engine.plan import size_text

    def seconds(value: float | None, missing: str) -> str:
        return missing if value is None else f"{value:.3g} s"

    chip = chip_of(on.mesh.topology)
    bound = max(found.bounds, key=lambda name: found.bounds[name])
    return "\n".join(
        [
            f"on         {on.mesh.slices} x {on.mesh.topology}: {found.chips} chips, {found.hosts} hosts, by published rates, at least:",
            f"host       {size_text(found.read_bytes)} read, {size_text(found.written_bytes)} written by the busiest,"
            f" {found.share * found.hosts:.2f} times an even share",
            f"storage    {seconds(found.storage_s, 'not known: give STORAGE_BYTES_PER_S, what it gives to all hosts')}",
            f"network    {seconds(found.network_s, 'the rate of its hosts is not published')}",
            f"HBM        {seconds(found.memory_s, '')}, every byte in and out once a pass",
            f"compute    {seconds(found.compute_s, '')}, {OPERATIONS} operations an element",
            f"bound      {found.bounds[bound]:.3g} s, by {bound}",
            f"memory     {size_text(found.host_bytes)} of buffers a host, {size_text(found.chip_bytes)} of a chip's"
            f" {size_text(chip.memory_bytes)} at most",
        ]
    )
