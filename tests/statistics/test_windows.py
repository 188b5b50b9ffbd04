"""Which gradient squares belong to: clearing, several optimizers, and what autograd adds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusedopt import (
    BackpackSquares,
    BatchDecoupledAdam,
    GradSampleSquares,
    MicroBatchSquares,
    PerSampleSquares,
)
from fusedopt.statistics.grad_version import GradVersion
from fusedopt.statistics.per_sample import autograd


def _model(device: torch.device) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(device, torch.float64)


def _batch(device: torch.device, count: int = 5) -> Tensor:
    return torch.randn(count, 4, device=device, dtype=torch.float64)


def _backward(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()


def test_two_optimizers_clear_their_own(device: torch.device) -> None:
    # Catches a zero_grad that wipes squares whose gradients another optimizer still gathers.
    model = _model(device)
    statistics = PerSampleSquares(model)
    body = BatchDecoupledAdam(model[0].parameters(), lr=0.0, statistics=statistics)
    head = BatchDecoupledAdam(model[2].parameters(), lr=0.0, statistics=statistics)
    batches = [_batch(device) for _ in range(3)]
    for x in batches:
        _backward(model, x)
        body.step()
        body.zero_grad()
    assert statistics.count(list(model[2].parameters())) == 15
    got = statistics.mean_square(model[2].weight)
    head.step()
    alone = _model(device)
    alone.load_state_dict(model.state_dict())
    expected = PerSampleSquares(alone)
    for x in batches:
        _backward(alone, x)
    torch.testing.assert_close(got, expected.mean_square(alone[2].weight))
    head.zero_grad()
    _backward(model, batches[0])
    assert statistics.samples == 5


def test_parameters_cleared_at_different_times(device: torch.device) -> None:
    # Catches one N for parameters that have seen different numbers of samples.
    model = _model(device)
    statistics = PerSampleSquares(model)
    optimizer = BatchDecoupledAdam(model.parameters(), statistics=statistics)
    _backward(model, _batch(device))
    for p in model[0].parameters():
        p.grad = None
    _backward(model, _batch(device))
    with pytest.raises(RuntimeError, match="has seen 5 samples|has seen 10 samples"):
        optimizer.step()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_models_zero_grad_without_a_step(set_to_none: bool, device: torch.device) -> None:
    # Catches N that grows where nobody but the model clears gradients, as with another optimizer.
    model = _model(device)
    statistics = PerSampleSquares(model)
    for _ in range(3):
        model.zero_grad(set_to_none=set_to_none)
        _backward(model, _batch(device))
        assert statistics.samples == 5


def test_autograd_grad_adds_nothing(device: torch.device) -> None:
    # Catches squares of gradients that were handed to the caller and not added to p.grad.
    model = _model(device)
    statistics = PerSampleSquares(model)
    optimizer = BatchDecoupledAdam(model.parameters(), statistics=statistics)
    _backward(model, _batch(device))
    before = [statistics.mean_square(p) for p in model.parameters()]
    torch.autograd.grad(model(_batch(device)).sum(), list(model.parameters()))
    with statistics.paused():
        torch.autograd.grad(model(_batch(device)).sum(), list(model.parameters()))
    assert statistics.samples == 5
    for p, expected in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(statistics.mean_square(p), expected)
    optimizer.step()


def test_an_exception_in_backward(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    # Catches samples that count although their gradients never arrived.

    model = _model(device)
    statistics = PerSampleSquares(model)
    with monkeypatch.context() as patch:
        patch.setattr(autograd, "reduce_uses", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _backward(model, _batch(device))
    model.zero_grad()
    _backward(model, _batch(device))
    assert statistics.samples == 5


def test_micro_batches_of_two_optimizers(device: torch.device) -> None:
    # Catches a count of calls where there should be one of micro-batches.
    model = _model(device)
    statistics = MicroBatchSquares()
    halves = [
        BatchDecoupledAdam(model[i].parameters(), statistics=statistics) for i in (0, 2)
    ]  # fmt: skip
    for _ in range(4):
        _backward(model, _batch(device))
        for half in halves:
            statistics.accumulate(half)
    assert statistics.samples == 4
    halves[0].step()
    halves[0].zero_grad()
    assert statistics.count(list(model[2].parameters())) == 4
    halves[1].step()


def test_micro_batches_and_autograd_grad(device: torch.device) -> None:
    # Catches a sum that is moved aside for an addition that never comes.
    model = _model(device)
    statistics = MicroBatchSquares()
    optimizer = BatchDecoupledAdam(model.parameters(), statistics=statistics)
    for _ in range(2):
        _backward(model, _batch(device))
        statistics.accumulate(optimizer)
    gradients = [p.grad for p in model.parameters()]
    torch.autograd.grad(model(_batch(device)).sum(), list(model.parameters()))
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    optimizer.step()


def test_a_version_outlives_its_gradient(device: torch.device) -> None:
    # Catches an id for an identity: a gradient may be given that of one that was freed.
    reused = 0
    for _ in range(100):
        gradient = torch.zeros(3, device=device)
        identity, version = id(gradient), GradVersion(gradient)
        assert version.holds(gradient)
        del gradient
        other = torch.zeros(3, device=device)
        reused += id(other) == identity
        assert not version.holds(other)
        assert not version.is_same_tensor(other)
    assert reused, "no id was reused: this run has tested nothing"


def test_backpack_sums_without_the_optimizers_zero_grad(device: torch.device) -> None:
    # Catches squares of earlier steps in a batch whose gradients the model has cleared.
    p = nn.Parameter(torch.ones(3, device=device))
    statistics = BackpackSquares(batch_size=2)
    optimizer = BatchDecoupledAdam([p], statistics=statistics)
    for _ in range(3):
        p.grad = None
        for _ in range(2):
            (p.sum() / 2).backward()
            p.sum_grad_squared: Any = torch.full((3,), 0.5, device=device)
            statistics.accumulate(optimizer)
        assert statistics.samples == 4
        torch.testing.assert_close(statistics.mean_square(p), torch.full_like(p, 4.0))
        optimizer.step()


def test_checkpoints_of_two_calls_with_other_batch_sizes(device: torch.device) -> None:
    # Catches the replay of one call that is held against the batch size of another.
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = _model(device)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=False)

    model = Model()
    statistics = PerSampleSquares(model)
    x, y = _batch(device, 5), _batch(device, 3)
    (model(x).square().sum() + model(y).square().sum()).backward()
    assert statistics.samples == 8
    got = [statistics.mean_square(p) for p in model.parameters()]
    model.zero_grad()
    model(torch.cat([x, y])).square().sum().backward()
    for p, square in zip(model.parameters(), got, strict=True):
        torch.testing.assert_close(square, statistics.mean_square(p))


def test_an_empty_batch(device: torch.device) -> None:
    # Catches a division by the number of samples.
    model = _model(device)
    statistics = PerSampleSquares(model)
    optimizer = BatchDecoupledAdam(model.parameters(), statistics=statistics)
    model(_batch(device, 0)).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="no samples"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_noise_scale_makes_the_checks_of_a_step(device: torch.device) -> None:
    # Catches an estimate from gradients and squares that do not belong together.
    model = _model(device)
    statistics = PerSampleSquares(model)
    _backward(model, _batch(device))
    statistics.noise_scale()
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    with pytest.raises(RuntimeError, match="was changed between backward"):
        statistics.noise_scale()


def test_a_group_added_between_steps(device: torch.device) -> None:
    # Catches factors kept for the groups of an earlier step.
    model = _model(device)
    statistics = PerSampleSquares(model)
    optimizer = BatchDecoupledAdam(
        model[0].parameters(), statistics=statistics, capturable=True, virtual_batch_size=2
    )
    _backward(model, _batch(device))
    optimizer.step()
    optimizer.add_param_group({"params": list(model[2].parameters())})
    optimizer.push_hyperparameters()
    optimizer.zero_grad()
    _backward(model, _batch(device))
    optimizer.step()


def test_samples_forgotten_altogether(device: torch.device) -> None:
    # Catches a step that does nothing because no parameter has what it reads.
    model = _model(device)
    optimizer = BatchDecoupledAdam(model.parameters(), statistics=GradSampleSquares())
    optimizer.step()
    _backward(model, _batch(device))
    with pytest.raises(RuntimeError, match="no grad_sample"):
        optimizer.step()


@pytest.mark.parametrize("bounds", [[2, 5, 12], [0, 7, 5, 12], [0, 5, 40], [0, 5, 9]])
def test_segments_that_do_not_cover_the_tokens(bounds: list[int], device: torch.device) -> None:
    # Catches bounds that leave tokens out or count them twice.
    if device.type != "cpu":
        pytest.skip("the host does not wait for bounds on a GPU")
    model = _model(device)
    statistics = PerSampleSquares(model)
    with pytest.raises((ValueError, RuntimeError), match="cu_seqlens"):
        with statistics.segments(torch.tensor(bounds, device=device)):
            model(torch.randn(12, 4, device=device, dtype=torch.float64))
