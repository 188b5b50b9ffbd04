"""What one process has, does and waits for in a step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from fusedopt.kernels import multi_tensor, norms
from fusedopt.kernels.aot.norms import partial_norms
from fusedopt.kernels.aot.update import update_tensors
from fusedopt.kernels.launch_config import SIZES
from fusedopt.kernels.rules import REGISTRY

from . import measured
from .cluster import (
    NODE,
    SPEED,
    TOKENS,
    Cost,
    Group,
    all_reduce,
    reduce_scatter,
    tree_all_reduce,
)
from .models import Model

# Bytes of a float32: parameter, gradient and states as they are kept, and squares.
FLOAT = 4
# Launches of ``step/norm.py`` that are there for several processes alone: the sum of this one's
# partial norms, and where some hold the same, their weights. The collective's has its own latency.
SUM, WEIGHTS = 1, 1
# Bytes an element of a unit while it is whole: its parameters in bfloat16, and the next unit's; its
# gradient in bfloat16, and the float32 copy that is reduced.
UNSHARDED = 2 + 2 + 2 + 4


@cache
def kernel_bytes(rule: str, dtype: str = "fp32") -> tuple[float, float]:
    """Return what update and norm move, an element: the budgets that ``make codegen`` holds."""
    own = REGISTRY[rule]
    states = own.states(own.example_groups[0])
    inputs = [dtype if degree == 1 else "fp32" for degree in own.degrees]
    options = (False,) * len(own.option_names)
    update = update_tensors(own, options, (dtype, *inputs, *[dtype] * len(states)))
    norm = partial_norms(dtype, infinity_norm=False)
    assert update.budget.bytes_per_element and norm.budget.bytes_per_element
    return update.budget.bytes_per_element, norm.budget.bytes_per_element


def kept_bytes(rule: str, dtype: str = "fp32") -> int:
    """Return what is kept, an element: parameter, gradient and states, and squares in float32."""
    own = REGISTRY[rule]
    squares = sum(degree > 1 for degree in own.degrees)
    others = 1 + len(own.degrees) - squares + len(own.states(own.example_groups[0]))
    return SIZES[dtype] * others + FLOAT * squares


def table_bytes(elements: int, tensors: int) -> float:
    """Return at most what finds an AdamW's tensors and joins their norms takes.

    A column of int64 a tensor; two int32 a chunk of the update, and as many and a float64 a chunk
    of the norm. Every tensor may end in a chunk of its own.
    """
    rows = multi_tensor.HEADER_ROWS + kept_bytes("Adam") // FLOAT
    updates = elements / multi_tensor.BLOCK + tensors
    partials = elements / norms.NORM_BLOCK + tensors
    return 8 * rows * tensors + 8 * updates + (8 + 8) * partials


@dataclass(frozen=True)
class Layout:
    """How many GPUs there are, and over how many of them a parameter is cut."""

    gpus: int
    shards: int

    @property
    def name(self) -> str:
        """What PyTorch calls it."""
        return "FSDP2" if self.shards == self.gpus else f"HSDP, {self.shards}"

    @property
    def world(self) -> Group:
        """All processes: the norm's."""
        return _group(self.gpus)

    @property
    def shard(self) -> Group:
        """Those that share a parameter, neighbours."""
        return _group(self.shards)

    @property
    def replicas(self) -> Group:
        """Those that hold the same of it, one of each shard group."""
        near = max(int(NODE.value) // self.shards, 1)
        return Group(self.gpus // self.shards, min(near, self.gpus // self.shards))


def _group(ranks: int) -> Group:
    return Group(ranks, min(ranks, int(NODE.value)))


@dataclass(frozen=True)
class Step:
    """A float32 AdamW step with clipping, in the process that has the most to do."""

    model: Model
    layout: Layout

    @property
    def elements(self) -> int:
        """Parameters of this process."""
        return self.model.largest_shard(self.layout.shards)

    @property
    def moved(self) -> float:
        """Bytes that update and norm read and write."""
        return self.elements * sum(kernel_bytes("Adam"))

    @property
    def passes(self) -> float:
        """Seconds in which the memory moves them."""
        return self.moved / _device().bandwidth

    @property
    def launches(self) -> int:
        """Kernels, the collective's left out."""
        shared = self.layout.shards < self.layout.gpus
        return _device().launches + SUM + WEIGHTS * shared

    @property
    def launching(self) -> float:
        """Seconds of the launches by themselves."""
        return self.launches * _device().launch

    @property
    def host(self) -> float:
        """Seconds of the host, in which the GPU may still be busy with the backward pass."""
        return measured.host_seconds(measured.read(measured.HOST), len(self.model.shapes))

    @property
    def norm(self) -> float:
        """Seconds of the norm's all-reduce."""
        return tree_all_reduce(self.layout.world)

    @property
    def seconds(self) -> float:
        """The step: whatever takes longer, the device or the host."""
        return max(self.passes + self.launching + self.norm, self.host)

    @property
    def training(self) -> float:
        """Seconds of arithmetic of a training step: six operations a parameter and token."""
        return 6 * self.model.parameters * TOKENS.value / (1e12 * SPEED.value)

    def resident(self, squares: bool) -> float:
        """Return the bytes that stay: float32 parameter, gradient, states, and squares or not."""
        kept = kept_bytes("BatchDecoupledAdam" if squares else "Adam")
        return self.elements * kept + self.tables

    @property
    def tables(self) -> float:
        """Bytes of what finds the tensors."""
        return table_bytes(self.elements, len(self.model.shapes))

    def peak(self, squares: bool) -> float:
        """Return the bytes while the largest unit is whole; activations are not counted."""
        return self.resident(squares) + max(self.model.units) * (UNSHARDED + FLOAT * squares)

    def squares(self, pieces: Iterable[int]) -> Cost:
        """Return what it takes to add up float32 squares that are reduced in pieces.

        Args:
            pieces: elements of each.
        """
        total = Cost()
        for size in pieces:
            total += reduce_scatter(self.layout.shard, FLOAT * size)
            total += all_reduce(self.layout.replicas, FLOAT * size / self.layout.shards)
        return total


def _device() -> measured.Device:
    return measured.device(measured.read(measured.GPU))
