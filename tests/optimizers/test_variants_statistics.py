"""Batch-decoupled second moments (row 000-h) under the optional forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract import assert_same_bits
from marks import both_backends
from torch import Tensor
from variants_by_hand import Beside, eighths

import fusedopt
from fusedopt import GradSampleSquares, MicroBatchSquares

ADAM: dict[str, Any] = {"lr": 0.1, "betas": (0.6, 0.75), "eps": 0.125, "weight_decay": 0.125}
RMSPROP: dict[str, Any] = {"lr": 0.03, "alpha": 0.75, "eps": 0.25, "weight_decay": 0.125}
SETS: dict[str, list[dict[str, Any]]] = {
    "BatchDecoupledAdam": [
        {**ADAM, "bias_correction": "running_mean"},
        {**ADAM, "bias_correction": "running_mean", "amsgrad": True, "maximize": True},
        {**ADAM, "bias_correction": None},
        {**ADAM, "bias_correction": None, "amsgrad": True},
        ADAM,
    ],
    "BatchDecoupledRMSprop": [
        {**RMSPROP, "bias_correction": True},
        {**RMSPROP, "denominator": "variance"},
        {**RMSPROP, "denominator": "variance", "centered": True, "momentum": 0.5},
        {**RMSPROP, "denominator": "variance", "bias_correction": True, "maximize": True},
        RMSPROP,
    ],
}
each_class = pytest.mark.parametrize("name", SETS)


def _samples(run: Beside, n: int, seed: int) -> list[Tensor]:
    """``[n, *p]`` for every parameter: eighths, so that a mean over a power of two is exact."""
    return [eighths((n, *p.shape), p.dtype, 50 * seed + i) for i, p in enumerate(run.params)]


def _loops_step(run: Beside, samples: list[Tensor], b: float) -> None:
    """u = (1 - w) d^2 + w mean(g_i^2), with w = (n - b) / (b (n - 1)): a mean over subsets."""
    for loop, g in zip(run.loops, samples, strict=True):
        g = g.cpu().double()
        n = len(g)
        w = (n - b) / (b * (n - 1)) if b < n else 0.0
        q = g.square().mean(0)
        loop.step(g.mean(0), lambda d, w=w, q=q: (1 - w) * d.square() + w * q)


@pytest.mark.parametrize(
    ("b", "dtype"),
    [(1, torch.float64), (3, torch.float64), (3, torch.float32)],
    ids=["1-float64", "3-float64", "3-float32"],
)
@each_class
@both_backends
def test_grad_samples(backend: str, name: str, b: int, dtype: torch.dtype) -> None:
    # Catches a form that is left out of the decoupled rule, the squared mean gradient in the place
    # of u, and a step count that starts elsewhere.
    run = Beside(
        name, SETS[name], statistics=GradSampleSquares(), virtual_batch_size=b, backend=backend,
        dtype=dtype, shape=(3,),
    )  # fmt: skip
    for step in range(4):
        samples = _samples(run, 4, step)
        for p, g in zip(run.params, samples, strict=True):
            p.grad_sample = g
        run.optimizer.step()
        _loops_step(run, samples, b)
        run.check()


@each_class
@both_backends
def test_micro_batches(backend: str, name: str) -> None:
    # Catches a form that the gathered squares do not reach.
    statistics = MicroBatchSquares()
    run = Beside(
        name, SETS[name], statistics=statistics, virtual_batch_size=1, backend=backend, shape=(3,)
    )
    for step in range(4):
        samples = _samples(run, 4, step)
        for i in range(4):
            for p, g in zip(run.params, samples, strict=True):
                (p * g[i] / 4).sum().backward()
            statistics.accumulate(run.optimizer)
        run.optimizer.step()
        run.optimizer.zero_grad()
        _loops_step(run, samples, 1)
    run.check()


PLAIN = {"BatchDecoupledAdam": "AdamW", "BatchDecoupledRMSprop": "RMSprop"}


@each_class
@both_backends
def test_whole_batch_is_the_plain_class(backend: str, name: str) -> None:
    # Catches a form that differs between the plain and the decoupled rule.
    n = 4
    sets = SETS[name]
    ours = Beside(name, sets, statistics=GradSampleSquares(), virtual_batch_size=n, backend=backend)
    plain = Beside(PLAIN[name], sets, backend=backend)
    for step in range(4):
        samples = _samples(ours, n, step)
        for p, q, g in zip(ours.params, plain.params, samples, strict=True):
            p.grad_sample = g
            q.grad = g.mean(0)
        ours.optimizer.step()
        plain.optimizer.step()
    for p, q in zip(ours.params, plain.params, strict=True):
        assert_same_bits(p.detach(), q.detach())
        assert_same_bits(dict(ours.optimizer.state[p]), dict(plain.optimizer.state[q]))


@both_backends
def test_running_mean_of_squares_is_over_all_samples(backend: str) -> None:
    # Rows 000-f and 000-h together: before the horizon the second moment is the mean over every
    # sample of every batch. Catches weights by step that are not 1 / t.
    p = torch.nn.Parameter(eighths((3,), torch.float64, 1))
    optimizer = fusedopt.BatchDecoupledAdam(
        [p], statistics=GradSampleSquares(), virtual_batch_size=1, bias_correction="running_mean",
        backend=backend,
    )  # fmt: skip
    seen = []
    for step in range(5):
        p.grad_sample = eighths((4, 3), torch.float64, step)
        seen.append(p.grad_sample.cpu())
        optimizer.step()
        state = optimizer.state[p]
        every = torch.cat(seen)
        torch.testing.assert_close(state["exp_avg"].cpu(), every.mean(0), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(
            state["exp_avg_sq"].cpu(), every.square().mean(0), rtol=1e-13, atol=0
        )


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
@each_class
@both_backends
def test_with_clipping(backend: str, name: str, capturable: bool) -> None:
    # Catches a coefficient of a form that the live path does not have.
    clip = fusedopt.GlobalNorm(1e6)
    run = Beside(
        name, SETS[name][:3], statistics=GradSampleSquares(), virtual_batch_size=2,
        backend=backend, clip=clip, capturable=capturable, shape=(3,),
    )  # fmt: skip
    for step in range(3):
        samples = _samples(run, 4, step)
        for p, g in zip(run.params, samples, strict=True):
            p.grad_sample = g
        run.optimizer.step()
        _loops_step(run, samples, 2)
    run.check()
