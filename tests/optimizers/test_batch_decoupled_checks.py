"""What the batch-decoupled optimizers and their sources refuse, before anything moves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from decoupled_by_hand import ADAM, ByHand
from per_sample import DEVICE, assert_near, randn
from torch.nn import Parameter

from fusedopt import (
    BackpackSquares,
    BatchDecoupledAdam,
    BatchDecoupledRMSprop,
    GradSampleSquares,
    MicroBatchSquares,
)


@pytest.mark.parametrize("make", [BatchDecoupledAdam, BatchDecoupledRMSprop])
@pytest.mark.parametrize("b", [0, -1, 0.5, float("nan"), 0.999])
def test_bad_virtual_batch_size(make: Any, b: float) -> None:
    p = Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="virtual_batch_size"):
        make([p], statistics=GradSampleSquares(), virtual_batch_size=b)


@pytest.mark.parametrize("make", [BatchDecoupledAdam, BatchDecoupledRMSprop])
def test_statistics_are_needed(make: Any) -> None:
    p = Parameter(torch.ones(2))
    with pytest.raises(TypeError, match="statistics"):
        make([p], statistics=None)
    with pytest.raises(TypeError):
        make([p])
    with pytest.raises(TypeError):
        make([p], statistics=object())


@pytest.mark.parametrize("make", [BatchDecoupledAdam, BatchDecoupledRMSprop])
def test_bad_hyper_parameters_are_torchs_errors(make: Any) -> None:
    for options in ({"lr": -1.0}, {"eps": -1.0}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError):
            make([Parameter(torch.ones(2))], statistics=GradSampleSquares(), **options)


@pytest.mark.parametrize(
    ("make", "name"), [(BatchDecoupledAdam, "AdamW"), (BatchDecoupledRMSprop, "RMSprop")]
)
def test_groups_and_states_are_torchs(make: Any, name: str) -> None:
    """Drop-in: the keys of torch's class, and virtual_batch_size."""
    p, q = Parameter(torch.ones(2, device=DEVICE)), Parameter(torch.ones(2, device=DEVICE))
    ours = make([p], statistics=GradSampleSquares())
    theirs = getattr(torch.optim, name)([q])
    missing = set(theirs.param_groups[0]) - set(ours.param_groups[0])
    assert not missing
    assert ours.param_groups[0]["virtual_batch_size"] == 1
    for key, value in theirs.param_groups[0].items():
        if key not in ("params", "foreach", "fused"):
            assert ours.param_groups[0][key] == value, key
    p.grad_sample, q.grad = torch.ones(3, 2, device=DEVICE), torch.ones(2, device=DEVICE)
    ours.step()
    theirs.step()
    assert set(ours.state[p]) == set(theirs.state[q])


def _refused(optimizer: Any, match: str, kind: Any = RuntimeError) -> None:
    params = [p for g in optimizer.param_groups for p in g["params"]]
    before = [p.detach().clone() for p in params]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(kind, match=match):
        optimizer.step()
    for p, b in zip(params, before, strict=True):
        assert torch.equal(p.detach(), b)
    after = optimizer.state_dict()["state"]
    assert set(after) == set(state)
    for key in state:
        for name, value in state[key].items():
            assert torch.equal(torch.as_tensor(after[key][name]), torch.as_tensor(value))


errors = (RuntimeError, ValueError, TypeError)


@pytest.mark.parametrize("warm", [False, True])
def test_grad_sample_counts_must_match(warm: bool) -> None:
    """4 samples of one parameter and 3 of another: refused before anything moves."""
    p, q = Parameter(randn(3, seed=1)), Parameter(randn(2, seed=2))
    optimizer = BatchDecoupledAdam([p, q], statistics=GradSampleSquares())
    if warm:
        p.grad_sample, q.grad_sample = randn(4, 3), randn(4, 2)
        optimizer.step()
    p.grad_sample, q.grad_sample = randn(4, 3), randn(3, 2)
    _refused(optimizer, "4.*3|3.*4", errors)


def test_grad_sample_of_another_shape() -> None:
    p = Parameter(randn(3, seed=1))
    optimizer = BatchDecoupledAdam([p], statistics=GradSampleSquares())
    p.grad_sample = randn(4, 2)
    _refused(optimizer, "shape|\\(3", errors)
    p.grad_sample = [randn(4, 3), randn(2, 2)]
    _refused(optimizer, "shape|\\(3", errors)


def test_grad_sample_missing() -> None:
    """A parameter with .grad and without .grad_sample was forgotten; one with neither is idle."""
    p, q = Parameter(randn(3, seed=1)), Parameter(randn(2, seed=2))
    optimizer = BatchDecoupledAdam([p, q], statistics=GradSampleSquares())
    p.grad_sample = randn(4, 3)
    optimizer.step()
    assert not optimizer.state[q] if q in optimizer.state else True
    q.grad = torch.ones_like(q)
    p.grad_sample = randn(4, 3)
    _refused(optimizer, "grad_sample", errors)


