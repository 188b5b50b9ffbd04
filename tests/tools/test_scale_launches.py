"""What the norm runs more where there are several processes, as docs/scale.md counts it."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode

import fusedopt

# bench and tools are not installed. Last, so that they hide nothing that is.
sys.path.append(str(Path(__file__).resolve().parents[2]))

costs = importlib.import_module("tools.scale.costs")
COLLECTIVES = {"allreduce_"}


@pytest.fixture
def four_processes() -> Iterator[None]:
    """Be the first of four, whose collectives do nothing: none can hang."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    distributed.destroy_process_group()


class Operations(TorchDispatchMode):
    """Counts operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.found[function._overloadpacket.__name__] += not function.is_view
        return function(*args, **(kwargs or {}))


def operations(mesh: Any, placements: list[Any]) -> Counter[str]:
    """Count what a step with clipping runs, its kernels left out, after it has settled."""

    def place(local: torch.Tensor) -> torch.Tensor:
        if mesh is None:
            return local
        return DTensor.from_local(local, mesh, placements, run_check=False)

    params = [nn.Parameter(place(torch.zeros(3))) for _ in range(4)]
    for p in params:
        p.grad = place(torch.ones(3))
    optimizer = fusedopt.AdamW(params, clip=fusedopt.GlobalNorm(1.0), backend="triton")
    for _ in range(2):
        optimizer.step()
    # Kernels in the interpreter are operations, too, the same on any mesh.
    with Operations() as counted:
        optimizer.step()
    return counted.found


def test_launches_of_the_norm_over_processes(four_processes: None) -> None:
    # Catches a launch a tensor or mesh, another collective, and replicas without their weights.
    alone = operations(None, [])
    line = operations(init_device_mesh("cpu", (4,)), [Shard(0)]) - alone
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    shared = operations(square, [Replicate(), Shard(0)]) - alone
    for found, launches in ((line, costs.SUM), (shared, costs.SUM + costs.WEIGHTS)):
        collectives = {name: found.pop(name) for name in COLLECTIVES & set(found)}
        assert collectives == {"allreduce_": 1}
        assert sum(found.values()) == launches, found
    model = importlib.import_module("tools.scale.models").MODELS[0]
    counts = [costs.Step(model, costs.Layout(64, shards)).launches for shards in (64, 8)]
    assert counts == [5 + costs.SUM, 5 + costs.SUM + costs.WEIGHTS]
