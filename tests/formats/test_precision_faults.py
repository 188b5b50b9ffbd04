"""Faults of peers, as tests: what they lost, hid or left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from format_cases import assert_same_bits_of, bits_of, params_of
from formats_by_hand import is_code, read
from lockstep import Lockstep
from marks import both_backends, numpy_may_warn
from torch import Tensor

import fusedopt

CODES = ("int8", "fp8")
each_code = pytest.mark.parametrize("states", CODES)
MOMENTS = ("exp_avg", "exp_avg_sq")


def new(shape: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))


def adamw(params: Any, **options: Any) -> fusedopt.AdamW:
    return fusedopt.AdamW(params, **{"lr": 0.05, "betas": (0.75, 0.9), **options})


def give(params: list[Tensor], seed: int) -> None:
    for i, p in enumerate(params):
        p.grad = new(p.shape, p.dtype, 100 * seed + i).detach()


@each_code
@both_backends
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@numpy_may_warn
def test_what_is_not_finite_is_seen(value: float, backend: str, states: str) -> None:
    # Catches bitsandbytes' fault: the element's state becomes 0, and training goes on. Here the
    # parameter is nan at once, and all of the element's group of 128 from the next step on; groups
    # beside it and other parameters never hear of it.
    p, q = new(300), new(5)
    optimizer = adamw([p, q], state_dtype=states, backend=backend)
    give([p, q], 1)
    optimizer.step()
    give([p, q], 2)
    p.grad[130] = value
    optimizer.step()
    group = torch.zeros(300, dtype=torch.bool)
    group[128:256] = True
    assert p.isnan().nonzero().flatten().tolist() == [130]
    for name in MOMENTS:
        assert torch.equal(read(optimizer.state[p], name).isnan(), group)
        exported = fusedopt.export_state_dict(optimizer)["state"][0][name]
        assert torch.equal(exported.isnan(), group)
    give([p, q], 3)
    optimizer.step()
    assert torch.equal(p.isnan(), group) and q.isfinite().all()


@each_code
@both_backends
@pytest.mark.parametrize("before", [0, 2])
@numpy_may_warn
def test_an_overflow_that_the_scaler_found_changes_nothing(
    before: int, backend: str, states: str
) -> None:
    p = new(300, torch.bfloat16)
    optimizer = adamw([p], state_dtype=states, master="remainder8", backend=backend)
    for seed in range(before):
        give([p], seed)
        optimizer.step()
    held = bits_of(optimizer)
    p.grad = torch.full_like(p, torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert_same_bits_of(held, optimizer)
    assert bool(optimizer.state.get(p)) == (before > 0)


@each_code
@both_backends
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 2), (0,), (0, 4), (4, 0)])
def test_small_tensors_are_compressed_as_well(shape: Any, backend: str, states: str) -> None:
    # Catches torchao's and bitsandbytes' silent float32 below 4,096 elements, and an empty tensor
    # that fails or has a scale of no shape.
    p = new(shape)
    optimizer = adamw([p], state_dtype=states, backend=backend)
    for seed in range(2):
        give([p], seed)
        optimizer.step()
    for name in MOMENTS:
        assert is_code(optimizer.state[p][name]) and optimizer.state[p][name].shape == p.shape
        assert optimizer.state[p][f"{name}_scale"].numel() == min(p.numel(), 1)
    held = bits_of(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert_same_bits_of(held, optimizer)


@both_backends
def test_groups_without_gradients(backend: str) -> None:
    # Catches a step count, or thresholds, that advance for who took no part.
    params = [new(200, torch.bfloat16, i) for i in range(3)]
    alone = [torch.nn.Parameter(params[0].detach().clone())]
    options = {"state_dtype": "int8", "rounding": "stochastic", "backend": backend}
    several = adamw([{"params": [p]} for p in params], **options)
    one = adamw(alone, **options)
    for optimizer in (several, one):
        for seed in range(3):
            give(params_of(optimizer)[:1], seed)
            optimizer.step()
    assert not any(several.state.get(p) for p in params[1:])
    assert_same_bits_of(bits_of(several)[:1], bits_of(one))
    one_more = adamw([{"params": []}, {"params": alone}], **options)
    give(alone, 9)
    one_more.step()


@each_code
@both_backends
def test_a_second_moment_is_never_read_as_nothing(backend: str, states: str) -> None:
    # Catches code 0 for what is below the lowest level: eps is left as the denominator then. Of one
    # group, squares over thirty orders of magnitude.
    p = torch.nn.Parameter(torch.zeros(128))
    optimizer = adamw([p], state_dtype=states, backend=backend)
    g = torch.logspace(-14, 1, 128)
    g[::16] = 0
    for _ in range(3):
        p.grad = g
        optimizer.step()
        v = read(optimizer.state[p], "exp_avg_sq")
        assert torch.equal(v > 0, g > 0)
        exported = fusedopt.export_state_dict(optimizer)["state"][0]["exp_avg_sq"]
        assert torch.equal(exported > 0, g > 0)


def rare_rows(states: str, seed: int) -> tuple[float, float]:
    """Largest updates of an embedding's rows that were hit once, in float64 and as kept."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.logspace(-3, 1, 40, dtype=torch.float64)[:, None]
    columns = torch.exp(torch.randn(96, generator=generator, dtype=torch.float64))
    p = torch.zeros(40, 96)
    pair = Lockstep(
        "AdamW", p, {"state_dtype": states}, {"lr": 1.0, "weight_decay": 0.0}, backend="reference"
    )
    exact, kept = [], []
    for step in range(120):
        g = rows * columns * torch.randn(40, 96, generator=generator, dtype=torch.float64)
        # Half of the rows are hit in the first steps alone, one of them at a time.
        hit = torch.rand(40, 1, generator=generator) < 0.1
        hit[20:] = torch.arange(20)[:, None] == step
        before, own = pair.free.p.clone(), pair.p.detach().double().clone()
        pair.step((g * hit).float())
        if step >= 100:
            idle = ~hit.expand(40, 96)
            exact.append((pair.free.p - before)[idle].abs().max())
            kept.append((pair.p.detach().double() - own)[idle].abs().max())
    return float(max(exact)), float(max(kept))


