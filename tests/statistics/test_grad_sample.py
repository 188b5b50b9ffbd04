"""The forms of ``p.grad_sample`` that ``GradSampleSquares`` takes."""

from __future__ import annotations

import pytest
import torch
from decoupled_by_hand import ADAM, CLOSE, ByHand
from marks import both_backends, numpy_may_warn
from per_sample import DEVICE, DTYPES, Allocations, assert_near, randn
from torch.nn import Parameter

from fusedopt import BatchDecoupledAdam, GradSampleSquares


@both_backends
@pytest.mark.parametrize("n", [1, 2, 7, 33])
def test_grad_sample_batches(n: int, backend: str) -> None:
    """Any number of samples, in one pass; p.grad is neither needed nor read nor written."""
    dtype = DTYPES[backend]
    samples = randn(n, 5, 9, dtype=dtype)
    for grad in (None, torch.full((5, 9), float("nan"), dtype=dtype, device=DEVICE)):
        p = Parameter(randn(5, 9, dtype=dtype, seed=1))
        hand = ByHand([p], 1, **ADAM)
        p.grad, p.grad_sample = grad, samples
        optimizer = BatchDecoupledAdam([p], statistics=GradSampleSquares(), backend=backend, **ADAM)
        optimizer.step()
        hand.adam([samples])
        assert_near(p, hand.params[0], CLOSE[backend], f"n = {n}")
        assert grad is None or p.grad is grad and grad.isnan().all()


@both_backends
def test_grad_sample_list(backend: str) -> None:
    """Opacus makes a list at accumulation: its parts are one batch."""
    dtype = DTYPES[backend]
    samples = randn(6, 9, dtype=dtype)
    p = Parameter(randn(9, dtype=dtype, seed=1))
    hand = ByHand([p], 2, **ADAM)
    statistics = GradSampleSquares()
    optimizer = BatchDecoupledAdam(
        [p], statistics=statistics, virtual_batch_size=2, backend=backend, **ADAM
    )
    for parts in ([samples[:3], samples[3:]], [samples[:5], samples[5:]], [samples]):
        p.grad_sample = list(parts)
        optimizer.step()
        hand.adam([samples])
        assert statistics.samples == 6
    assert_near(p, hand.params[0], 3 * CLOSE[backend], "list")


@both_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_grad_sample_in_16_bits(dtype: torch.dtype, backend: str) -> None:
    """16-bit samples of float32 parameters: summed and squared in float32."""
    samples = (randn(5, 9) / 100).to(dtype)
    p = Parameter(randn(9, dtype=torch.float32, seed=1))
    hand = ByHand([p], 1, **ADAM)
    p.grad_sample = samples
    optimizer = BatchDecoupledAdam([p], statistics=GradSampleSquares(), backend=backend, **ADAM)
    optimizer.step()
    hand.adam([samples])
    assert_near(p, hand.params[0], 1e-5, "p")
    assert_near(optimizer.state[p]["exp_avg_sq"], hand.state[0]["v"], 1e-5, "exp_avg_sq")


@numpy_may_warn
@both_backends
def test_grad_sample_overflow_in_a_sample_skips_the_step(backend: str) -> None:
    """Under a scaler: an inf in one sample, or in a square alone, while p.grad looks finite."""
    for value in (float("inf"), 1e30):
        p = Parameter(torch.ones(3, device=DEVICE))
        p.grad_sample = torch.ones(4, 3, device=DEVICE)
        p.grad_sample[1, 2] = value
        p.grad = torch.ones_like(p)
        optimizer = BatchDecoupledAdam([p], statistics=GradSampleSquares(), backend=backend)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0)
        scaler.scale(torch.ones((), device=DEVICE))
        scaler.step(optimizer)
        assert torch.equal(p.detach(), torch.ones_like(p)), value
        assert not optimizer.state[p] or optimizer.state[p]["step"] == 0


@both_backends
def test_grad_sample_layouts(backend: str) -> None:
    """Batch last in memory, expanded, sliced; a transposed parameter."""
    dtype = DTYPES[backend]
    base = randn(4, 6, 5, dtype=dtype)
    forms = [
        base.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        base.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack((base, base * 0), -1)[..., 0],
        base[:1].expand(4, 6, 5),
    ]
    for place, form in enumerate(forms):
        for transposed in (False, True):
            value = randn(6, 5, dtype=dtype, seed=1)
            p = Parameter(value.t().contiguous().t() if transposed else value)
            hand = ByHand([p], 2, **ADAM)
            p.grad_sample = form
            optimizer = BatchDecoupledAdam(
                [p], statistics=GradSampleSquares(), virtual_batch_size=2, backend=backend, **ADAM
            )
            optimizer.step()
            hand.adam([form])
            assert_near(p, hand.params[0], CLOSE[backend], f"{place}, {transposed}")


@both_backends
def test_grad_sample_empty_and_scalar_parameters(backend: str) -> None:
    dtype = DTYPES[backend]
    shapes = ((0, 3), (), (1,))
    params = [Parameter(randn(*s, dtype=dtype, seed=1)) for s in shapes]
    hand = ByHand(params, 2, **ADAM)
    samples = [randn(3, *s, dtype=dtype, seed=i) for i, s in enumerate(shapes)]
    for p, s in zip(params, samples, strict=True):
        p.grad_sample = s
    optimizer = BatchDecoupledAdam(
        params, statistics=GradSampleSquares(), virtual_batch_size=2, backend=backend, **ADAM
    )
    optimizer.step()
    hand.adam(samples)
    for p, q in zip(params, hand.params, strict=True):
        assert_near(p, q, CLOSE[backend], str(tuple(p.shape)))


@both_backends
def test_grad_sample_allocates_no_second_batch(backend: str) -> None:
    """Reduction, averages and update read [batch, *param] once and write nothing of its size."""
    p = Parameter(randn(40, 50, dtype=torch.float32))
    p.grad_sample = randn(8, 40, 50, dtype=torch.float32)
    optimizer = BatchDecoupledAdam([p], statistics=GradSampleSquares(), backend=backend)
    with Allocations() as seen:
        optimizer.step()
    assert seen.largest < 8 * 2000 or _is_view(seen), seen.what


def _is_view(seen: Allocations) -> bool:
    # Views of the samples themselves share their storage, and are no allocation.
    return any(name in seen.what for name in ("view", "slice", "select", "detach", "alias", "as_s"))
