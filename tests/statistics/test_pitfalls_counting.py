"""Pitfalls of per-sample squares, a to e: what is counted, and what is divided by.

The letters are the design note's. A pitfall is a mistake that somebody has made: most of
them give numbers that look right.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from marks import both_backends, each_reduction
from observed import adam_without_decay
from per_sample import (
    DEVICE,
    DTYPES,
    Expected,
    LanguageModel,
    assert_near,
    backward,
    check_squares,
    gather,
    mlp,
    randint,
    randn,
    rows_of,
    squared_error,
    to,
    token_mean,
)
from torch import Tensor, nn

from fusedopt import BackpackSquares, GradSampleSquares, MicroBatchSquares, PerSampleSquares

# a


@both_backends
def test_pitfall_a_loss_reduction(backend: str) -> None:
    """By hand: y = w x, loss y: g_i = x_i, q = (1 + 4 + 9 + 16) / 4, whatever the reduction.

    Catches rows that keep the 1/N of a mean loss (q too small by N**2), and a factor N for N**2.
    """
    x = torch.tensor([[1.0], [2.0], [-3.0], [4.0]], device=DEVICE, dtype=DTYPES[backend])
    for reduction in ("mean", "sum"):
        model = nn.Linear(1, 1, bias=False).to(x)
        statistics = PerSampleSquares(model, reduction, backend=backend)
        getattr(model(x), reduction)().backward()
        assert statistics.samples == 4
        assert statistics.mean_square(model.weight).item() == pytest.approx(7.5, rel=1e-6)


@pytest.mark.parametrize("parts", [1, 2, 3])
@each_reduction
def test_pitfall_a_accumulated_and_scaled(reduction: str, parts: int) -> None:
    """loss / K over K micro-batches is the mean over the whole batch, and has its squares."""
    (model,) = to(torch.float64, mlp())
    x, targets = randn(6, 4), randn(6, 3, seed=5)
    n = 6 if reduction == "mean" else 1
    plain = copy.deepcopy(model)
    shares = (plain(x) - targets).square().sum(1) / n
    named = dict(plain.named_parameters())
    rows = dict(zip(named, rows_of(shares, list(named.values())), strict=True))
    statistics = PerSampleSquares(model, reduction)
    for part, target in zip(x.chunk(parts), targets.chunk(parts), strict=True):
        errors = (model(part) - target).square().sum(1)
        loss = errors.mean() / parts if reduction == "mean" else errors.sum()
        loss.backward()
    check_squares(statistics, model, Expected(rows, reduction))


def test_pitfall_a_unknown_reduction() -> None:
    for options in ({"loss_reduction": "none"}, {"sample": "word"}):
        with pytest.raises(ValueError):
            PerSampleSquares(mlp(), **options)
    with pytest.raises(ValueError):
        BackpackSquares(loss_reduction="none")


# b


@both_backends
@pytest.mark.parametrize("tied", [False, True])
def test_pitfall_b_ignored_and_padded_tokens(backend: str, tied: bool) -> None:
    """Mean over valid tokens; ragged sequences, one of them ignored whole; padding_idx.

    The sample is still a sequence and N still the number of sequences: dividing by the number of
    valid tokens of a sequence, or counting tokens, changes q by a factor of a sequence's length.
    """
    (model,) = to(DTYPES[backend], LanguageModel(tied=tied, padding_idx=0))
    lengths = torch.tensor([5, 2, 0, 3], device=DEVICE)
    valid = torch.arange(5, device=DEVICE) < lengths[:, None]
    ids = torch.where(valid, 1 + randint(6, 4, 5), 0)
    targets = torch.where(valid, randint(7, 4, 5, seed=8), -100)
    statistics = gather(model, ids, backend=backend, loss=token_mean(targets))
    assert statistics.samples == 4


def test_pitfall_b_cross_entropy_of_torch() -> None:
    """The loss as users write it, against rows that sum to its gradient."""
    (model,) = to(torch.float64, LanguageModel())
    ids, targets = randint(7, 3, 5), randint(7, 3, 5, seed=8)
    targets[0, 2:] = -100
    plain = copy.deepcopy(model)
    expected = Expected.of(plain, [(ids,)], token_mean(targets))
    statistics = PerSampleSquares(model)
    logits = model(ids)
    nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    check_squares(statistics, model, expected)


# c


@both_backends
def test_pitfall_c_ragged_last_batch(backend: str) -> None:
    """4, 4 and 2 samples: each step divides by its own count, an accumulated one by the sum."""
    (model,) = to(DTYPES[backend], mlp())
    batches = [(randn(n, 4, dtype=DTYPES[backend], seed=n + i),) for i, n in enumerate((4, 4, 2))]
    statistics = PerSampleSquares(model, backend=backend)
    for batch in batches:
        model.zero_grad()
        statistics.reset()
        expected = Expected.of(copy.deepcopy(model), [batch], squared_error())
        backward(model, [batch], squared_error())
        check_squares(statistics, model, expected)
        assert statistics.samples == len(batch[0])


def test_pitfall_c_ragged_list_of_samples() -> None:
    """p.grad_sample as a list, the last one shorter: no zero row may be counted."""
    p = nn.Parameter(randn(3))
    samples = randn(6, 3, seed=1)
    whole, ragged = GradSampleSquares(), GradSampleSquares()
    results = []
    for statistics, value in ((whole, samples), (ragged, [samples[:4], samples[4:]])):
        q = nn.Parameter(p.detach().clone())
        q.grad_sample = value
        optimizer = adam_without_decay([q], statistics)
        optimizer.step()
        results.append((q.detach(), statistics.samples))
    assert results[0][1] == results[1][1] == 6
    assert_near(results[1][0], results[0][0], 1e-12, "list")


# d


@both_backends
@pytest.mark.parametrize("time", [2, 3, 5])
def test_pitfall_d_time_first(backend: str, time: int) -> None:
    """[T, B, D]: as the same samples in [B, T, D], also where T equals B = 3."""
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
    model, x = to(DTYPES[backend], model, randn(3, time, 4))
    first = gather(copy.deepcopy(model), x, backend=backend)
    expected = Expected.of(copy.deepcopy(model), [(x,)], squared_error())
    statistics = PerSampleSquares(model, batch_first=False, backend=backend)
    out = model(x.transpose(0, 1).contiguous())
    squared_error()(out.transpose(0, 1)).sum().backward()
    check_squares(statistics, model, expected)
    assert first.samples == statistics.samples == 3


# e


@both_backends
@pytest.mark.parametrize("make", [mlp, lambda dtype: to(dtype, LanguageModel(tied=True))[0]])
def test_pitfall_e_accumulation(make: Any, backend: str) -> None:
    """Three backward passes: squares and counts add. Catches overwriting (the last pass alone)

    and squaring the accumulated gradient (which has cross terms between the passes).
    """
    model = make(DTYPES[backend])
    if isinstance(model, LanguageModel):
        batches = [(randint(7, n, 4, seed=n),) for n in (3, 2, 1)]
    else:
        batches = [(randn(n, 4, dtype=DTYPES[backend], seed=n),) for n in (3, 2, 1)]

    def loss(out: Tensor) -> Tensor:
        return squared_error("sum")(out) / 6

    statistics = gather(model, batches=batches, loss=loss, backend=backend)
    assert statistics.samples == 6


def test_pitfall_e_micro_batches() -> None:
    """p.grad is a running sum: the micro-batch's own gradient is squared, not that sum."""
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64, device=DEVICE))
    gradients = randn(4, 3)
    statistics = MicroBatchSquares()
    optimizer = adam_without_decay([p], statistics, virtual_batch_size=1)
    for g in gradients:
        (p * g).sum().div(4).backward()
        statistics.accumulate(optimizer)
    assert statistics.samples == 4
    assert_near(statistics.mean_square(p), gradients.square().mean(0), 1e-12, "micro-batches")
