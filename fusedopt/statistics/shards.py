"""Sums over elements of tensors that may be sharded over processes (DTensor)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


def whole_norms(norms: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the norm and another sum of whole tensors, of those of this process' shards.

    Args:
        norms: ``[2]`` for each tensor: the norm of the local elements, and a sum over them.
        tensors: whose they are, or what is sharded as they are.

    Returns:
        The same for the whole tensors; one collective for each sharding.
    """
    found = list(norms)
    places: dict[Any, list[int]] = {}
    for place, tensor in enumerate(tensors):
        mesh, sharded = _sharding(tensor)
        if sharded:
            places.setdefault((mesh, sharded), []).append(place)
    for (mesh, sharded), own in places.items():
        sums = torch.stack([found[place].double() for place in own])
        sums[:, 0].square_()
        for dim in sharded:
            torch.distributed.all_reduce(sums, group=mesh.get_group(dim))
        sums[:, 0].sqrt_()
        for place, pair in zip(own, sums.unbind(), strict=True):
            found[place] = pair
    return found


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
