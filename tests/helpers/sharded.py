"""A small model cut over processes in every way that is used, and its training on one stream.

All layouts see the same gradients, so that a run may change from one to another in the middle and
go on as one process would. With ``data`` they come of global batches, to rounding; else each is
given to the parameters element by element, which no layout changes by a bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.parallel.style import ParallelStyle

import fusedopt

# Divided by every number of ranks and of micro-batches.
ROWS = 16


class Small(nn.Module):
    """Rows that 2 and 4 ranks cut unevenly, down to none: 8 and 5 of them, 3 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.up = nn.Linear(5, 8)
        self.down = nn.Linear(8, 3)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.tanh(self.up(torch.tanh(self.first(x)))))
        return out * self.gain


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def build(layout: str, seed: int = 0) -> nn.Module:
    """Return the model, cut over all processes of the group."""
    torch.manual_seed(seed)
    model = Small()
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    # Cut the places of all elements first: what a process then holds says which are its own.
    for p in model.parameters():
        p.data.copy_(torch.arange(p.numel()).reshape(p.shape))
    _cut(model, layout)
    for name, p in model.named_parameters():
        own = _own(p)
        p.places = own.detach().long()  # type: ignore[attr-defined]
        own.detach().copy_(values[name].flatten()[p.places])  # type: ignore[attr-defined]
    return model


def _cut(model: Small, layout: str) -> None:
    if layout == "plain":
        return
    if layout == "fsdp+tp":
        mesh = init_device_mesh("cpu", (world() // 2, 2), mesh_dim_names=("dp", "tp"))
        _cut_tensors(model, mesh["tp"])
        _cut_rows(model, mesh["dp"])
    elif layout == "tp":
        _cut_tensors(model, init_device_mesh("cpu", (world(),)))
    elif layout == "hsdp":
        names = ("replicate", "shard")
        _cut_rows(model, init_device_mesh("cpu", (2, world() // 2), mesh_dim_names=names))
    else:
        _cut_rows(model, init_device_mesh("cpu", (world(),)))


def _own(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _cut_tensors(model: Small, mesh: DeviceMesh) -> None:
    plan: dict[str, ParallelStyle] = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, mesh, plan)


def _cut_rows(model: Small, mesh: DeviceMesh) -> None:
    for module in (model.first, model.up, model.down, model):
        fully_shard(module, mesh=mesh)


def batches(step: int, layout: str, micro: int) -> list[tuple[Tensor, Tensor]]:
    """Return this process' rows of a step's micro-batches."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(ROWS, 6, generator=generator)
    y = torch.randn(ROWS, 3, generator=generator)
    parts, own = 1, 0
    if layout not in ("plain", "tp"):
        # Tensor parallel ranks see the same rows.
        alike = 2 if layout == "fsdp+tp" else 1
        parts, own = world() // alike, dist.get_rank() // alike
    cut = [[part.chunk(parts)[own] for part in whole.chunk(micro)] for whole in (x, y)]
    return list(zip(*cut, strict=True))


def backward(model: nn.Module, step: int, layout: str, micro: int = 1) -> Iterator[None]:
    """Make the gradients of a step from data, in so many micro-batches."""
    for x, y in batches(step, layout, micro):
        ((model(x) - y).square().mean() / micro).backward()
        yield


def give(model: nn.Module, step: int, micro: int = 1) -> Iterator[None]:
    """Give every parameter its gradients of a step: noise, and a tenth of the parameter."""
    for part in range(micro):
        generator = torch.Generator().manual_seed(1000 + 10 * step + part)
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator).flatten()[p.places]  # type: ignore
            gradient = like(p, noise + 0.1 * _own(p.detach()))
            if p.grad is None or not isinstance(p, DTensor):
                p.grad = gradient if p.grad is None else p.grad + gradient
            else:
                # As FSDP does.
                p.grad += gradient
        yield


def like(p: Tensor, own: Tensor) -> Tensor:
    """Return a tensor placed as a parameter is, of what this process has of it."""
    if not isinstance(p, DTensor):
        return own
    return DTensor.from_local(
        own, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


def train(
    model: nn.Module, optimizer: Any, steps: Iterable[int], layout: str, data: bool = False
) -> None:
    """Take steps, each named by its number, which decides its gradients."""
    statistics = getattr(optimizer, "statistics", None)
    gathers = isinstance(statistics, fusedopt.MicroBatchSquares)
    micro = 2 if gathers else 1
    for step in steps:
        for _ in backward(model, step, layout, micro) if data else give(model, step, micro):
            if gathers:
                statistics.accumulate(optimizer)
        optimizer.step()
        optimizer.zero_grad()


def local(value: Any) -> Any:
    """Replace tensors by copies of what this process has of them."""
    if isinstance(value, DTensor):
        value = value.to_local()
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: local(x) for key, x in value.items()}
    return [local(x) for x in value] if isinstance(value, (list, tuple)) else copy.copy(value)


def whole(value: Any) -> Tensor:
    """Return all of a tensor, on every process."""
    full: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return full.detach().clone()


def everything(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Copy what a checkpoint could change: parameters, states by parameter's name, and groups."""
    names = {p: name for name, p in model.named_parameters()}
    groups = [
        {key: copy.copy(x) for key, x in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    return {
        "parameters": {name: local(p) for p, name in names.items()},
        "states": {names[p]: local(dict(state)) for p, state in optimizer.state.items() if state},
        "groups": groups,
        "clip": getattr(optimizer, "clip", None),
    }
