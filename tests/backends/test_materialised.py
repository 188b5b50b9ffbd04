"""Materialised per-sample gradients: reduced by one kernel, or reduced and used by one kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fusedopt
from fusedopt import backends
from fusedopt.backends import triton, triton_samples
from fusedopt.kernels import multi_tensor
from fusedopt.kernels.per_sample import materialised

# Above a whole chunk, ragged, and with samples that do not start on 16 bytes.
SIZES = (multi_tensor.BLOCK, multi_tensor.BLOCK + 16, 37, 1)

# float32 sums of a dozen terms, as a share of the sum of their magnitudes.
SUM = 1e-6


def _samples(count: int, shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> Tensor:
    return torch.randn(count, *shape, dtype=torch.float64, device=device).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("counts", [(1,), (6,), (4, 3), (0, 2)])
def test_sums_and_sums_of_squares(
    counts: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    # Catches a sample left out by the loop of four or counted twice, one part of several, a mask
    # on the ragged tail, and sums in the type of the samples.
    parameters = [torch.zeros(size, device=device) for size in SIZES]
    columns = [[_samples(n, p.shape, dtype, device) for n in counts] for p in parameters]
    sums, squares = backends.reduce_samples(parameters, columns, "triton")
    for p, parts, total, square in zip(parameters, columns, sums, squares, strict=True):
        rows = torch.cat(parts).double()
        for got, terms in ((total, rows), (square, rows.square())):
            assert got.shape == p.shape
            assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            error = (got.double() - terms.sum(0)).abs()
            assert bool((error <= SUM * terms.abs().sum(0)).all())


@pytest.mark.parametrize("layout", ["transposed samples", "channels last", "expanded", "gaps"])
def test_layouts(layout: str, device: torch.device) -> None:
    # Catches a kernel that walks memory of samples in another order than that of the parameter.
    p = torch.zeros(2, 3, 4, 5, device=device)
    x = torch.randn(3, 2, 3, 4, 5, device=device)
    if layout == "transposed samples":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "channels last":
        p = p.to(memory_format=torch.channels_last)
    elif layout == "expanded":
        x = x[:1].expand(3, -1, -1, -1, -1)
    else:
        x = torch.randn(6, 2, 3, 4, 5, device=device)[::2]
    (total,), (square,) = backends.reduce_samples([p], [[x]], "triton")
    torch.testing.assert_close(total, x.sum(0))
    torch.testing.assert_close(square, x.square().sum(0))


def _optimizer(backend: str, device: Any, **common: Any) -> tuple[list[Tensor], Any]:
    torch.manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(size, device=device)) for size in SIZES]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02, "virtual_batch_size": 3}]
    statistics = fusedopt.GradSampleSquares()
    return params, fusedopt.BatchDecoupledAdam(
        groups, lr=0.1, statistics=statistics, backend=backend, **common
    )


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_launch_and_the_reference(
    dtype: torch.dtype, clip: float | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Catches a mean that goes through memory where it need not, and a wrong factor: of the batch,
    # of clipping, or of a group's virtual batch.
    launched: list[Any] = []

    def record(kernel: Any, *arguments: Any, **meta: Any) -> None:
        launched.append(kernel)
        launch(kernel, *arguments, **meta)

    launch = triton.launch
    monkeypatch.setattr(triton, "launch", record)
    monkeypatch.setattr(triton_samples, "launch", record)
    common = {"clip": None if clip is None else fusedopt.GlobalNorm(clip)}
    ours, kernels = _optimizer("triton", device, **common)
    common = {"clip": None if clip is None else fusedopt.GlobalNorm(clip)}
    theirs, reference = _optimizer("reference", device, **common)
    for counts in ((4,), (2, 3)):
        for p, q in zip(ours, theirs, strict=True):
            parts = [_samples(n, p.shape, dtype, device) for n in counts]
            p.grad_sample, q.grad_sample = list(parts), list(parts)
        launched.clear()
        kernels.step()
        reference.step()
        # Two cohorts: samples of some parameters start on 16 bytes, those of others do not.
        names = {kernel: launched.count(kernel) for kernel in launched}
        if clip is None:
            assert names == {materialised.update_from_samples: 2}
        else:
            assert names[materialised.reduce_samples] == 2
            assert materialised.update_from_samples not in names
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)
        kernels.zero_grad()
        reference.zero_grad()
        assert all(p.grad_sample is None for p in ours)
