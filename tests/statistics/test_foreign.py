"""Parts of a gradient that no observed layer made, and sums that are counted once too often."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fusedopt
from fusedopt import BackpackSquares, GradSampleSquares, MicroBatchSquares, PerSampleSquares
from fusedopt.statistics.per_sample import expected as expectations

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.func:UserWarning")


class Own(nn.Module):
    """A known layer, and one whose squares go through torch.func."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.p = nn.PReLU(3) if kind == "prelu" else nn.GRU(4, 4, batch_first=True)
        if kind == "norm":
            self.p = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.p(self.a(x))
        return y[0] if isinstance(y, tuple) else y

    def weight(self) -> Tensor:
        return self.p.weight if hasattr(self.p, "weight") else self.p.weight_hh_l0


def make(kind, dtype):
    torch.manual_seed(0)
    model = Own(kind).to(dtype)
    statistics = PerSampleSquares(model, backend="reference")
    optimizer = fusedopt.BatchDecoupledAdam(
        model.parameters(), statistics=statistics, backend="reference"
    )
    return model, optimizer


USES = {
    "penalty": lambda m, x: 0.3 * m.weight().square().sum(),
    "functional": lambda m, x: 0.3 * (x[..., :1] * m.weight().sum()).square().mean(),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use", [None, *USES, "hook"])
@pytest.mark.parametrize("kind", ["prelu", "gru", "norm"])
def test_a_use_outside_of_a_module_of_unknown_kind(kind, use, dtype):
    """Autograd adds it to what the module made, of which it cannot be told but by the sum."""
    model, optimizer = make(kind, dtype)
    x = torch.randn(5, 3, 4).to(dtype)
    if use == "hook":
        parameter = next(p for n, p in model.named_parameters() if n.startswith("p."))
        parameter.register_hook(lambda g: 3 * g)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss = loss + USES[use](model, x) if use in USES else loss
        loss.backward()
        if use is None:
            optimizer.step()
            continue
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(RuntimeError, match=r"'p\..* is used outside of its module"):
            optimizer.step()
        assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("penalty", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_penalty_beside_two_calls(penalty, dtype):
    """Of two contributions autograd makes a new tensor, in which a third may hide."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)
    statistics = PerSampleSquares(model, backend="reference")
    optimizer = fusedopt.BatchDecoupledAdam(
        model.parameters(), statistics=statistics, backend="reference"
    )
    loss = sum(model(torch.randn(n, 4).to(dtype)).square().mean() for n in (5, 3))
    if penalty:
        loss = loss + 0.3 * model[0].weight.square().sum()
    loss.backward()
    if not penalty:
        optimizer.step()
        return
    with pytest.raises(RuntimeError, match=r"'0\.weight' is used outside"):
        optimizer.step()


def test_an_overflow_is_no_other_use():
    """A scaler is to find it, and lower its scale."""
    model, optimizer = make("prelu", torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(torch.randn(5, 3, 4)).square().mean() * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0 and not optimizer.state


def test_an_infinite_gradient_of_finite_contributions_is_none_either():
    """The sum may be out of a narrow type's range where its parts are not."""
    total, allowed = torch.full((2,), 6e4), torch.tensor(1.0)
    expected = [expectations.Expected(total, None, allowed)]
    overflowed = torch.tensor([torch.inf, 6e4], dtype=torch.float16)
    assert not expectations.deviation(overflowed, expected)
    assert expectations.deviation(torch.tensor([5e4, 6e4], dtype=torch.float16), expected)


# What was in the gradient before.


def plain(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    statistics = PerSampleSquares(model, backend="reference")
    optimizer = fusedopt.BatchDecoupledAdam(
        model.parameters(), statistics=statistics, backend="reference"
    )
    return model, statistics, optimizer


def backward(model):
    model(torch.randn(5, 4)).square().mean().backward()


@pytest.mark.parametrize("how", ["by hand", "paused"])
def test_a_gradient_that_was_there_before(how):
    model, statistics, optimizer = plain()
    if how == "by hand":
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    else:
        with statistics.paused():
            backward(model)
    backward(model)
    cause = "had a gradient already" if how == "by hand" else "no observed layer used it"
    with pytest.raises(RuntimeError, match=cause):
        optimizer.step()
    assert not optimizer.state
    optimizer.zero_grad()
    backward(model)
    optimizer.step()


@pytest.mark.parametrize("owner", ["optimizer", "model", "hand"])
def test_a_gradient_of_zeros_was_not(owner):
    """Cleared in place, by whom ever, and before the first step as well."""
    model, _, optimizer = plain()
    for _ in range(3):
        if owner == "hand":
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
        else:
            clear = optimizer.zero_grad if owner == "optimizer" else model.zero_grad
            clear(set_to_none=False)
        backward(model)
        optimizer.step()


class Routed(nn.Module):
    """Experts, of which each batch uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.chosen = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[self.chosen](x)


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("owner", ["optimizer", "model"])
def test_layers_that_a_step_does_not_use(owner, set_to_none):
    """Behind zero_grad(set_to_none=False) they have a gradient, of zeros, as in torch."""
    torch.manual_seed(0)
    model = Routed()
    statistics = PerSampleSquares(model, backend="reference")
    optimizer = fusedopt.BatchDecoupledAdam(
        model.parameters(), statistics=statistics, backend="reference"
    )
    for step in range(5):
        (optimizer if owner == "optimizer" else model).zero_grad(set_to_none=set_to_none)
        model.chosen = step % 2
        model(torch.randn(6, 4)).square().mean().backward()
        idle = model.experts[1 - model.chosen].weight
        before = None if step == 0 else optimizer.state[idle].get("exp_avg_sq")
        before = None if before is None else before.clone()
        optimizer.step()
        assert statistics.samples == 6
        if before is not None:
            average = optimizer.state[idle]["exp_avg_sq"]
            torch.testing.assert_close(average, before if set_to_none else 0.999 * before)
    steps = [int(optimizer.state[e.weight]["step"]) for e in model.experts]
    assert steps == ([3, 2] if set_to_none else [5, 4])


def test_a_gradient_that_comes_after():
    model, statistics, optimizer = plain()
    backward(model)
    with statistics.paused():
        backward(model)
    with pytest.raises(RuntimeError, match="no observed layer used it"):
        optimizer.step()


# Duties of whoever calls accumulate().


def test_a_micro_batch_is_counted_once():
    p = nn.Parameter(torch.ones(3))
    statistics = MicroBatchSquares()
    optimizer = fusedopt.BatchDecoupledAdam([p], statistics=statistics)
    (2 * p).sum().backward()
    statistics.accumulate(optimizer)
    with pytest.raises(RuntimeError, match="no gradient has changed since"):
        statistics.accumulate(optimizer)
    assert statistics.samples == 1 and statistics.mean_square(p).tolist() == [4.0] * 3
    (2 * p).sum().backward()
    statistics.accumulate(optimizer)
    optimizer.step()
    assert statistics.samples == 2


def test_a_micro_batch_may_leave_some_parameters_out():
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    statistics = MicroBatchSquares()
    optimizer = fusedopt.BatchDecoupledAdam([p, q], statistics=statistics)
    for used in (p, q):
        used.sum().backward()
        statistics.accumulate(optimizer)
    assert statistics.samples == 2
    optimizer.step()


def backpack(size=5):
    p = nn.Parameter(torch.ones(3))
    statistics = BackpackSquares(batch_size=size)
    optimizer = fusedopt.BatchDecoupledAdam([p], statistics=statistics)

    def run():
        (5 * p).sum().backward()
        p.sum_grad_squared = torch.full((3,), 5.0)

    return p, statistics, optimizer, run


def test_backpacks_sums_are_counted_once():
    p, statistics, optimizer, run = backpack()
    run()
    statistics.accumulate(optimizer)
    with pytest.raises(RuntimeError, match="no parameter has a sum_grad_squared"):
        statistics.accumulate(optimizer)
    assert statistics.mean_square(p).tolist() == [25.0] * 3
    optimizer.step()


@pytest.mark.parametrize("first", [True, False])
def test_a_backward_pass_that_nobody_accumulated(first):
    p, statistics, optimizer, run = backpack()
    run()
    if first:
        statistics.accumulate(optimizer)
    run()
    with pytest.raises(RuntimeError, match="accumulate"):
        optimizer.step()
    optimizer.zero_grad()
    for _ in range(2):
        run()
        statistics.accumulate(optimizer)
    optimizer.step()
    assert statistics.samples == 10


@pytest.mark.parametrize("accumulated", [True, False])
def test_gradients_that_are_clipped_beside_backpacks_sums(accumulated):
    p, statistics, optimizer, run = backpack()
    run()
    if accumulated:
        statistics.accumulate(optimizer)
    nn.utils.clip_grad_norm_([p], 0.1)
    with pytest.raises(RuntimeError, match=r"changed.*GlobalNorm"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("owner", ["optimizer", "hand"])
def test_backpack_step_after_step(owner, set_to_none):
    """Catches backward passes of earlier steps that are counted with this one's."""
    p, _, optimizer, run = backpack()
    for _ in range(3):
        run()
        optimizer.step()
        optimizer.step()
        if owner == "optimizer":
            optimizer.zero_grad(set_to_none)
        else:
            p.sum_grad_squared = None
            p.grad = None if set_to_none else p.grad.zero_()


def test_a_scaler_that_found_no_gradient():
    """Samples need none: what it hands over then is the number 0, and no tensor."""
    p = nn.Parameter(torch.zeros(3))
    optimizer = fusedopt.BatchDecoupledAdam([p], statistics=GradSampleSquares(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    p.grad_sample = 8.0 * torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    scaler.step(optimizer)
    assert torch.equal(optimizer.state[p]["exp_avg"], torch.full((3,), 0.1 * 2.0))


def test_a_scaler_and_an_optimizer_that_is_left_out():
    p, q = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    one, other = (fusedopt.AdamW([x], clip=fusedopt.GlobalNorm(1.0)) for x in (p, q))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    p.grad = scaler.scale(torch.ones(2))
    scaler.step(one)
    scaler.step(other)
    assert p.detach().any() and not q.detach().any() and not other.state
