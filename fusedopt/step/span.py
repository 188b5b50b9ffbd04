"""Over which processes gradients are clipped together, and how many hold the same of each.

The square of a norm is the sum over processes of what each has of it, |local gradient|^2 / R, where
R is the number of processes that hold the same: one collective of one scalar, whatever the number
of tensors and meshes.

An optimizer's meshes say which processes that are: all that differ from this one along the
dimensions that some mesh has. A DTensor on a mesh of fewer of them (a norm's weight that is not cut
beside matrices that are, under tensor parallelism) is there once for each, as is a plain tensor
beside DTensors. Stages of a pipeline have meshes of their own and nothing in common: what they are
clipped with, the user names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed

from ..memory.dtensor import holds_dtensors, is_dtensor, mesh_of, replicas, specs_of

# Of each default group, the groups that were made in it, by their ranks.
_made: WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Span:
    """The processes whose gradients have one norm.

    Attributes:
        group: that sums, a process group.
        alike: how many processes hold a plain tensor that is whole on each.
    """

    group: Any
    alike: int

    def weights(self, params: Sequence[Tensor]) -> list[float]:
        """Return for each parameter what its part counts: one over the number that hold it."""
        if not holds_dtensors(params):
            return [1.0 / self.alike] * len(params)
        known: dict[Any, float] = {}
        found = []
        for p, spec in zip(params, specs_of(params), strict=True):
            key = None if spec is None else (id(spec.mesh), spec.placements)
            weight = known.get(key)
            if weight is None:
                weight = known[key] = 1.0 / self._holders(p)
            found.append(weight)
        return found

    def _holders(self, p: Tensor) -> int:
        if not is_dtensor(p):
            return self.alike
        return replicas(p) * max(self.alike // mesh_of(p).size(), 1)


def in_several_processes() -> bool:
    """Whether there is a process group of more than one rank."""
    here = distributed.is_available() and distributed.is_initialized()
    return here and distributed.get_world_size() > 1


def span_of(params: Sequence[Tensor], named: Any, recognised: Any) -> Span | None:
    """Return which processes the gradients of an optimizer are clipped with.

    Args:
        params: all of the optimizer's, with a gradient or without.
        named: the process group that the user has named, or None.
        recognised: that of a wrapper which hands each process other plain parameters, or None.

    Returns:
        None for this process alone.

    Raises:
        ValueError: for a group that lacks processes which the meshes have.
        RuntimeError: for meshes of which none has all processes.
    """
    ranks = _ranks(params) if holds_dtensors(params) else ()
    group = named if named is not None else recognised
    if group is not None:
        lacking = set(ranks) - set(distributed.get_process_group_ranks(group))
        if lacking:
            raise ValueError(
                f"GlobalNorm's group lacks ranks {sorted(lacking)}, on which parameters of this"
                " optimizer are sharded: name a group that has them all, or none"
            )
        return Span(group, max(len(ranks), 1)) if distributed.get_world_size(group) > 1 else None
    if len(ranks) < 2:
        return None
    return Span(_group(ranks), len(ranks))


def _ranks(params: Sequence[Tensor]) -> tuple[int, ...]:
    """List the processes that the meshes of DTensors span around this one, in order."""
    here = distributed.get_rank()
    found = [spec.mesh for spec in specs_of(params) if spec is not None]
    meshes = dict(zip(map(id, found), found, strict=True))
    # Of a mesh without this process there is nothing here.
    own = [m for m in meshes.values() if here in m.mesh.reshape(-1).tolist()]
    spans = [set(mesh.mesh.reshape(-1).tolist()) for mesh in own]
    if not set().union(*spans) <= max(spans, key=len, default=set()):
        spans = [_around(here, root, own) for root in {id(r): r for r in map(_root, own)}.values()]
    largest = max(spans, key=len, default=set())
    if not set().union(*spans) <= largest:
        every = " and ".join(str(sorted(span)) for span in spans)
        raise RuntimeError(
            f"parameters of this optimizer are sharded over the ranks {every}, of which none has"
            " all: name those to be clipped together, GlobalNorm(max_norm,"
            " group=torch.distributed.group.WORLD) for all"
        )
    return tuple(sorted(largest))


def _root(mesh: Any) -> Any:
    """Return the mesh that another was cut out of."""
    return mesh._get_root_mesh() if hasattr(mesh, "_get_root_mesh") else mesh


def _around(here: int, root: Any, meshes: Sequence[Any]) -> set[int]:
    """Return the ranks of a mesh that differ from one along the dimensions that others have."""
    ranks = root.mesh
    dims: set[int] = set()
    for mesh in meshes:
        if _root(mesh) is root:
            places = torch.isin(ranks, mesh.mesh).nonzero()
            dims.update(d for d in range(ranks.dim()) if len(places[:, d].unique()) > 1)
    place = (ranks == here).nonzero()[0].tolist()
    index = tuple(slice(None) if d in dims else i for d, i in enumerate(place))
    return set(ranks[index].reshape(-1).tolist())


def _group(ranks: tuple[int, ...]) -> Any:
    """Return the process group of some ranks; made once, by all of them together."""
    world = distributed.group.WORLD
    if len(ranks) == distributed.get_world_size():
        return world
    made = _made.setdefault(world, {})
    if ranks not in made:
        made[ranks] = distributed.new_group(list(ranks), use_local_synchronization=True)
    return made[ranks]
