"""How GPUs are connected, and what a collective takes: a latency, and bytes over a bandwidth.

The form is that of NCCL's own model, by which it chooses between its algorithms
(``ncclTopoTuneModel``): alpha times the number of hops, and a bus bandwidth. Nothing here has been
measured by this project.
"""

from __future__ import annotations

from dataclasses import dataclass

_NCCL = "NCCL, src/graph/tuning.cc"


@dataclass(frozen=True)
class Assumption:
    """A number that this project has not measured.

    Attributes:
        what: it is.
        value: in the unit.
        unit: as the page writes it.
        source: whose number it is.
    """

    what: str
    value: float
    unit: str
    source: str


NODE = Assumption("GPUs in a node", 8, "", "DGX H200 data sheet")
NVLINK = Assumption("NVLink, one way, a GPU", 450, "GB/s", "H200 data sheet: 900 GB/s both ways")
NIC = Assumption("network, one way, a GPU", 50, "GB/s", "DGX H200 data sheet: 400 Gb/s a GPU")
TREE_BASE = Assumption("tree, to begin", 6.8, "µs", f"{_NCCL}, baseLat, LL")
TREE_NEAR = Assumption("tree, a hop within a node", 0.6, "µs", f"{_NCCL}, hwLat, NVLink, LL")
TREE_FAR = Assumption("tree, a hop between nodes", 5.0, "µs", f"{_NCCL}, hwLat, network, LL")
RING_BASE = Assumption("ring, to begin", 8.4, "µs", f"{_NCCL}, baseLat, Simple")
RING_NEAR = Assumption("ring, a hop within a node", 3.4, "µs", f"{_NCCL}, hwLat, NVLink, Simple")
RING_FAR = Assumption("ring, a hop between nodes", 14.0, "µs", f"{_NCCL}, hwLat, network, Simple")
TOKENS = Assumption(
    "tokens a GPU and training step", 8192, "", "one sequence of arXiv 2407.21783, section 3.4.1"
)
SPEED = Assumption(
    "arithmetic of the training step", 400, "TFLOP/s a GPU", "arXiv 2407.21783, table 4"
)
ASSUMPTIONS = (
    NODE, NVLINK, NIC, TREE_BASE, TREE_NEAR, TREE_FAR, RING_BASE, RING_NEAR, RING_FAR, TOKENS,
    SPEED,
)  # fmt: skip
MICRO, GIGA = 1e-6, 1e9


@dataclass(frozen=True)
class Group:
    """Processes of a collective.

    Attributes:
        ranks: how many.
        near: how many of them share a node.
    """

    ranks: int
    near: int

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return self.ranks // self.near

    @property
    def bandwidth(self) -> float:
        """Bytes a second through a node: every member's network card carries a ring of its own."""
        alone = self.nodes == 1
        network = self.near * NIC.value
        return GIGA * (NVLINK.value if alone else min(NVLINK.value, network))


@dataclass(frozen=True)
class Cost:
    """Seconds of a collective: of its hops, and of its bytes; and the bytes that a rank sends."""

    latency: float = 0.0
    transfer: float = 0.0
    sent: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        """Add one collective behind another."""
        return Cost(
            self.latency + other.latency, self.transfer + other.transfer, self.sent + other.sent
        )

    @property
    def seconds(self) -> float:
        """The whole of it."""
        return self.latency + self.transfer


def tree_all_reduce(group: Group) -> float:
    """Return the seconds of an all-reduce of a few bytes: up a tree of the nodes, and down."""
    levels = (group.nodes - 1).bit_length()
    near = (group.near - 1) * TREE_NEAR.value
    return MICRO * (TREE_BASE.value + 2 * (near + levels * TREE_FAR.value))


def reduce_scatter(group: Group, size: float) -> Cost:
    """Return what a reduce-scatter of ``size`` bytes on every rank takes."""
    return _ring(group, size, 1)


def all_reduce(group: Group, size: float) -> Cost:
    """Return what an all-reduce of ``size`` bytes takes: a reduce-scatter and an all-gather."""
    return _ring(group, size, 2)


def _ring(group: Group, size: float, rounds: int) -> Cost:
    if group.ranks == 1:
        return Cost()
    far = rounds * (group.nodes - 1)
    near = rounds * (group.ranks - 1) - far
    hops = near * RING_NEAR.value + far * RING_FAR.value
    sent = rounds * size * (group.ranks - 1) / group.ranks
    return Cost(MICRO * (RING_BASE.value + hops), sent / group.bandwidth, sent)
