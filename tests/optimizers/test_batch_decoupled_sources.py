"""The batch-decoupled optimizers over each source of squares: all go one way."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from decoupled_by_hand import ADAM, SOURCES, ByHand, Source, each_source, target_alone, train
from marks import both_backends, each_reduction, numpy_may_warn
from per_sample import DEVICE, Expected, assert_near, backward, mlp, randn, squared_error
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

from fusedopt import (
    BatchDecoupledAdam,
    BatchDecoupledRMSprop,
    GlobalNorm,
    GradSampleSquares,
    PerSampleSquares,
)

# Sources against each other


@each_reduction
@both_backends
@pytest.mark.parametrize("b", [1, 2, 3])
@pytest.mark.parametrize("make", [BatchDecoupledAdam, BatchDecoupledRMSprop])
def test_sources_agree(make: Any, b: int, backend: str, reduction: str) -> None:
    """Four ways to one statistic, a ragged last batch, mean and sum losses: one trajectory."""
    runs = {}
    for name in SOURCES:
        if name == "micro-batches" and reduction == "sum":
            continue  # its rows are contributions to a mean
        if backend == "triton" and name in ("micro-batches", "backpack") and b != 2:
            continue  # the interpreter is slow
        options = {"backend": backend, "reduction": reduction, "virtual_batch_size": b}
        runs[name] = train(name, make, **options)[0]
    expected = train("model", make, virtual_batch_size=b)[0]
    start = mlp()
    for name, model in runs.items():
        for key, p in expected.named_parameters():
            actual = dict(model.named_parameters())[key]
            tolerance = {"reference": 1e-10, "triton": 2e-4}[backend]
            assert_near(actual, p, tolerance, f"{name}: {key}")
            assert not torch.allclose(p.detach(), dict(start.named_parameters())[key].detach())


@each_source
@both_backends
def test_clip(source: str, backend: str) -> None:
    """The norm of the mean gradient decides, for mean and sum losses alike; at b = N it is

    clip_grad_norm_ and AdamW.
    """
    for reduction in ("mean", "sum"):
        if source == "micro-batches" and reduction == "sum":
            continue
        clips = GlobalNorm(0.05), GlobalNorm(1e6)
        for b in (1, 3):
            for clip in clips:
                model, optimizer, _ = train(
                    source,
                    batches=(3, 3),
                    backend=backend,
                    reduction=reduction,
                    clip=clip,
                    virtual_batch_size=b,
                )
                expected, norm = _clipped_by_hand(b, clip.max_norm)
                assert clip.last.item() == pytest.approx(norm, rel=1e-4)
                assert (norm > 0.05) or clip.max_norm > 1
                for p, q in zip(model.parameters(), expected, strict=True):
                    tolerance = {"reference": 1e-6, "triton": 2e-4}[backend]
                    assert_near(p, q, tolerance, f"{reduction}, b = {b}, {clip.max_norm}")


def _clipped_by_hand(b: int, max_norm: float) -> tuple[list[Tensor], float]:
    """Two steps in float64 over the same batches."""
    model = mlp()
    params = list(model.parameters())
    hand = ByHand(params, b, **ADAM)
    norm = 0.0
    part = Source(model)
    for seed in range(2):
        rows = part.rows(randn(3, 4, seed=seed), 3)
        for p, r in zip(params, rows, strict=True):
            p.grad = r.sum(0)
        norm = clip_grad_norm_(params, 1e30).item()
        c = min(1.0, max_norm / (norm + 1e-6))
        hand.adam([3 * r * c for r in rows])
        for p, q in zip(params, hand.params, strict=True):
            p.data.copy_(q)
    return hand.params, norm


@both_backends
@pytest.mark.parametrize("source", ["model", "backpack", "micro-batches", "grad-sample"])
def test_loss_scale(source: str, backend: str) -> None:
    """Everything scaled by 2**k, another k each step, and unscaled in it: the plain trajectory."""
    x = [randn(3, 4, dtype=torch.float32, seed=s) for s in range(3)]
    results: dict[str, list[Tensor]] = {}
    for mode in ("plain", "scaled"):
        model = mlp(torch.float32)
        part = SOURCES[source](model, backend, "mean")
        part.optimizer = BatchDecoupledAdam(
            model.parameters(),
            statistics=part.statistics,
            virtual_batch_size=2,
            backend=backend,
            clip=GlobalNorm(0.5),
            **ADAM,
        )
        scaler = torch.amp.GradScaler(
            DEVICE.type, init_scale=256.0, growth_interval=1, enabled=mode != "plain"
        )
        plain_loss = part.loss
        part.loss = lambda out, n, f=plain_loss, s=scaler: s.scale(f(out, n))
        for batch in x:
            part.backward(batch)
            if source == "grad-sample":
                for p in model.parameters():  # the scaler looks for overflows in .grad
                    p.grad = p.grad_sample.mean(0)
            scaler.step(part.optimizer)
            scaler.update()
            part.optimizer.zero_grad()
        results[mode] = [p.detach().clone() for p in model.parameters()]
    for a, b in zip(results["scaled"], results["plain"], strict=True):
        assert_near(a, b, 1e-5, "scaled")


@numpy_may_warn
@both_backends
def test_overflow_skips_the_step(backend: str) -> None:
    """An inf in a gradient: nothing moves, the step count neither, and the next step is whole."""
    model = mlp(torch.float32)
    statistics = PerSampleSquares(model, backend=backend)
    optimizer = BatchDecoupledAdam(
        model.parameters(), statistics=statistics, backend=backend, **ADAM
    )
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=4.0)
    before = [p.detach().clone() for p in model.parameters()]
    x = randn(3, 4, dtype=torch.float32)
    loss = model(x).square().sum(1).mean()
    scaler.scale(loss * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    for p, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.detach(), b)
    assert scaler.get_scale() == 2.0
    scaler.scale(squared_error()(model(x)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    twin = mlp(torch.float32)
    other = BatchDecoupledAdam(
        twin.parameters(),
        statistics=PerSampleSquares(twin, backend=backend),
        backend=backend,
        **ADAM,
    )
    backward(twin, [(x,)], squared_error())
    other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_near(p, q, 1e-5, "after the overflow")
        assert optimizer.state[p]["step"] == 1


@both_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_parameters(dtype: torch.dtype, backend: str) -> None:
    """Rounded once on storing: within an ulp or two of the definition from the same state."""
    samples = randn(4, 7).to(dtype)
    p = Parameter(randn(7, seed=1).to(dtype))
    hand = ByHand([p], 2, **ADAM)
    optimizer = BatchDecoupledAdam(
        [p], statistics=GradSampleSquares(), virtual_batch_size=2, backend=backend, **ADAM
    )
    p.grad_sample = samples
    optimizer.step()
    hand.adam([samples])
    assert p.dtype == dtype
    assert_near(p, hand.params[0], 2 * torch.finfo(dtype).eps, "p")
    assert_near(optimizer.state[p]["exp_avg_sq"], hand.state[0]["v"], 0.01, "exp_avg_sq")


@both_backends
def test_mixed_precision_model(backend: str) -> None:
    """A bfloat16 body with float32 norms, squares of both, in one optimizer."""
    torch.manual_seed(0)
    body, head = nn.Linear(4, 6).to(DEVICE, torch.bfloat16), nn.Linear(6, 3).to(DEVICE)

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = body, head

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(x)).float())

    model = Mixed()
    wide = copy.deepcopy(model)
    wide.body.float()
    x = randn(4, 4, dtype=torch.bfloat16)
    expected = Expected.of(nn.Sequential(_Widen(wide)), [(x,)], squared_error())
    optimizer = BatchDecoupledAdam(
        model.parameters(),
        statistics=PerSampleSquares(model, backend=backend),
        virtual_batch_size=1,
        backend=backend,
        **ADAM,
    )
    squared_error()(model(x)).sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        q = expected.mean_square(f"0.wide.{name}")
        assert_near(optimizer.state[p]["exp_avg_sq"], 0.2 * q, 0.05, name)


class _Widen(nn.Module):
    def __init__(self, wide: Any) -> None:
        super().__init__()
        self.wide = wide

    def forward(self, x: Tensor) -> Tensor:
        return self.wide.head(torch.tanh(self.wide.body(x.float())))


# Batches


@each_source
def test_ragged_batches(source: str) -> None:
    """w is formed of each step's own count: N = 5, 2, 4 at b = 2 is w = 3/8, 0, 1/3."""
    model = mlp()
    hand = ByHand(list(model.parameters()), 2, **ADAM)
    part = SOURCES[source](model)
    part.optimizer = BatchDecoupledAdam(
        model.parameters(), statistics=part.statistics, virtual_batch_size=2, **ADAM
    )
    for seed, n in enumerate((5, 2, 4)):
        x = randn(n, 4, seed=seed)
        # Of a copy: the rows' own backward passes are not for the statistics.
        rows = Source(copy.deepcopy(model)).rows(x, n)
        part.backward(x)
        assert part.statistics.samples == n or source in ("grad-sample", "backpack")
        part.optimizer.step()
        part.optimizer.zero_grad()
        hand.adam([n * r for r in rows])
        for p, q in zip(model.parameters(), hand.params, strict=True):
            assert_near(p, q, 1e-10, f"step {seed}")


