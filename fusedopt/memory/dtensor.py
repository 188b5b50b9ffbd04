"""DTensors: what of them lies in this process, how they are placed, and who else holds the same.

A loop over thousands of them runs at every step, so it reads attributes and calls nothing of
theirs. ``_spec`` and ``_local_tensor`` are not public; ``placements``, ``device_mesh`` and
``to_local()`` say the same, a hundred times slower where the first is asked after a dispatch.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_SPEC = operator.attrgetter("_spec")


_class: Any = None


def dtensor_class() -> Any:
    """Return DTensor, or None where nobody has imported it, so that there is none."""
    global _class
    if _class is None:
        _class = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return _class


def holds_dtensors(tensors: Sequence[Tensor]) -> bool:
    """Whether some of the tensors are DTensors."""
    return dtensor_class() in set(map(type, tensors))


def is_dtensor(t: Tensor) -> bool:
    """Whether a tensor is one."""
    return type(t) is dtensor_class()


def mesh_of(t: Any) -> Any:
    """Return the device mesh of a DTensor."""
    return t._spec.mesh


def placements_of(t: Any) -> tuple[Any, ...]:
    """Return how a DTensor is placed on each dimension of its mesh."""
    placements: tuple[Any, ...] = t._spec.placements
    return placements


def placed_alike(a: Any, b: Any) -> bool:
    """Whether two DTensors of equal shape are cut over the same mesh in the same way."""
    a, b = a._spec, b._spec
    if a is b:
        return True
    meshes = a.mesh is b.mesh or a.mesh == b.mesh
    return bool(meshes and a.placements == b.placements and a.shape == b.shape)


def local_of(t: Any) -> Tensor:
    """Return what of a DTensor lies in this process."""
    local: Tensor = t._local_tensor
    return local


def sharded_like(t: Any, local: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Make a DTensor that is placed like another, of what lies here.

    Args:
        t: the other.
        local: like what it has here, in shape and strides.
        shape: of the whole, where it is another one, cut along the same dimensions.
    """
    spec = t._spec
    if shape is not None or local.dtype != spec.tensor_meta.dtype:
        spec = _spec_like(spec, spec.shape if shape is None else shape, local.dtype)
    found: Tensor = dtensor_class().__new__(type(t), local, spec, requires_grad=False)
    return found


def _spec_like(spec: Any, shape: Sequence[int], dtype: torch.dtype) -> Any:
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    strides = spec.tensor_meta.stride
    if tuple(shape) != tuple(spec.shape):
        strides = torch.empty(tuple(shape), device="meta").stride()
    return DTensorSpec(spec.mesh, spec.placements, TensorMeta(torch.Size(shape), strides, dtype))


def specs_of(tensors: Sequence[Any]) -> list[Any]:
    """List how DTensors are placed, mesh included; None for other tensors, nothing for none."""
    kinds, dtensor = set(map(type, tensors)), dtensor_class()
    if dtensor not in kinds:
        return []
    if len(kinds) == 1:
        return list(map(_SPEC, tensors))
    return [t._spec if type(t) is dtensor else None for t in tensors]


def are_same_specs(now: Sequence[Any], then: Sequence[Any]) -> bool:
    """Whether what ``specs_of`` listed says the same."""
    if len(now) != len(then):
        return False
    return all(map(operator.is_, now, then)) or all(
        a is b or (a and b and a.placements == b.placements and a.mesh == b.mesh)
        for a, b in zip(now, then, strict=True)
    )


def replicas(t: Any) -> int:
    """Return how many processes of the mesh hold the same part of a DTensor."""
    mesh, count = mesh_of(t), 1
    for dim, placement in enumerate(placements_of(t)):
        if placement.is_replicate():
            count *= mesh.size(dim)
    return count


def placed_as(params: Sequence[Any], tensors: Sequence[Any]) -> list[Any]:
    """Bring DTensors to the placements of their parameters, where these are on the same mesh.

    What is left to be added up over processes (``Partial``) is added up. Every process of a mesh
    must call this with the same tensors where something is to be moved.

    Args:
        params: the parameters.
        tensors: one for each, of the same shape. What is none is returned as it is.
    """
    kind = dtensor_class()
    if kind not in set(map(type, tensors)):
        return list(tensors)
    found = []
    for p, t in zip(params, tensors, strict=True):
        if type(t) is kind and type(p) is kind:
            own, spec = p._spec, t._spec
            if spec is not own and spec.placements != own.placements and spec.mesh == own.mesh:
                t = t.redistribute(own.mesh, own.placements)
        found.append(t)
    return found
