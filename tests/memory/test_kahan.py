"""Kahan's compensation: what is left over is kept, and a step without update changes no bit."""

from __future__ import annotations

import patterns
import pytest
import torch
from torch import Tensor

from fusedopt.memory import kahan

narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def _below_ties(dtype: torch.dtype) -> Tensor:
    """Values that are a hair nearer to an odd parameter than to its neighbours."""
    spacing = torch.finfo(dtype).eps
    odd = 1 + spacing * torch.arange(1, 63, 2)
    return torch.cat([odd + s * (spacing / 2 - 2.0**-23) for s in (1, -1)])


def _shown(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values that the type has an ordinary neighbour of."""
    return values[values.abs() <= torch.finfo(dtype).max]


@narrow
def test_the_parameter_is_the_cast_and_the_rest_beside_it(dtype: torch.dtype) -> None:
    # Catches a compensation of the other sign, or of the value before.
    values = _shown(patterns.special(), dtype)
    parameter, compensation = kahan.split(values, dtype)
    assert torch.equal(parameter.view(torch.int16), values.to(dtype).view(torch.int16))
    rest = values.double() - parameter.double()
    # Half a step of the compensation, or a whole one where half a step of the parameter is near.
    step = torch.finfo(dtype).eps * rest.abs() + torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    assert ((compensation.double() - rest).abs() <= step).all()
    assert ((compensation.double() - rest).abs() <= step / 2).double().mean() > 0.9


@narrow
def test_a_step_without_update_changes_no_bit(dtype: torch.dtype) -> None:
    # Catches -0 that becomes 0, and a compensation that was rounded up to a tie: then the parameter
    # moves to the neighbour although nothing was added, or what is left over counts as nobody's.
    ties = _below_ties(dtype)
    values = torch.cat((ties, -ties, patterns.special()))
    values = torch.cat((values[~values.isnan()], torch.tensor([-0.0, 0.0])))
    parameter, compensation = kahan.split(values, dtype)
    stored = parameter
    read = kahan.join(parameter, compensation)[: len(ties)]
    assert ((read - ties).abs() <= torch.finfo(dtype).eps ** 2).all()
    for _ in range(3):
        parameter, compensation = kahan.split(kahan.join(parameter, compensation), dtype)
        assert torch.equal(parameter.view(torch.int16), stored.view(torch.int16))


@narrow
def test_small_updates_add_up(dtype: torch.dtype) -> None:
    # Catches a compensation that is forgotten: no update alone moves the parameter.
    generator = torch.Generator().manual_seed(0)
    scale = torch.finfo(dtype).eps / 200
    exact = torch.full((1000,), 1.5, dtype=torch.float64)
    kept = kahan.split(exact.float(), dtype)
    for _ in range(1000):
        update = scale * (1 + torch.rand(1000, generator=generator))
        exact += update
        assert torch.equal((kept[0].float() + update).to(dtype), kept[0])
        kept = kahan.split(kahan.join(*kept) + update, dtype)
    moved = (kahan.join(*kept).double() - 1.5).mean()
    assert abs(moved / (exact - 1.5).mean() - 1) < 0.01


@narrow
def test_what_is_not_finite(dtype: torch.dtype) -> None:
    # Catches infinity minus infinity.
    largest = torch.finfo(torch.float32).max
    values = torch.tensor([torch.inf, -torch.inf, torch.nan, largest, -largest])
    parameter, compensation = kahan.split(values, dtype)
    assert parameter.tolist()[:2] == [torch.inf, -torch.inf] and parameter[2].isnan()
    # As any cast has it.
    assert torch.equal(parameter[3:], values[3:].to(dtype))
    assert (compensation.view(torch.int16) == 0).all()
    back = kahan.join(parameter, compensation)
    assert torch.equal(back.isnan(), values.isnan()) and back[0] == torch.inf == -back[1]


@narrow
def test_a_parameter_that_somebody_else_has_written(dtype: torch.dtype) -> None:
    # Catches a compensation of the old weight that spoils a new, smaller one, as after pruning.
    _, compensation = kahan.split(torch.full((1 << 16,), 1000.123), dtype)
    assert compensation[0] != 0
    parameter = patterns.every_narrow(dtype)
    value = kahan.join(parameter, compensation)
    number = ~parameter.isnan()
    assert torch.equal(value.isnan(), ~number)
    assert torch.equal(
        value.to(dtype)[number].view(torch.int16), parameter[number].view(torch.int16)
    )
    zero = parameter == 0
    assert torch.equal(value[zero], parameter[zero].float()) and zero.sum() == 2
