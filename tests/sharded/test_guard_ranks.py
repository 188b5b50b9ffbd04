"""A guard over several processes: one collective, and the same decision to the bit on all."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import in_ranks
from spikes import Spikes, norm_of, spiky
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import fusedopt
from fusedopt import GlobalNorm, SpikeGuard

SHAPES = [(6, 2), (5,)]
SETTING = (2.5, 8, 3)


def _same_everywhere(x: Tensor) -> bool:
    found = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(found, x)
    # Of all bits: nan is equal to nan.
    return all(torch.equal(x.view(torch.uint8), other.view(torch.uint8)) for other in found)


def _record(guard: SpikeGuard) -> Tensor:
    return guard.record_on(torch.device("cpu")).clone()


def _local(x: Any) -> Tensor:
    return (x.to_local() if hasattr(x, "to_local") else x).detach().clone()


def _sharded(backend: str, live: bool) -> None:
    """Cut parameters and one that is whole; a step that has no gradient on one process."""
    mesh = init_device_mesh("cpu", (2,))
    placed = [[Shard(0)], [Replicate()]]
    params = [
        torch.nn.Parameter(distribute_tensor(torch.ones(shape), mesh, p))
        for shape, p in zip(SHAPES, placed, strict=True)
    ]
    guard = SpikeGuard(*SETTING)
    ours = fusedopt.AdamW(params, lr=0.1, guard=guard, backend=backend, capturable=live)
    oracle = Spikes(*SETTING)
    for number, gradients in enumerate(spiky(SHAPES, 24)):
        for p, gradient, own in zip(params, gradients, placed, strict=True):
            p.grad = distribute_tensor(gradient, mesh, own)
        before = [_local(p) for p in params]
        taken = oracle.takes(norm_of(gradients))
        ours.step()
        moved = not all(map(torch.equal, before, map(_local, params)))
        assert moved == taken, number
        assert guard.skipped == oracle.skipped and _same_everywhere(_record(guard)), number
    assert oracle.skipped > 4


def _apart(rank: int, backend: str) -> None:
    """Plain parameters, other ones on each process: a spike, or no gradient, on one."""
    p = torch.nn.Parameter(torch.ones(4))
    clip = GlobalNorm(math.inf, group=dist.group.WORLD)
    guard = SpikeGuard(*SETTING)
    ours = fusedopt.AdamW([p], lr=0.1, guard=guard, clip=clip, backend=backend)
    oracle = Spikes(*SETTING)
    for number, scale in enumerate((1.0, 1.1, 0.9, 1.2, 1.0, 80.0, 1.0, math.nan, 1.3, 60.0)):
        both = [torch.ones(4), torch.full((4,), scale)]
        # The other one has nothing to update, and still has to note the norm.
        without = number in (3, 4, 8, 9)
        if without:
            both[0] = torch.zeros(0)
        p.grad = None if without and rank == 0 else both[rank].clone()
        before = p.detach().clone()
        taken = oracle.takes(norm_of(both))
        ours.step()
        assert torch.equal(before, p) == (not taken or p.grad is None), number
        assert guard.skipped == oracle.skipped and _same_everywhere(_record(guard)), number
    assert oracle.skipped == 3


def _overflowing(rank: int) -> None:
    """An overflow on one process, whose flag the other does not have, is counted on neither."""
    p = torch.nn.Parameter(torch.ones(4))
    clip = GlobalNorm(1.0, group=dist.group.WORLD)
    ours = fusedopt.AdamW([p], lr=0.1, guard=SpikeGuard(*SETTING), clip=clip, backend="reference")
    for flags in ((0.0, 0.0), (0.0, 1.0), (0.0, 0.0)):
        p.grad = torch.ones(4)
        if flags[rank]:
            p.grad[0] = math.inf
        ours.grad_scale, ours.found_inf = torch.tensor(2.0), torch.tensor(flags[rank])
        before = p.detach().clone()
        ours.step()
        assert torch.equal(before, p) == any(flags)
        assert ours.guard.skipped == 0 and _same_everywhere(_record(ours.guard))
    assert ours.guard.state()["accepted"] == 2


def _all(rank: int) -> None:
    _sharded("reference", False)
    _sharded("triton", True)
    for backend in ("reference", "triton"):
        _apart(rank, backend)
    _overflowing(rank)


def test_two_processes_decide_alike(tmp_path: Path) -> None:
    """Catches a norm of one's own, a window that one process does not keep, and a flag of one."""
    in_ranks(2, tmp_path, _all)
