"""One factor on all gradients between backward and step is followed; another change is an error."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fusedopt
from fusedopt.statistics.per_sample import factors


def make(dtype=torch.float32, sizes=(6, 5, 3), **options):
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    model = nn.Sequential(*layers).to(dtype)
    statistics = fusedopt.PerSampleSquares(model)
    optimizer = fusedopt.BatchDecoupledAdam(
        model.parameters(), lr=0.1, eps=1e-6, statistics=statistics, **options
    )
    return model, statistics, optimizer


def backward(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    x = torch.randn(4, model[0].in_features, generator=generator).to(dtype)
    model(x).square().sum(1).mean().backward()


def test_an_infinite_bound_changes_no_bit():
    """As trainers call it to log the norm: every gradient is multiplied by 1.0 in place."""
    runs = []
    for clipped in (False, True):
        model, statistics, optimizer = make()
        for seed in range(3):
            optimizer.zero_grad()
            backward(model, seed)
            if clipped:
                nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
            optimizer.step()
        runs.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_clipping_by_hand_is_clipping_inside(dtype, foreach):
    inside, _, ours = make(dtype, clip=fusedopt.GlobalNorm(0.01))
    outside, _, other = make(dtype)
    for seed in range(4):
        for model, optimizer in ((inside, ours), (outside, other)):
            optimizer.zero_grad()
            backward(model, seed)
        nn.utils.clip_grad_norm_(outside.parameters(), 0.01, foreach=foreach)
        ours.step()
        other.step()
        squares = [o.state[p]["exp_avg_sq"] for o in (ours, other) for p in _params(o)]
        half = len(squares) // 2
        rtol = {torch.bfloat16: 4e-2, torch.float32: 1e-4, torch.float64: 1e-5}[dtype]
        # Of the first step, before the trajectories are apart by rounding.
        for a, b in zip(squares[:half], squares[half:], strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=0.05 * float(b.abs().max()))
    assert not torch.equal(inside[0].weight, make(dtype)[0][0].weight)


def _params(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def test_squares_are_those_of_the_scaled_gradients():
    model, statistics, _ = make(torch.float64)
    backward(model)
    before = [statistics.mean_square(p) for p in model.parameters()]
    for p in model.parameters():
        p.grad.mul_(0.25)
    for p, expected in zip(model.parameters(), before, strict=True):
        statistics.check(list(model.parameters()))
        torch.testing.assert_close(statistics.mean_square(p), expected / 16)
    statistics.noise_scale()


def test_a_factor_between_two_backward_passes():
    """The sum then is of gradients of two scales, and so are the squares."""
    model, statistics, _ = make(torch.float64)
    backward(model, 1)
    first = [statistics.sum_of_squares(p).clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad.mul_(0.5)
    backward(model, 2)
    both = [statistics.sum_of_squares(p).clone() for p in model.parameters()]
    model.zero_grad()
    backward(model, 2)
    second = [statistics.sum_of_squares(p) for p in model.parameters()]
    for a, b, total in zip(first, second, both, strict=True):
        torch.testing.assert_close(total, a / 4 + b)


def test_noise_between_two_backward_passes_is_an_error_at_the_step():
    model, _, optimizer = make()
    backward(model, 1)
    for p in model.parameters():
        p.grad.add_(torch.randn_like(p))
    backward(model, 2)
    with pytest.raises(RuntimeError, match="was changed between backward"):
        optimizer.step()


CHANGES = {
    "value": lambda ps: nn.utils.clip_grad_value_(ps, 0.05),
    "noise": lambda ps: [p.grad.add_(0.1 * torch.randn_like(p)) for p in ps],
    "two factors": lambda ps: [p.grad.mul_(1.0 + i) for i, p in enumerate(ps)],
    "one of them": lambda ps: ps[0].grad.mul_(0.5),
    "half of one": lambda ps: ([p.grad.mul_(0.5) for p in ps], ps[0].grad[0].mul_(2.0)),
    "another tensor": lambda ps: [setattr(p, "grad", 0.5 * p.grad) for p in ps],
    "zero": lambda ps: [p.grad.zero_() for p in ps],
    "small noise": lambda ps: [p.grad.add_(0.05 * torch.randn_like(p) * p.grad.std()) for p in ps],
    "order": lambda ps: [p.grad.copy_(p.grad.flatten().flip(0).view_as(p.grad)) for p in ps],
    "signs": lambda ps: [p.grad.view(-1)[::2].neg_() for p in ps],
    "nan": lambda ps: [p.grad.mul_(torch.nan) for p in ps],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", CHANGES)
def test_anything_else_is_an_error_and_changes_nothing(how, dtype):
    model, _, optimizer = make(dtype)
    backward(model)
    before = copy.deepcopy([p.detach() for p in model.parameters()])
    CHANGES[how](list(model.parameters()))
    way_out = "is not finite" if how == "nan" else "GlobalNorm.*rescale"
    with pytest.raises(RuntimeError, match=rf"0\.weight.*{way_out}"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters())) and not optimizer.state
    optimizer.zero_grad()
    backward(model)
    optimizer.step()


def test_gradients_are_not_kept_alive():
    import weakref

    model, _, optimizer = make()
    backward(model)
    optimizer.step()
    gradient = weakref.ref(model[0].weight.grad)
    model.zero_grad()
    assert gradient() is None


LARGE = 3 * factors.WIDTH + 77


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [1, 77, factors.WIDTH, LARGE])
def test_one_factor_is_found_at_every_size(size, dtype):
    generator = torch.Generator().manual_seed(size)
    # The sum of float16 is beyond its range.
    scale = 2.0**12 if dtype == torch.float16 else 1e-6
    gradient = (scale * torch.randn(size, generator=generator)).to(dtype)
    for factor in (1.0, 0.37, 3.0):
        numbers = [factors.norms([g]) for g in (gradient, gradient * factor)]
        found = factors.common_factor(*numbers, [gradient])
        assert found == pytest.approx(factor, rel=2 * torch.finfo(dtype).eps + 1e-6)


def test_a_row_that_was_masked_is_seen():
    """Its squares may be too few to be seen in a norm: a token's row of a large embedding."""
    gradient = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(0))
    masked = gradient.clone()
    masked[17] = 0.0
    ratio = float(masked.norm() / gradient.norm())
    assert abs(ratio - 1) < 4e-5
    numbers = [factors.norms([g]) for g in (gradient, masked)]
    assert abs(float(numbers[0][0][1] - numbers[1][0][1])) > 1e-4 * float(gradient.norm())
    assert factors.common_factor(*numbers, [gradient]) is None


