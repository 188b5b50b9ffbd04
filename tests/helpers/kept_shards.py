"""Parameters in bfloat16 of shapes at which groups end everywhere, cut over processes in every way.

Gradients are given by place in the whole parameter, so that one process is to be met to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from sharded import like, world
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

# Rows of 256 are groups wherever they are cut into halves; those of 200 and 150 end in the middle
# of one. Without a row of 128, groups of the whole run along all dimensions.
SHAPES: Mapping[str, tuple[int, ...]] = {
    "rows": (9, 256),
    "odd rows": (6, 200),
    "few rows": (2, 130),
    "deep": (3, 2, 150),
    "short rows": (8, 20),
    "vector": (300,),
    "one": (1,),
}
# Whose groups along dimension 0 are those of one process alone.
ALONE = ("short rows", "vector", "one")
FORMATS: Mapping[str, dict[str, Any]] = {
    "int8": {"state_dtype": "int8"},
    "fp8": {"state_dtype": "fp8"},
    "one of each": {"state_dtype": {"exp_avg": torch.float32, "exp_avg_sq": "int8"}},
    "stochastic": {"rounding": "stochastic"},
    "int8, stochastic": {"state_dtype": "int8", "rounding": "stochastic"},
    "kahan": {"rounding": "kahan", "state_dtype": torch.float32},
    "remainder, int8": {"master": "remainder", "state_dtype": "int8"},
    "remainder8, fp8": {"master": "remainder8", "state_dtype": "fp8"},
    "remainder8, stochastic": {"master": "remainder8", "rounding": "stochastic"},
    "float32, int8": {"master": "float32", "state_dtype": "int8"},
}


class Parameters(nn.Module):
    """Nothing but parameters."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = list(values)
        for i, value in enumerate(values.values()):
            self.register_parameter(f"p{i}", nn.Parameter(value.clone()))

    def own(self) -> dict[str, Tensor]:
        """Return the parameters by name."""
        return dict(zip(self.names, self.parameters(), strict=True))


def values(seed: int = 0) -> dict[str, Tensor]:
    """Return the parameters' values of one process."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(torch.bfloat16)
        for name, shape in SHAPES.items()
    }


def gradients(step: int) -> dict[str, Tensor]:
    """Return the gradients of a step, among them many zeros."""
    generator = torch.Generator().manual_seed(1000 + step)
    found = {}
    for name, shape in SHAPES.items():
        size = 0.5 * torch.randn(shape, generator=generator).exp2()
        noise = torch.randn(shape, generator=generator) * size
        found[name] = (noise * 16).round().clamp(-64, 64).to(torch.bfloat16) / 16
    return found


def build(layout: str, seed: int = 0) -> Parameters:
    """Return parameters that are cut over all processes of the group.

    Each has ``places``: the numbers in the whole parameter of what this process has of it.
    """
    whole = values(seed)
    counted = {
        name: torch.arange(x.numel(), dtype=torch.float32).view(x.shape)
        for name, x in whole.items()
    }
    model = _cut(Parameters(whole), layout)
    for p, place in zip(
        model.parameters(), _cut(Parameters(counted), layout).parameters(), strict=True
    ):
        p.places = own(place).detach().long()  # type: ignore[attr-defined]
    return model


def _cut(model: Parameters, layout: str) -> Parameters:
    if layout == "plain":
        return model
    count = world()
    if layout in ("rows", "replicas", "columns"):
        mesh = init_device_mesh("cpu", (count,))
        if layout == "rows":
            return fully_shard(model, mesh=mesh)
        _distribute(model, mesh, Replicate() if layout == "replicas" else Shard(1))
    elif layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, count // 2), mesh_dim_names=("replicate", "shard"))
        return fully_shard(model, mesh=mesh)
    else:
        # Rows of what tensor parallelism has cut: "fsdp+rows", "fsdp+columns".
        mesh = init_device_mesh("cpu", (count // 2, 2), mesh_dim_names=("dp", "tp"))
        _distribute(model, mesh["tp"], Shard(0 if layout == "fsdp+rows" else 1))
        return fully_shard(model, mesh=mesh["dp"])
    return model


def _distribute(model: Parameters, mesh: Any, placement: Any) -> None:
    for name, p in list(model.named_parameters()):
        # A vector has no columns: tensor parallelism leaves it whole.
        placed = Replicate() if placement == Shard(1) and p.dim() < 2 else placement
        if p.dim() < 2 and placement == Shard(0) and p.shape[0] % mesh.size():
            placed = Replicate()
        setattr(model, name, nn.Parameter(distribute_tensor(p.detach(), mesh, [placed])))


def own(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def train(model: Parameters, optimizer: Any, steps: Iterable[int]) -> None:
    """Take steps, each named by its number."""
    for step in steps:
        given = gradients(step)
        for name, p in model.own().items():
            p.grad = like(p, given[name].flatten()[p.places])  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad()