@each_source
@pytest.mark.parametrize("b", [1, 4])
def test_one_sample(source: str, b: int) -> None:
    """N = 1: N - 1 is zero; the square of the mean is the mean of the square."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model, _, _ = train(source, batches=(1, 1), virtual_batch_size=b)
    plain = mlp()
    torch_adam = torch.optim.AdamW(plain.parameters(), **ADAM)
    for seed in range(2):
        rows = Source(plain).rows(randn(1, 4, seed=seed), 1)
        for p, r in zip(plain.parameters(), rows, strict=True):
            p.grad = r[0]
        torch_adam.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert_near(p, q, 1e-11, "one sample")


@each_source
def test_virtual_batch_above_the_batch_warns_once(source: str) -> None:
    """Less noise than the batch has cannot be had: w = 0, said once and not every step."""
    with pytest.warns(UserWarning, match="virtual_batch_size") as caught:
        model, _, _ = train(source, batches=(3, 3, 3), virtual_batch_size=8)
    assert len([w for w in caught if "virtual_batch_size" in str(w.message)]) == 1
    same, _, _ = train(source, batches=(3, 3, 3), virtual_batch_size=3)
    for p, q in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(p.detach(), q.detach())


def test_trajectory_does_not_depend_on_how_a_batch_is_split() -> None:
    """Accumulation over 1, 2 or 4 passes."""
    ends = []
    for parts in (1, 2, 4):
        model = mlp()
        optimizer = BatchDecoupledAdam(
            model.parameters(), statistics=PerSampleSquares(model), virtual_batch_size=2, **ADAM
        )
        for seed in range(3):
            for part in randn(4, 4, seed=seed).chunk(parts):
                ((model(part) - target_alone(model(part))).square().sum() / 4).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([p.detach().clone() for p in model.parameters()])
    for other in ends[1:]:
        for a, b in zip(ends[0], other, strict=True):
            assert_near(b, a, 1e-11, "split")
