"""What masters and roundings are for: small updates that are not lost, over many steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from format_cases import raw
from formats_by_hand import joined
from marks import both_backends
from torch import Tensor

import fusedopt

Z = 4.5


def pair_of(master: str, **hyper: Any) -> tuple[Any, Any]:
    """A bfloat16 parameter with a master, and a float32 parameter with its values."""
    generator = torch.Generator().manual_seed(2)
    start = (0.02 * torch.randn(3, 50, generator=generator)).bfloat16()
    options = {"lr": 1e-4, "weight_decay": 0.1, "backend": "reference", **hyper}
    ours = fusedopt.AdamW(
        [torch.nn.Parameter(start)], master=master, state_dtype=torch.float32, **options
    )
    wide = fusedopt.AdamW([torch.nn.Parameter(start.float())], **options)
    return ours, wide


def the(optimizer: Any) -> Tensor:
    return optimizer.param_groups[0]["params"][0]


@pytest.mark.parametrize("master", ["remainder", "float32"])
def test_a_thousand_steps_are_those_of_float32(master: str) -> None:
    # Catches a lost bit that only adds up, and states that pass through bfloat16.
    ours, wide = pair_of(master)
    p, q = the(ours), the(wide)
    start = q.detach().clone()
    for step in range(1000):
        g = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).bfloat16()
        p.grad, q.grad = g, g.float()
        ours.step()
        wide.step()
        if step % 100 == 99 or step < 3:
            full = joined(p, ours.state[p]).float()
            assert torch.equal(raw(full), raw(q)), f"step {step}"
            for name in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(raw(ours.state[p][name]), raw(wide.state[q][name]))
            tie = (raw(q) & 0xFFFF) == 0x8000
            assert torch.equal(p[~tie], q.bfloat16()[~tie])
    assert ((q - start).abs() > 2.0**-9 * start.abs()).double().mean() > 0.9


def test_24_bits_stay_close_to_float32() -> None:
    # Bound: half a unit of 24 bits a step, 2^-16 of the value at most, of random sign: over 200
    # steps the root of 200 times that at worst. Catches a byte that is cut, which would be a bias.
    ours, wide = pair_of("remainder8", lr=1e-5)
    p, q = the(ours), the(wide)
    start = q.detach().double().clone()
    for step in range(200):
        g = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).bfloat16()
        p.grad, q.grad = g, g.float()
        ours.step()
        wide.step()
    full = joined(p, ours.state[p])
    error = (full - q.double()) / start.abs().clamp(min=1e-6)
    assert error.square().mean().sqrt() < 200**0.5 * 2.0**-16
    assert ((full - q.double()).norm() / (q.double() - start).norm()) < 0.25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.0, 0.71])
def test_rounding_is_unbiased_over_a_million_draws(dtype: torch.dtype, value: float) -> None:
    # Catches bits that are too few, shared between elements, or added to the value as stored.
    # A first step of SGD from 0 to `value`, whose chances are known.
    count = 1 << 20
    p = torch.nn.Parameter(torch.zeros(count, dtype=dtype))
    optimizer = fusedopt.SGD([p], lr=1.0, rounding="stochastic", backend="reference")
    target = value + 0.3 * torch.finfo(dtype).eps
    p.grad_dtype = None
    p.grad = torch.full((count,), -target)
    optimizer.step()
    exact = torch.tensor(target).double().item()
    low, high = p.min().double().item(), p.max().double().item()
    assert low < exact < high and (p.unique().numel() == 2)
    chance = (exact - low) / (high - low)
    share = (p == p.max()).double().mean().item()
    assert abs(share - chance) <= Z * (chance * (1 - chance) / count) ** 0.5


def decayed(steps: int, count: int, backend: str = "reference", **formats: Any) -> Any:
    """Ones after steps of a decay of 2^-14, with gradients of 0."""
    p = torch.nn.Parameter(torch.ones(count, dtype=torch.bfloat16))
    optimizer = fusedopt.AdamW([p], lr=2.0**-7, weight_decay=2.0**-7, backend=backend, **formats)
    p.grad = torch.zeros_like(p)
    for _ in range(steps):
        optimizer.step()
    return p.detach(), optimizer.state[p]


@pytest.mark.parametrize("states", [None, "int8"])
def test_a_decay_far_below_a_unit_moves_the_mean(states: Any) -> None:
    # Catches a decay that is applied to the rounded parameter, or after the rounding.
    steps, count = 100, 1 << 14
    p, _ = decayed(steps, count, rounding="stochastic", state_dtype=states)
    expected = (1 - 2.0**-14) ** steps
    # A draw between neighbours 2^-8 apart with chance c has variance c (1 - c) 2^-16; c is 2^-6.
    deviation = (steps * 2.0**-6 * 2.0**-16 / count) ** 0.5
    assert abs(p.double().mean().item() - expected) <= Z * deviation
    assert Z * deviation < 0.05 * (1 - expected)


def test_to_nearest_it_does_not_move_at_all() -> None:
    assert (decayed(100, 64)[0] == 1).all()


@pytest.mark.parametrize(
    "formats",
    [{"rounding": "kahan"}, {"master": "remainder"}, {"master": "float32"}],
    ids=lambda f: next(iter(f.values())),
)
@both_backends
def test_what_is_kept_beside_it_moves(formats: dict[str, Any], backend: str) -> None:
    # Kahan's compensation has 8 bits of its own: 2^-9 of 2^-9 a step at worst.
    steps = 100 if backend == "reference" else 20
    p, state = decayed(steps, 3, backend, **formats)
    expected = (1 - 2.0**-14) ** steps
    slack = steps * (2.0**-17 if "rounding" in formats else 2.0**-24)
    assert ((joined(p, state) - expected).abs() <= slack).all()
    assert slack < 0.15 * (1 - expected)


def test_24_bits_by_chance_move_the_mean() -> None:
    # A decay of 2^-20 is below half a unit of 24 bits, 2^-17.
    count, steps = 1 << 14, 64
    p = torch.nn.Parameter(torch.full((count,), 1.0, dtype=torch.bfloat16))
    optimizer = fusedopt.AdamW(
        [p], lr=2.0**-10, weight_decay=2.0**-10, backend="reference", master="remainder8",
        rounding="stochastic",
    )  # fmt: skip
    p.grad = torch.zeros_like(p)
    for _ in range(steps):
        optimizer.step()
    moved = 1 - joined(p, optimizer.state[p]).mean().item()
    expected = 1 - (1 - 2.0**-20) ** steps
    deviation = (steps * 2.0**-4 * 2.0**-32 / count) ** 0.5
    assert abs(moved - expected) <= Z * deviation
    assert Z * deviation < 0.1 * expected
