"""DTensor parameters (FSDP2): updated through the local tensor, with states that are DTensors."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from contract import (
    ADAM,
    ADAMW,
    DEVICE,
    SGD,
    Case,
    each_class,
    gradient_like,
    groups_of,
    new_params,
)
from marks import both_backends
from ranks import in_ranks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import Parameter

import fusedopt

pytestmark = [
    pytest.mark.skipif(DEVICE.type != "cpu", reason="one process group, on the CPU"),
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo"),
]

SHAPES = ((6, 5), (7,), (0, 3), (1030,))


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def _sharded(values: list[torch.Tensor], mesh: DeviceMesh, placement: Any) -> list[Parameter]:
    return [Parameter(distribute_tensor(v.detach().clone(), mesh, [placement])) for v in values]


def _set(params: list[Parameter], mesh: DeviceMesh, placement: Any, seed: int) -> None:
    for place, p in enumerate(params):
        full = gradient_like(torch.empty(p.shape), 1000 * seed + place)
        p.grad = distribute_tensor(full, mesh, [placement]) if isinstance(p, DTensor) else full


def _whole(value: Any) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _compare(ours: Any, theirs: Any) -> None:
    for p, q in zip(groups_of(ours), groups_of(theirs), strict=True):
        torch.testing.assert_close(_whole(p.detach()), q.detach(), rtol=3e-5, atol=3e-6)
        assert set(ours.state[p]) == set(theirs.state[q])
        for key, value in theirs.state[q].items():
            torch.testing.assert_close(_whole(ours.state[p][key]), value, rtol=3e-5, atol=3e-6)


def _run(case: Case, mesh: DeviceMesh, placement: Any, backend: str, steps: int = 4) -> Any:
    """Step DTensors with ours and the whole tensors with torch."""
    values = new_params(SHAPES)
    ours = case.ours(_sharded(values, mesh, placement), **case.options, backend=backend)
    theirs = case.theirs(new_params(SHAPES), **case.options, foreach=False)
    for seed in range(1, steps + 1):
        for optimizer in (ours, theirs):
            _set(groups_of(optimizer), mesh, placement, seed)
            optimizer.step()
    _compare(ours, theirs)
    return ours, theirs


@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=["sharded", "replicated"])
@both_backends
@each_class
def test_trajectory(case: Case, backend: str, placement: Any, mesh: DeviceMesh) -> None:
    ours, _ = _run(case, mesh, placement, backend)
    for p in groups_of(ours):
        assert isinstance(p, DTensor)
        for key, value in ours.state[p].items():
            assert isinstance(value, DTensor) == (key != "step"), key
            if key != "step":
                assert value.placements == p.placements
                assert value.device_mesh == p.device_mesh
                assert value.shape == p.shape and value.stride() == p.stride()


@both_backends
@each_class
def test_plain_and_distributed_parameters_in_one_group(
    case: Case, backend: str, mesh: DeviceMesh
) -> None:
    values = new_params(SHAPES)
    mixed = _sharded(values[:2], mesh, Shard(0)) + [Parameter(v.detach()) for v in values[2:]]
    ours = case.ours(mixed, **case.options, backend=backend)
    theirs = case.theirs(new_params(SHAPES), **case.options, foreach=False)
    for seed in range(1, 4):
        for optimizer in (ours, theirs):
            _set(groups_of(optimizer), mesh, Shard(0), seed)
            optimizer.step()
    _compare(ours, theirs)


@both_backends
def test_an_empty_shard_counts_its_steps(backend: str, mesh: DeviceMesh) -> None:
    """Otherwise its bias correction is stale after resharding."""
    ours, _ = _run(ADAMW, mesh, Shard(0), backend, steps=3)
    empty = groups_of(ours)[2]
    assert empty.to_local().numel() == 0
    assert ours.state[empty]["step"].item() == 3


@each_class
def test_checkpoint_and_copy_go_on(case: Case, mesh: DeviceMesh) -> None:
    ours, theirs = _run(case, mesh, Shard(0), "reference", steps=2)
    loaded = case.ours(
        _sharded([_whole(p.detach()) for p in groups_of(ours)], mesh, Shard(0)),
        backend="reference",
    )
    loaded.load_state_dict(copy.deepcopy(ours.state_dict()))
    for optimizer in (ours, loaded, theirs):
        _set(groups_of(optimizer), mesh, Shard(0), 9)
        optimizer.step()
    _compare(ours, theirs)
    _compare(loaded, theirs)


@both_backends
def test_local_tensors_that_moved(backend: str, mesh: DeviceMesh) -> None:
    """``to_local()`` makes a new object every time: neither its identity nor an old address."""
    ours, theirs = _run(ADAMW, mesh, Shard(0), backend, steps=2)
    for p, q in zip(groups_of(ours), groups_of(theirs), strict=True):
        # As FSDP2 does when it lays its shards out anew: p.data leaves a DTensor as it is.
        p._local_tensor = p._local_tensor * 0.5
        q.data = q.data * 0.5
    for seed in (5, 6):
        for optimizer in (ours, theirs):
            _set(groups_of(optimizer), mesh, Shard(0), seed)
            optimizer.step()
    _compare(ours, theirs)


@pytest.mark.parametrize("steps", [0, 2])
@both_backends
def test_a_gradient_placed_otherwise_is_brought_there(
    backend: str, steps: int, mesh: DeviceMesh
) -> None:
    """Its local tensor has the same shape here; in a larger world it would be read wrongly."""
    params = [_sharded(new_params([(6, 5)]), mesh, Shard(0))[0] for _ in range(2)]
    ours = [ADAM.ours([("weight", p)], backend=backend) for p in params]
    for seed in range(steps + 1):
        for p, optimizer in zip(params, ours, strict=True):
            _set([p], mesh, Shard(0), seed)
            if seed == steps and p is params[1]:
                p.grad = p.grad.redistribute(mesh, [Replicate()])
            optimizer.step()
    assert torch.equal(*(_whole(p.detach()) for p in params))


@pytest.mark.parametrize("steps", [0, 2])
@both_backends
def test_a_gradient_on_another_mesh_is_a_clear_error(
    backend: str, steps: int, mesh: DeviceMesh
) -> None:
    (p,) = _sharded(new_params([(6, 5)]), mesh, Shard(0))
    optimizer = ADAM.ours([("weight", p)], backend=backend)
    for seed in range(steps):
        _set([p], mesh, Shard(0), seed)
        optimizer.step()
    before = _whole(p.detach()).clone()
    square = init_device_mesh("cpu", (1, 1))
    p.grad = distribute_tensor(torch.ones(6, 5), square, [Replicate(), Replicate()])
    with pytest.raises(RuntimeError, match="weight.*redistribute"):
        optimizer.step()
    assert torch.equal(_whole(p.detach()), before)
    assert bool(optimizer.state) == bool(steps)


@both_backends
def test_shards_are_clipped(backend: str, mesh: DeviceMesh) -> None:
    (p,) = _sharded(new_params([(6, 5)]), mesh, Shard(0))
    clip = fusedopt.GlobalNorm(0.5)
    optimizer = SGD.ours([p], lr=0.1, clip=clip, backend=backend)
    p.grad = distribute_tensor(torch.ones(6, 5), mesh, [Shard(0)])
    before = _whole(p.detach()).clone()
    optimizer.step()
    expected = before - 0.1 * 0.5 / (30**0.5 + 1e-6)
    torch.testing.assert_close(_whole(p.detach()), expected)


@both_backends
def test_replicated_gradients_are_clipped(backend: str, mesh: DeviceMesh) -> None:
    (p,) = _sharded(new_params([(6, 5)]), mesh, Replicate())
    clip = fusedopt.GlobalNorm(0.5)
    optimizer = SGD.ours([p], lr=0.1, clip=clip, backend=backend)
    p.grad = distribute_tensor(torch.ones(6, 5), mesh, [Replicate()])
    before = _whole(p.detach()).clone()
    optimizer.step()
    torch.testing.assert_close(_whole(p.detach()), before - 0.1 * 0.5 / (30**0.5 + 1e-6))
    torch.testing.assert_close(clip.last, torch.tensor(30**0.5))


# Two processes


def _two_processes(rank: int) -> None:
    """Uneven shards, one of them empty, under two processes."""
    mesh = init_device_mesh("cpu", (2,))
    for case in (SGD, ADAMW):
        values = new_params(((5, 3), (1, 4)))
        ours = case.ours(_sharded(values, mesh, Shard(0)), **case.options, backend="reference")
        theirs = case.theirs(values, **case.options, foreach=False)
        for seed in range(1, 4):
            for optimizer in (ours, theirs):
                _set(groups_of(optimizer), mesh, Shard(0), seed)
                optimizer.step()
        _compare(ours, theirs)
        short = groups_of(ours)[1]
        assert short.to_local().numel() == (4 if rank == 0 else 0)
        if "step" in ours.state[short]:
            assert ours.state[short]["step"].item() == 3


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over a file")
def test_two_processes(tmp_path: Path) -> None:
    in_ranks(2, tmp_path, _two_processes)
