"""Kernels that walk a tensor row by row place their elements where the reference does."""

from __future__ import annotations

import pytest
import torch

import fusedopt
from fusedopt.kernels import lang
from fusedopt.memory.walk import Walk
from fusedopt.step import plan

pytestmark = pytest.mark.skipif(lang.triton is None, reason="needs Triton")


# Shape of what lies here, and its walk: elements of a row, number of the first element in the whole
# parameter, elements that follow each other there, how far apart the next ones begin.
WALKS = {
    # Rows of 150 elements one behind the other.
    "ragged rows": ((5, 150), Walk(150, 0, 750, 750)),
    # Of each row of 700 the middle 150: a shard that is cut along the last dimension.
    "a piece of each row": ((5, 150), Walk(150, 275, 150, 700)),
    # [4, 6, 130] of [4, 24, 130]: six rows follow each other.
    "six rows follow": ((4, 6, 130), Walk(130, 780, 780, 3120)),
    # Rows of whole groups that do not follow each other.
    "whole groups apart": ((3, 256), Walk(256, 256, 256, 1024)),
    # Numbers beyond 2^32, and rows of less than a group.
    "far away": ((40, 7), Walk(7, (1 << 33) + 5, 7, 1 << 20)),
    # A chunk whose numbers pass 2^32.
    "across 2^32": ((2, 200), Walk(200, (1 << 32) - 100, 400, 400)),
}


@pytest.mark.parametrize("options", [
    {"state_dtype": "int8", "rounding": "stochastic"},
    {"state_dtype": "fp8", "master": "remainder8", "rounding": "stochastic"},
], ids=["int8", "fp8"])  # fmt: skip
@pytest.mark.parametrize("name", WALKS)
def test_rows_are_walked_alike(name, options, monkeypatch, device):
    """Catches a draw, a group or an offset of another element: bits of masters and codes differ."""
    shape, walk = WALKS[name]
    assert walk.is_rowwise(torch.Size(shape).numel())
    monkeypatch.setattr(plan, "walk_of", lambda p, coded: walk)
    # Whatever is known of a shard's groups is that of its rows.
    groups = torch.Size(shape).numel() // walk.inner * -(-walk.inner // 128)
    monkeypatch.setattr("fusedopt.formats.tensors.local_scale_shape", lambda p: (groups,))
    monkeypatch.setattr("fusedopt.formats.tensors.whole_scale_shape", lambda p: (groups,))
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator).to(device, torch.bfloat16)
    runs = []
    for backend in ("triton", "reference"):
        p = torch.nn.Parameter(start.clone())
        # Powers of two: products are exact, so that kernel and reference round the same numbers.
        optimizer = fusedopt.SGD([p], lr=0.5, momentum=0.5, backend=backend, **options)
        generator.manual_seed(1)
        for _ in range(2):
            p.grad = torch.randn(shape, generator=generator).to(device, torch.bfloat16)
            optimizer.step()
        runs.append((p, optimizer))
    (p, kernels), (q, reference) = runs
    for key, value in kernels.state[p].items():
        assert torch.equal(_pattern(value), _pattern(reference.state[q][key])), key
    assert torch.equal(p, q)


def _pattern(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8) if x.itemsize == 1 else x