@pytest.mark.parametrize("place", [0, factors.WIDTH + 3, LARGE - 1])
def test_every_element_is_in_the_signed_sum(place):
    """Catches rows, or what is behind them, that are left out."""
    vector = torch.zeros(LARGE)
    vector[place] = 1.0
    assert abs(float(factors.norms([vector])[0][1])) == 1.0


def test_a_change_that_the_signed_sum_does_not_see():
    """Within elements of one sign, as much is added as is taken away."""
    signs = factors._signs(torch.device("cpu"), torch.float32, 1000)
    gradient = torch.where(signs[:1000] > 0, 1.0, 0.5)
    changed = gradient.clone()
    first, second = (signs[:1000] > 0).nonzero()[:2].flatten().tolist()
    changed[first], changed[second] = 1.5, 0.5
    numbers = [factors.norms([g]) for g in (gradient, changed)]
    assert float(numbers[0][0][1]) == float(numbers[1][0][1])
    # Beside a gradient that has not changed: the factor is not that of the one alone.
    other = torch.full((100_000,), 1.0)
    pairs = [[pair, factors.norms([other])[0]] for (pair,) in numbers]
    assert factors.common_factor(*pairs, [gradient, other]) is None


def test_a_factor_into_the_smallest_numbers_of_float16():
    """There a rounding is not a share of the element any more."""
    generator = torch.Generator().manual_seed(0)
    gradient = (1e-4 * torch.randn(50_000, generator=generator)).half()
    changed = gradient * 1e-3
    assert float((changed.float() / 1e-3 - gradient.float()).norm()) > 0.1 * float(gradient.norm())
    numbers = [factors.norms([g]) for g in (gradient, changed)]
    assert factors.common_factor(*numbers, [gradient]) == pytest.approx(1e-3, rel=0.2)
    numbers[1] = factors.norms([torch.zeros_like(gradient)])
    assert factors.common_factor(*numbers, [gradient]) is None
