"""TPU chips as their vendor publishes them, and what their peaks make of a compiled program: a roofline.

A roofline is a bound, not a forecast: no step is quicker than its products at the peak rate, its bytes at the peak
bandwidth of the main memory, or its collectives at that of all links together; and here the three overlap without loss.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from merging.engine.compiled import Figures

GB = 10**9
GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Published peaks of one chip.

    Attributes:
      flops_per_s: bfloat16 products and sums.
      memory_bytes: main memory. Programs have less: the runtime keeps some.
      memory_bytes_per_s: bandwidth of the main memory.
      link_bytes_per_s: out of the chip over all of its links; the vendor's figure for both directions, halved.
      source: page of cloud.google.com, read in November 2026.
      network_bytes_per_s: of the data centre's network, its share of a pod's; None: not on the page.
    """

    flops_per_s: float
    memory_bytes: int
    memory_bytes_per_s: float
    link_bytes_per_s: float
    source: str
    network_bytes_per_s: float | None = None


# By the generation in a topology's name. v4's page has no link bandwidth: six links of 50 GB/s each way (arXiv 2304.01433,
# table 4).
CHIPS = {
    "v4": Chip(
        flops_per_s=275e12,
        memory_bytes=32 * GIB,
        memory_bytes_per_s=1200 * GB,
        link_bytes_per_s=300 * GB,
        source="tpu/docs/v4",
    ),
    "v5e": Chip(
        flops_per_s=197e12,
        memory_bytes=16 * GIB,
        memory_bytes_per_s=819 * GB,
        link_bytes_per_s=200 * GB,
        source="tpu/docs/v5e",
        network_bytes_per_s=6.4e12 / 8 / 256,
    ),
    "v5p": Chip(
        flops_per_s=459e12,
        memory_bytes=95 * GIB,
        memory_bytes_per_s=2765 * GB,
        link_bytes_per_s=600 * GB,
        source="tpu/docs/v5p",
    ),
    "v6e": Chip(
        flops_per_s=918e12,
        memory_bytes=32 * GIB,
        memory_bytes_per_s=1638 * GB,
        link_bytes_per_s=400 * GB,
        source="tpu/docs/v6e",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """Least seconds of one call, by what they are spent on."""

    products_s: float
    memory_s: float
    links_s: float

    @property
    def seconds(self) -> float:
        """The longest of them."""
        return max(self.products_s, self.memory_s, self.links_s)

    @property
    def bound(self) -> str:
        """What that is."""
        times = {"products": self.products_s, "memory": self.memory_s, "links": self.links_s}
        return max(times, key=lambda name: times[name])


def chip_of(topology: str) -> Chip:
    """The chip of a topology, `v5p:4x4x4`."""
    generation = topology.partition(":")[0]
    if generation not in CHIPS:
        raise ValueError(
            f"topology {topology!r}: no chip {generation!r} in launch/chips.py; known are {', '.join(CHIPS)}"
        )
    return CHIPS[generation]


def roofline(found: Figures, chip: Chip) -> Roofline:
    """Of one program on one chip. Collectives over the data centre's network count as if they went over links."""
    sent = sum(each.sent_bytes for each in found.collectives.values())
    return Roofline(
        products_s=found.flops / chip.flops_per_s,
        memory_s=found.bytes_touched / chip.memory_bytes_per_s,
        links_s=sent / chip.link_bytes_per_s,
    )
