"""What PerSampleSquares adds to the memory of a backward pass under FSDP2.

In one process: the group is torch's fake one, which communicates nothing and allocates as any other
does, so that the figures are the same at every run. ``pytest -s`` prints them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from per_sample import DEVICE
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from fusedopt import PerSampleSquares

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="reads the CPU's allocations")
LAYERS, WIDTH = 32, 64


@pytest.fixture(params=[2, 4, 8])
def world(request: pytest.FixtureRequest) -> Iterator[int]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    dist.destroy_process_group()


def allocated(run: Callable[[], None]) -> tuple[int, int]:
    """Bytes that are in use at most, and in the end, more than in the beginning."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = found.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most, now


def model_of(layers: int, world: int) -> nn.Module:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    mesh = init_device_mesh("cpu", (world,))
    for layer in model:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    return fully_shard(model, mesh=mesh)


def test_squares_cost_four_bytes_a_local_parameter_and_a_layer_for_a_moment(world):
    """Catches whole squares that outlive their gradient, or are kept beside their shards."""
    found = []
    for observed in (False, True):
        model = model_of(LAYERS, world)
        model.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
        if observed:
            statistics = PerSampleSquares(model, backend="reference")
        x = torch.randn(4, WIDTH)

        def backward(model: nn.Module = model, x: torch.Tensor = x) -> None:
            model(x).square().mean().backward()

        for _ in range(2):
            # What is made once is there.
            backward()
            model.zero_grad()
        found.append(allocated(backward))
    local = sum(p.to_local().numel() for p in model.parameters())  # type: ignore[attr-defined]
    layer = sum(p.numel() for p in model[0].parameters())  # type: ignore[index]
    most, kept = (observed - plain for plain, observed in zip(*found, strict=True))
    print(
        f"\n{world} processes, {LAYERS} layers: {kept / local:.2f} bytes a local parameter, at the"
        f" peak {most / local:.2f}; a layer is {4 * layer / local:.2f}"
    )
    assert all(statistics.sum_of_squares(p) is not None for p in model.parameters())
    # The numbers of samples, norms and Python's own are less than a tenth of a byte.
    assert kept <= 4.2 * local
    assert most <= 4.2 * local + 4 * layer