def test_grad_sample_is_not_used_twice() -> None:
    """zero_grad() clears p.grad_sample too: an old one would be stepped again in silence."""
    p = Parameter(randn(3, seed=1))
    optimizer = BatchDecoupledAdam([p], statistics=GradSampleSquares())
    p.grad_sample = randn(4, 3)
    optimizer.step()
    optimizer.zero_grad()
    assert getattr(p, "grad_sample", None) is None
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p.detach(), before)


def test_backpack_needs_a_batch_size() -> None:
    p = Parameter(randn(3, seed=1))
    statistics = BackpackSquares()
    optimizer = BatchDecoupledAdam([p], statistics=statistics)
    p.grad, p.sum_grad_squared = randn(3), randn(3).square()
    _refused(optimizer, "batch_size")
    statistics.batch_size = 4
    optimizer.step()
    optimizer.zero_grad()
    # zero_grad() takes the squares with the gradient: old ones may not meet a new gradient.
    p.grad = randn(3)
    _refused(optimizer, "sum_grad_squared")


def test_backpack_missing_or_misshaped() -> None:
    p = Parameter(randn(3, seed=1))
    statistics = BackpackSquares(batch_size=4)
    optimizer = BatchDecoupledAdam([p], statistics=statistics)
    p.grad = randn(3)
    _refused(optimizer, "sum_grad_squared")
    p.sum_grad_squared = randn(2).square()
    _refused(optimizer, "shape|\\(3|\\(2", errors)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_backpack_over_several_backward_passes(reduction: str) -> None:
    """BackPACK overwrites at each backward: accumulate() adds squares and counts."""
    rows = randn(5, 3)
    p = Parameter(randn(3, seed=1))
    q = Parameter(p.detach().clone())
    statistics = BackpackSquares(loss_reduction=reduction)
    optimizer = BatchDecoupledAdam([p], statistics=statistics, virtual_batch_size=2, **ADAM)
    for part in (rows[:3], rows[3:]):
        p.grad = part.sum(0) if p.grad is None else p.grad + part.sum(0)
        p.sum_grad_squared = part.square().sum(0)
        statistics.batch_size = len(part)
        statistics.accumulate(optimizer)
    assert statistics.samples == 5
    optimizer.step()
    hand = ByHand([q], 2, **ADAM)
    hand.adam([rows * 5 if reduction == "mean" else rows])
    assert_near(p, hand.params[0], 1e-12, "p")


def test_micro_batches_without_accumulate() -> None:
    p = Parameter(randn(3, seed=1))
    optimizer = BatchDecoupledAdam([p], statistics=MicroBatchSquares())
    p.grad = randn(3)
    _refused(optimizer, "accumulate")


def test_micro_batches_with_a_backward_after_the_last_accumulate() -> None:
    """A gradient that grew since belongs to no micro-batch: refused."""
    p = Parameter(randn(3, seed=1))
    statistics = MicroBatchSquares()
    optimizer = BatchDecoupledAdam([p], statistics=statistics, backend="reference")
    (p * randn(3)).sum().backward()
    statistics.accumulate(optimizer)
    (p * randn(3, seed=8)).sum().backward()
    _refused(optimizer, "accumulate")


def test_micro_batches_forget_on_zero_grad() -> None:
    p = Parameter(randn(3, seed=1))
    statistics = MicroBatchSquares()
    optimizer = BatchDecoupledAdam([p], statistics=statistics, backend="reference")
    for keep in (True, False, True):
        for _ in range(2):
            (p * randn(3)).sum().backward()
            statistics.accumulate(optimizer)
        assert statistics.samples == 2
        # Two equal micro-batches, each of which contributes g to the sum.
        assert_near(statistics.mean_square(p), (2 * randn(3)).square(), 1e-12, "q")
        optimizer.step()
        optimizer.zero_grad(set_to_none=not keep)
        assert statistics.samples == 0


def test_micro_batches_with_a_new_gradient_tensor_each_time() -> None:
    """p.grad = p.grad + g, as autograd itself accumulates under create_graph=True."""
    p = Parameter(randn(3, seed=1))
    gradients = randn(4, 3)
    statistics = MicroBatchSquares()
    optimizer = BatchDecoupledAdam([p], statistics=statistics, backend="reference")
    for g in gradients:
        p.grad = g / 4 if p.grad is None else p.grad + g / 4
        statistics.accumulate(optimizer)
    assert statistics.samples == 4
    assert_near(statistics.mean_square(p), gradients.square().mean(0), 1e-12, "q")


def test_micro_batches_over_hand_cleared_gradients() -> None:
    """p.grad = None between steps starts anew, as with PerSampleSquares."""
    p = Parameter(randn(3, seed=1))
    statistics = MicroBatchSquares()
    optimizer = BatchDecoupledAdam([p], statistics=statistics, backend="reference")
    for seed in range(3):
        gradients = randn(2, 3, seed=seed)
        for g in gradients:
            (p * g / 2).sum().backward()
            statistics.accumulate(optimizer)
        assert statistics.samples == 2
        assert_near(statistics.mean_square(p), gradients.square().mean(0), 1e-12, "q")
        optimizer.step()
        p.grad = None
