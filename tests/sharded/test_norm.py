"""Clipping over several processes, against the same pieces in one."""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
from random_shards import Random, all_pieces, configuration, meshes, same_everywhere
from ranks import in_ranks
from torch import Tensor

import fusedopt

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def _alone(drawn: list[Random], max_norm: float, order: float, lr: float) -> tuple[float, list]:
    """Clip and step in one process, in float64; return the norm and what became of each piece."""
    pieces = list(all_pieces(drawn))
    gradients = [x.gradient.double() for x in pieces if x.gradient is not None]
    gradients = [gradient for gradient in gradients if gradient.numel()]
    norm = torch.nn.utils.get_total_norm(gradients, order).item() if gradients else 0.0
    # min() would lose a nan.
    factor = 1.0 if norm + 1e-6 <= max_norm else max_norm / (norm + 1e-6)
    found = {
        id(x): x.value.double() - (0.0 if x.gradient is None else lr * factor * x.gradient.double())
        for x in pieces
    }
    return norm, [found[id(x.here())] for x in drawn]


def _check(seed: int, known: dict, backend: str) -> None:
    draw = random.Random(-seed)
    drawn = configuration(seed, known)
    max_norm, order = draw.choice([0.1, 1.0, 100.0]), draw.choice([2.0, 2.0, math.inf])
    norm, expected = _alone(drawn, max_norm, order, 0.5)
    params = [x.build() for x in drawn]
    clip = fusedopt.GlobalNorm(max_norm, norm_type=order)
    fusedopt.SGD(params, lr=0.5, clip=clip, backend=backend).step()
    assert clip.last is not None, seed
    assert math.isclose(clip.last.item(), norm, rel_tol=1e-6, abs_tol=1e-12), (seed, norm)
    assert same_everywhere(clip.last), seed
    for p, wanted in zip(params, expected, strict=True):
        local: Tensor = p.detach()
        local = local.to_local() if hasattr(local, "to_local") else local
        bound = TOLERANCES[local.dtype]
        torch.testing.assert_close(local.double(), wanted, rtol=bound, atol=bound, msg=str(seed))


def _many(rank: int, first: int, count: int, backend: str) -> None:
    known = meshes()
    for seed in range(first, first + count):
        _check(seed, known, backend)


def test_a_thousand_configurations(tmp_path: Path) -> None:
    """Meshes in one optimizer, uneven and empty shards, replicas, missing and partial gradients.

    Catches a replica counted twice, a shard that is not counted, a collective that one process
    leaves out, and gradients that were not added up.
    """
    in_ranks(4, tmp_path, _many, 0, 1000, "reference", limit=900.0)


def test_by_the_kernels(tmp_path: Path) -> None:
    in_ranks(4, tmp_path, _many, 5000, 25, "triton")
