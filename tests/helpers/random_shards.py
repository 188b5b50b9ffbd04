"""Random parameters over meshes, and the same in one process, where every shard is a parameter."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

TYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float64, torch.float16)


@dataclass
class Piece:
    """What the processes at one coordinate along the sharded dimensions hold of a parameter.

    Attributes:
        value, gradient: of the piece; None for a gradient that is missing there.
    """

    value: Tensor
    gradient: Tensor | None


@dataclass
class Random:
    """A parameter: where it lies, and all of its pieces by coordinate in its mesh.

    Attributes:
        mesh: None for a plain tensor, the same on all processes.
        placements: of the parameter.
        pieces: by coordinate; replicas share one.
        partial: whether the gradient has yet to be added up.
    """

    mesh: DeviceMesh | None
    placements: tuple[Any, ...]
    pieces: dict[tuple[int, ...], Piece]
    shape: torch.Size
    partial: bool

    def here(self) -> Piece:
        """Return the piece of this process."""
        return self.pieces[() if self.mesh is None else tuple(self.mesh.get_coordinate())]

    def build(self) -> torch.nn.Parameter:
        """Make the parameter of this process, with its gradient."""
        piece = self.here()
        p = torch.nn.Parameter(self._wrap(piece.value.clone(), self.placements))
        if piece.gradient is not None:
            p.grad = self._gradient(piece.gradient)
        return p

    def _gradient(self, gradient: Tensor) -> Tensor:
        if not self.partial or self.mesh is None:
            return self._wrap(gradient.clone(), self.placements)
        from torch.distributed.tensor import Partial

        # Halves and quarters are exact: the parts add up to what one process has.
        placements, count = [], 1
        for dim, placement in enumerate(self.placements):
            if placement.is_replicate():
                placement, count = Partial(), count * self.mesh.size(dim)
            placements.append(placement)
        return self._wrap(gradient / count, tuple(placements))

    def _wrap(self, local: Tensor, placements: tuple[Any, ...]) -> Tensor:
        if self.mesh is None:
            return local
        from torch.distributed.tensor import DTensor

        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(
            local, self.mesh, placements, run_check=False, shape=self.shape, stride=stride
        )


def meshes() -> dict[str, DeviceMesh]:
    """Make meshes of four processes, two dimensions with all that can be cut out of them."""
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    line = init_device_mesh("cpu", (4,))
    return {"ab": square, "a": square["a"], "b": square["b"], "line": line}


def configuration(seed: int, known: dict[str, DeviceMesh]) -> list[Random]:
    """Draw parameters: the same on every process, with nothing said between them."""
    from torch.distributed.tensor import Replicate, Shard

    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    names = draw.choice([["ab"], ["line"], ["ab", "a"], ["a", "b"], ["ab", "a", "b", "line"]])
    found = []
    for _ in range(draw.randint(1, 5)):
        mesh = known[draw.choice(names)] if draw.random() < 0.8 else None
        shape = torch.Size(draw.choice([(5, 3), (4, 4), (1, 2), (7,), (3, 2, 2), (0, 3)]))
        dtype = draw.choice(TYPES)
        value = torch.randn(shape, generator=generator).to(dtype)
        gradient = (torch.randn(shape, generator=generator) * 2).to(dtype)
        dims = 0 if mesh is None else mesh.ndim
        placements = tuple(
            Replicate() if draw.random() < 0.3 else Shard(draw.randrange(len(shape)))
            for _ in range(dims)
        )
        pieces = _pieces(mesh, placements, value, gradient, draw)
        whole = all(piece.gradient is not None for piece in pieces.values())
        found.append(Random(mesh, placements, pieces, shape, whole and draw.random() < 0.2))
    if not any(x.mesh is not None for x in found):
        # Plain parameters alone are each process's own.
        return configuration(seed + 1_000_000, known)
    return found


def _pieces(
    mesh: DeviceMesh | None,
    placements: tuple[Any, ...],
    value: Tensor,
    gradient: Tensor,
    draw: random.Random,
) -> dict[tuple[int, ...], Piece]:
    missing, pieces = draw.random() < 0.3, {}
    shared: dict[tuple[int, ...], Piece] = {}
    for place in itertools.product(*(range(n) for n in (() if mesh is None else mesh.shape))):
        cut = [value, gradient]
        for dim, placement in enumerate(placements):
            if placement.is_shard():
                cut = [_chunk(x, placement.dim, mesh.size(dim), place[dim]) for x in cut]
        key = tuple(i for i, p in zip(place, placements, strict=True) if p.is_shard())
        if key not in shared:
            absent = missing and draw.random() < 0.5
            shared[key] = Piece(cut[0].contiguous(), None if absent else cut[1].contiguous())
        pieces[place] = shared[key]
    return pieces


def _chunk(x: Tensor, dim: int, count: int, index: int) -> Tensor:
    """Return one of ``count`` shards along a dimension; the last ones may be short, or empty."""
    size = -(-x.shape[dim] // count)
    start = min(index * size, x.shape[dim])
    return x.narrow(dim, start, min(size, x.shape[dim] - start))


def all_pieces(drawn: list[Random]) -> Iterator[Piece]:
    """List what one process would have: each piece once."""
    for x in drawn:
        yield from {id(piece): piece for piece in x.pieces.values()}.values()


def same_everywhere(t: Tensor) -> bool:
    """Whether a tensor has the same bits on every process."""
    others = [torch.empty_like(t) for _ in range(distributed.get_world_size())]
    distributed.all_gather(others, t.contiguous())
    # As bytes: nan is nowhere equal to itself.
    return all(torch.equal(_bytes(x), _bytes(t)) for x in others)


def _bytes(t: Tensor) -> Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)