@each_code
@pytest.mark.parametrize("seed", range(3))
def test_rows_that_nothing_hits_do_not_leap(seed: int, states: str) -> None:
    # Catches a second moment that decays faster than the first, or falls to 0 (FlashOptim's
    # formulas: 700 times too far).
    exact, kept = rare_rows(states, seed)
    assert exact > 0.01 and kept <= 1.1 * exact


@both_backends
def test_numbers_of_groups_in_bfloat16(backend: str) -> None:
    # Catches COAT's fault, which reads a bfloat16's bytes as a float32, and one group's for all.
    values = [(0.1, 0.7, 0.8), (0.03, 0.5, 0.97)]
    tensors = [tuple(torch.tensor(x, dtype=torch.bfloat16) for x in row) for row in values]
    params = [new((2, 100), torch.bfloat16, i) for i in range(2)]
    groups = [
        {"params": [p], "lr": lr, "betas": betas}
        for p, (lr, *betas) in zip(params, tensors, strict=True)
    ]
    optimizer = fusedopt.AdamW(
        groups, lr=1.0, state_dtype="int8", master="remainder", capturable=True, backend=backend
    )
    pairs = [
        Lockstep(
            "AdamW", p, {"state_dtype": "int8", "master": "remainder"},
            {"lr": float(lr), "betas": tuple(map(float, betas))}, optimizer=optimizer,
        )
        for p, (lr, *betas) in zip(params, tensors, strict=True)
    ]  # fmt: skip
    for seed in range(3):
        for i, pair in enumerate(pairs):
            pair.give(new((2, 100), torch.bfloat16, 10 * seed + i).detach())
        optimizer.step()
        for pair in pairs:
            pair.follow()
