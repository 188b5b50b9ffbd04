"""Sums over elements of tensors that may be sharded over processes (DTensor)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def total(parts: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> Tensor:
    """Add up what each process has of each tensor.

    Replicas are counted once, and every process gets the same.

    Args:
        parts: tensors, and of each a vector in float64 that was summed over its local elements.
        device: of the result.

    Returns:
        The sum of the vectors over all tensors and all their shards. One collective for each mesh
        dimension that something is sharded over.
    """
    sums: dict[Any, Tensor] = {}
    groups: dict[Any, list[Any]] = {}
    for tensor, part in parts:
        mesh, sharded = _sharding(tensor)
        key = (mesh, sharded)
        part = part.to(device)
        sums[key] = sums[key] + part if key in sums else part
        groups[key] = [mesh.get_group(dim) for dim in sharded]
    for key, own in sums.items():
        for group in groups[key]:
            torch.distributed.all_reduce(own, group=group)
    return torch.stack(list(sums.values())).sum(0)


def _sharding(tensor: Any) -> tuple[Any, tuple[int, ...]]:
    """Return the mesh of a tensor, and its dimensions that the tensor is cut along."""
    placements = getattr(tensor, "placements", None)
    if placements is None:
        return None, ()
    if any(placement.is_partial() for placement in placements):
        raise RuntimeError(
            f"a gradient is placed as {placements}: it has yet to be added up over processes."
            " Redistribute it first"
        )
    sharded = (i for i, placement in enumerate(placements) if not placement.is_replicate())
    return tensor.device_mesh, tuple(sharded)
