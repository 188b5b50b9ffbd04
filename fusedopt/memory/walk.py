"""How a kernel walks a tensor whose codecs draw or have groups, and each element's number.

See ``kernels/codecs/place.py``, whose rows of the table these are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .codes import GROUP
from .dtensor import is_dtensor, local_of, mesh_of, placements_of


@dataclass(frozen=True)
class Walk:
    """Where the elements of a tensor in this process are in the whole parameter.

    Attributes:
        inner: elements of a row, which groups do not leave.
        first: number of the first element in the whole parameter.
        whole: elements that follow each other there.
        apart: how far apart the next such elements begin there.
    """

    inner: int
    first: int
    whole: int
    apart: int

    def is_rowwise(self, numel: int) -> bool:
        """Whether groups have to be walked one by one, for so many elements."""
        one_run = self.whole >= numel
        return not (one_run and (self.inner >= numel or self.inner % GROUP == 0))

    def index(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Return the numbers of consecutive elements, int64."""
        here = torch.arange(start, stop, device=device)
        if self.whole != self.apart:
            here = here // self.whole * self.apart + here % self.whole
        return here + self.first


def walk_of(p: Any, coded: bool) -> Walk:
    """Return how a parameter is walked.

    Args:
        p: the parameter, in row-major order.
        coded: whether some of its states have groups.

    Raises:
        ValueError: for a DTensor that is cut along several inner dimensions.
    """
    local = local_of(p) if is_dtensor(p) else p
    numel = max(local.numel(), 1)
    inner = max(math.prod(local.shape[rows_of(p).dim :]), 1) if coded else numel
    cut = cut_dims(p)
    if not cut or not local.numel():
        return Walk(inner, 0, numel, numel)
    last = max(cut)
    before = [d for d in range(last) if p.shape[d] > 1]
    if any(d in cut for d in before[1:]):
        raise ValueError(
            f"it is cut along dimensions {sorted(cut)}, of which several are inner ones: what is"
            " rounded by place in the whole parameter is not to be had for it"
        )
    offsets = _offsets(p)
    first = sum(o * math.prod(p.shape[d + 1 :]) for d, o in enumerate(offsets))
    whole = math.prod(local.shape[last:])
    apart = math.prod(p.shape[last:])
    if whole == numel:
        apart = numel  # in one run
        whole = numel
    return Walk(min(inner, whole), first, whole, apart)


def cut_dims(p: Any) -> set[int]:
    """Return the dimensions along which a tensor is cut over processes."""
    if not is_dtensor(p):
        return set()
    mesh = mesh_of(p)
    return {
        placement.dim % max(p.dim(), 1)
        for i, placement in enumerate(placements_of(p))
        if hasattr(placement, "dim") and mesh.size(i) > 0
    }


def _offsets(p: Any) -> Sequence[int]:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(p.shape, mesh_of(p), placements_of(p))
    return tuple(offsets)


@dataclass(frozen=True)
class Rows:
    """The rows that groups do not leave.

    Attributes:
        dim: the first of the dimensions that a row consists of.
        parts: how many processes each row of the whole is cut over, where groups begin anew at a
            border; None where no border is one that groups would lie across.
    """

    dim: int
    parts: int | None = None


def rows_of(p: Any) -> Rows:
    """Return the rows that groups of a tensor run along.

    From the last dimension for which a row has a whole group, so that groups are those of the same
    elements however a tensor is cut along the dimensions before. Where it is cut along one that
    groups would run along, and not between groups, they begin anew at each border, if all parts are
    of one size. Along the first dimension, and with parts of several sizes, rows begin behind it:
    there groups do not depend on the number of processes.
    """
    rows = Rows(_natural_dim(p.shape))
    for d in sorted(cut_dims(p)):
        if d < rows.dim:
            continue
        parts = _parts(p, d)
        size, rest = p.shape[d], math.prod(p.shape[d + 1 :])
        if d == 0 or not size or size % parts:
            rows = Rows(d + 1)
        elif d != rows.dim or rows.parts is not None or size // parts * rest % GROUP:
            rows = Rows(d, parts)
    return rows


def _parts(p: Any, dim: int) -> int:
    """Return how many parts a tensor is cut into along a dimension."""
    return math.prod(
        mesh_of(p).size(i)
        for i, placement in enumerate(placements_of(p))
        if getattr(placement, "dim", None) == dim
    )


def runs_along_first(shape: Sequence[int]) -> bool:
    """Whether groups of a tensor that is not cut run along its first dimension."""
    return _natural_dim(shape) == 0


def _natural_dim(shape: Sequence[int]) -> int:
    size = 1
    for d in range(len(shape) - 1, -1, -1):
        size *= shape[d]
        if size >= GROUP:
            return d
    return 0


def scale_shape(shape: Sequence[int], rows: Rows) -> tuple[int, ...]:
    """Return the shape of the scales of a tensor: of the rows' dimensions one, or parts and one."""
    before, row = shape[: rows.dim], math.prod(shape[rows.dim :])
    if rows.parts is None:
        return (*before, -(-row // GROUP))
    return (*before, rows.parts, -(-(row // rows.parts) // GROUP))
