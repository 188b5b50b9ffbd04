"""Per-sample gradients from memory, with parameters and states kept in every way."""

from __future__ import annotations

import pytest
import torch

import fusedopt
from fusedopt.kernels import lang
from fusedopt.testing import worst_ulps

pytestmark = pytest.mark.skipif(lang.triton is None, reason="needs Triton")
BF16 = torch.bfloat16

# Whole chunks, one that the tensor ends in, rows that end within a group, and less than a group.
SHAPES = ((2048,), (1300,), (3, 150), (5,))


@pytest.mark.parametrize("options", [
    {"state_dtype": "int8"},
    {"rounding": "stochastic", "state_dtype": "fp8"},
    {"master": "remainder8", "state_dtype": "int8"},
    {"master": "remainder"},
    {"rounding": "kahan"},
], ids=str)  # fmt: skip
def test_samples_are_reduced_and_used_in_one_kernel(options, device):
    """Catches a chunk whose samples are read at one place and whose states are at another."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=generator).to(device, BF16) for s in SHAPES]
    runs = []
    for backend in ("triton", "reference"):
        params = [torch.nn.Parameter(x.clone()) for x in start]
        optimizer = fusedopt.BatchDecoupledAdam(
            params, lr=0.1, backend=backend, statistics=fusedopt.GradSampleSquares(), **options
        )
        generator.manual_seed(1)
        for p in params:
            samples = torch.randn((6, *p.shape), generator=generator)
            p.grad_sample = samples.to(device, BF16)
        optimizer.step()
        runs.append((params, optimizer))
    (ours, kernels), (theirs, reference) = runs
    for p, q, old in zip(ours, theirs, start, strict=True):
        assert worst_ulps(p.detach(), q.detach(), old) <= 1
        assert not torch.equal(p.detach(), old)
        for name, value in kernels.state[p].items():
            other = reference.state[q][name]
            if name == "step" or value.dtype in (torch.float32, BF16):
                # What rounding has left over is a small difference of large numbers.
                atol = 1e-6 if name == "compensation" else 1e-30
                torch.testing.assert_close(value, other, rtol=2**-7, atol=atol)
            elif name != "master":
                # A sum that differs in its last bit may turn the rounding of a code.
                gap = value.view(torch.uint8).int() - other.view(torch.uint8).int()
                assert gap.abs().max() <= 1 and (gap != 0).float().mean() < 0.02, name
