"""Pitfalls of per-sample squares, h to j: clipping, loss scales and autocast.

The letters are the design note's. A pitfall is a mistake that somebody has made: most of
them give numbers that look right.
"""

from __future__ import annotations

import copy

import pytest
import torch
from marks import both_backends
from observed import adam_without_decay
from per_sample import (
    DEVICE,
    DTYPES,
    Expected,
    assert_near,
    check_squares,
    mlp,
    randn,
    squared_error,
    to,
)
from torch import nn

from fusedopt import GlobalNorm, GradSampleSquares, MicroBatchSquares, PerSampleSquares

# h


@both_backends
def test_pitfall_h_clipping(backend: str) -> None:
    """c multiplies the gradient and c**2 the squares. At b = N the step is that of clipped AdamW;

    at b = 1 with c on the gradient alone the second moment would not shrink with the first.
    """
    samples = randn(4, 7, dtype=DTYPES[backend])
    norm = samples.mean(0).norm().item()
    for max_norm in (norm / 5, norm * 5):
        c = min(1.0, max_norm / (norm + 1e-6))
        for b in (1, 2, 4):
            p = nn.Parameter(randn(7, dtype=DTYPES[backend], seed=1))
            p.grad_sample = samples
            optimizer = adam_without_decay(
                [p],
                GradSampleSquares(),
                virtual_batch_size=b,
                clip=GlobalNorm(max_norm),
                backend=backend,
            )
            optimizer.step()
            w = (4 - b) / (b * 3)
            a2 = (1 - w) * samples.mean(0).square() + w * samples.square().mean(0)
            state = optimizer.state[p]
            tolerance = 1e-7 if backend == "reference" else 1e-5
            assert_near(state["exp_avg"], 0.4 * c * samples.mean(0), tolerance, "exp_avg")
            assert_near(state["exp_avg_sq"], 0.2 * c**2 * a2, tolerance, "exp_avg_sq")


# i


@both_backends
def test_pitfall_i_loss_scale(backend: str) -> None:
    """Squares are divided by scale**2 in the step that the scaler calls."""
    x = randn(4, 4, dtype=torch.float32)
    results = []
    for enabled in (False, True):
        model = mlp(torch.float32)
        statistics = PerSampleSquares(model, backend=backend)
        optimizer = adam_without_decay(
            model.parameters(), statistics, virtual_batch_size=2, backend=backend
        )
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0, enabled=enabled)
        for _ in range(2):
            scaler.scale(squared_error()(model(x)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append([p.detach().clone() for p in model.parameters()])
    for mine, other in zip(*results, strict=True):
        assert_near(other, mine, 1e-6, "scaled")


@both_backends
def test_pitfall_i_unscaled_before_the_step(backend: str) -> None:
    """unscale_() leaves the squares scaled; they follow the gradients."""
    x = randn(4, 4, dtype=torch.float32)
    ends = []
    for enabled in (False, True):
        model = mlp(torch.float32)
        statistics = PerSampleSquares(model, backend=backend)
        optimizer = adam_without_decay(
            model.parameters(), statistics, virtual_batch_size=2, backend=backend
        )
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=64.0, enabled=enabled)
        scaler.scale(squared_error()(model(x)).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        ends.append([p.detach().clone() for p in model.parameters()])
    for mine, other in zip(*ends, strict=True):
        assert_near(other, mine, 1e-6, "unscaled")


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) enc:RuntimeWarning")
@both_backends
def test_pitfall_i_squares_overflow_first(backend: str) -> None:
    """Gradients of 1e25 are finite, their squares are not: the step must not be taken."""
    p = nn.Parameter(torch.ones(3, device=DEVICE))
    statistics = MicroBatchSquares()
    optimizer = adam_without_decay([p], statistics, backend=backend)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=4.0)
    for _ in range(2):
        scaler.scale(p.sum() * 1e25).backward()
        statistics.accumulate(optimizer)
    assert torch.isfinite(p.grad).all()
    scaler.step(optimizer)
    assert torch.equal(p.detach(), torch.ones_like(p))
    assert not optimizer.state[p] or optimizer.state[p]["step"] == 0
    scaler.update()
    optimizer.zero_grad()
    scaler.scale(p.sum()).backward()
    statistics.accumulate(optimizer)
    scaler.step(optimizer)
    assert torch.isfinite(p).all() and not torch.equal(p.detach(), torch.ones_like(p))


# j


@both_backends
def test_pitfall_j_autocast(backend: str) -> None:
    """Inputs in float32, errors in bfloat16: within bfloat16's rounding of the exact squares."""
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
    model, x = to(torch.float32, model, randn(4, 3, 6))
    expected = Expected.of(copy.deepcopy(model), [(x,)], squared_error())
    statistics = PerSampleSquares(model, backend=backend)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    squared_error()(out.float()).sum().backward()
    check_squares(statistics, model, expected, tolerance=0.06)


@both_backends
def test_pitfall_j_backward_inside_autocast(backend: str) -> None:
    """backward() under autocast may not recast: squares of bfloat16 errors stay float32."""
    model, x = to(torch.float32, nn.Sequential(nn.Linear(6, 3)), randn(4, 3, 6))
    expected = Expected.of(copy.deepcopy(model), [(x,)], squared_error())
    statistics = PerSampleSquares(model, backend=backend)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        squared_error()(model(x).float()).sum().backward()
    check_squares(statistics, model, expected, tolerance=0.06)
