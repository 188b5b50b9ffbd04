"""Clipped training of sharded models as torch makes them, against one process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from random_shards import same_everywhere
from ranks import in_ranks
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import fusedopt

STEPS, ROWS = 4, 8
MAX_NORM = 0.05


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    # An uneven number of rows, and a norm that tensor parallelism leaves whole.
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.LayerNorm(5), nn.Linear(5, 3)
    )


def _batch(step: int) -> Tensor:
    return torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(step))


def _sharded(model: nn.Sequential, how: str) -> tuple[DeviceMesh, DeviceMesh]:
    """Shard a model; return the mesh that batches are dealt out over, and the whole."""
    if how == "fsdp":
        mesh = data = init_device_mesh("cpu", (4,))
    else:
        names = ("replicate", "shard") if how == "hsdp" else ("data", "tensor")
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
        data = mesh if how == "hsdp" else mesh["data"]
    if how == "tensor":
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(model, mesh["tensor"], plan)
    for layer in model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=data)
    fully_shard(model, mesh=data)
    return data, mesh


def _train(rank: int, how: str, kind: str) -> None:
    whole = _model()
    model = copy.deepcopy(whole)
    data, _ = _sharded(model, how)
    options: dict[str, Any] = {"lr": 0.05} | ({"momentum": 0.9} if kind == "SGD" else {})
    clip = fusedopt.GlobalNorm(MAX_NORM)
    ours = getattr(fusedopt, kind)(model.parameters(), **options, clip=clip, backend="reference")
    theirs = getattr(torch.optim, kind)(whole.parameters(), **options)
    place = data.get_coordinate()
    assert place is not None
    index, count = place[0], data.size(0)
    if data.ndim == 2:
        index, count = index * data.size(1) + place[1], data.size()
    for step in range(STEPS):
        own = _batch(step).chunk(count)[index]
        model(own).square().mean().backward()
        whole(_batch(step)).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(whole.parameters(), MAX_NORM)
        ours.step()
        theirs.step()
        assert clip.last is not None and same_everywhere(clip.last)
        torch.testing.assert_close(clip.last, norm, rtol=1e-5, atol=0)
        for optimizer in (ours, theirs):
            optimizer.zero_grad()
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        full = p.full_tensor() if hasattr(p, "full_tensor") else p
        torch.testing.assert_close(full.detach(), q.detach(), rtol=1e-4, atol=1e-5)


def _all(rank: int) -> None:
    for how in ("fsdp", "hsdp", "tensor"):
        for kind in ("SGD", "AdamW"):
            _train(rank, how, kind)


def test_as_in_one_process(tmp_path: Path) -> None:
    """FSDP2, HSDP, and FSDP2 over tensor parallelism, where a norm layer is on fewer ranks."""
    in_ranks(4, tmp_path, _all)


def _scaled(rank: int) -> None:
    """torch's own scaler, and an overflow in the shard of one process at the second step."""
    model = _model()
    _sharded(model, "fsdp")
    clip = fusedopt.GlobalNorm(MAX_NORM)
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.05, clip=clip, backend="reference")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(3):
        scaler.scale(model(_batch(step).chunk(4)[rank]).square().mean()).backward()
        if step == 1 and rank == 2:
            next(model.parameters()).grad.to_local()[0, 0] = float("inf")
        before = [p.to_local().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        after = [p.to_local() for p in model.parameters()]
        changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True) if a.numel()]
        assert any(changed) is (step != 1)
        assert scaler.get_scale() == (8.0 if step == 0 else 4.0)
    counts = {state["step"].item() for state in optimizer.state.values()}
    assert counts == {2.0}
    scale = torch.tensor(scaler.get_scale())
    assert same_everywhere(scale) and distributed.get_world_size() == 4


def test_an_overflow_under_torchs_scaler(tmp_path: Path) -> None:
    in_ranks(4, tmp_path, _scaled)
