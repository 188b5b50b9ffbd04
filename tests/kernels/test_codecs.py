"""Codecs on the device: bit by bit what their PyTorch twins do."""

from __future__ import annotations

import importlib

import patterns
import pytest
import torch
from tolerances import bits
from torch import Tensor

from fusedopt.memory import kahan, masters, rounding

on_device = importlib.import_module("tools.patterns.device")

remainders = pytest.mark.parametrize("remainder", masters.REMAINDERS, ids=("16", "8"))
narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# The interpreter's numpy, of sums that overflow as they should.
numpy_warns = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def _noise(numel: int, device: torch.device) -> Tensor:
    return rounding.random_bits(torch.arange(numel, device=device), 1, 2)


def _pairs(rest: Tensor, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Every parameter beside each of some remainders."""
    parameter = patterns.every_narrow(dtype)
    pairs = parameter.repeat(len(rest)), rest.repeat_interleave(len(parameter))
    return pairs[0].to(device), pairs[1].to(device)


def _same(actual: Tensor, expected: Tensor, payload: bool = False) -> bool:
    """Whether all bits are equal; those of a nan only where asked, since a cast has its own."""
    if payload:
        return torch.equal(bits(actual), bits(expected))
    nan = expected.isnan()
    same = bits(actual) == bits(expected)
    return torch.equal(actual.isnan(), nan) and bool((same | nan).all())


@remainders
@pytest.mark.parametrize("random", [False, True], ids=["nearest", "stochastic"])
def test_masters(remainder: torch.dtype, random: bool, device: torch.device) -> None:
    # Catches a case of one side that the other has not: nans, carries, ties, the largest values.
    values = patterns.special(device)
    noise = _noise(len(values), device) if random else None
    ours = on_device.split(values, remainder, noise)
    theirs = masters.split(values, remainder, noise)
    assert _same(ours[0], theirs[0], payload=True) and torch.equal(ours[1], theirs[1])
    assert _same(on_device.join(*ours), masters.join(*theirs), payload=True)


@remainders
def test_masters_whose_parameter_was_written(remainder: torch.dtype, device: torch.device) -> None:
    # Catches on one side alone a nan or another sign of what was never stored.
    info = torch.iinfo(remainder)
    rest = torch.tensor([info.min, info.min + 1, -1, 0, 1, 77, info.max], dtype=remainder)
    pairs = _pairs(rest, torch.bfloat16, device)
    assert _same(on_device.join(*pairs), masters.join(*pairs), payload=True)


@narrow
@numpy_warns
def test_kahan(dtype: torch.dtype, device: torch.device) -> None:
    # Catches a compensation that is rounded otherwise, and a tie that only one side mends.
    values = patterns.special(device)
    ours, theirs = on_device.kahan_split(values, dtype), kahan.split(values, dtype)
    assert _same(ours[0], theirs[0]) and _same(ours[1], theirs[1], payload=True)
    assert _same(on_device.kahan_join(*ours), kahan.join(*theirs))


@narrow
@numpy_warns
def test_kahan_whose_parameter_was_written(dtype: torch.dtype, device: torch.device) -> None:
    # Catches a compensation that counts on one side alone.
    rest = torch.tensor([0.0, -0.0, 1e-3, -0.125, 2.0, 1e30, torch.inf, torch.nan]).to(dtype)
    pairs = _pairs(rest, dtype, device)
    assert _same(on_device.kahan_join(*pairs), kahan.join(*pairs))


@narrow
def test_stochastic_rounding(dtype: torch.dtype, device: torch.device) -> None:
    # Catches another cut of the bits, of subnormal numbers above all.
    values = patterns.special(device)
    noise = _noise(len(values), device)
    ours = on_device.stochastic(values, noise, dtype)
    assert _same(ours, rounding.stochastic(values, noise, dtype), payload=True)
    # With no bit set and with all of them: the lower and the upper neighbour.
    for every in (0, -1):
        noise = torch.full_like(noise, every)
        ours = on_device.stochastic(values, noise, dtype)
        assert _same(ours, rounding.stochastic(values, noise, dtype), payload=True)


def test_random_bits(device: torch.device) -> None:
    # Catches a shift that brings in the sign, and an index that is cut to 32 bits.
    index = torch.randint(1 << 62, (1 << 16,), generator=torch.Generator().manual_seed(0))
    borders = torch.tensor([0, 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 1])
    index = torch.cat((index, borders)).to(device)
    for key0, key1 in (
        (0, 0),
        (1, (1 << 32) - 1),
        (0x80000000, 0x7FFFFFFF),
        (123456789, 987654321),
    ):
        ours = on_device.random_bits(index, key0, key1)
        assert torch.equal(ours, rounding.random_bits(index, key0, key1))


@pytest.mark.parametrize("seed", [0, 1, -1, (1 << 63) - 1, -(1 << 63), 20_261_130])
def test_keys(seed: int, device: torch.device) -> None:
    # Catches Python's unbounded integers, and int64 that shifts its sign in.
    for parameter, step in ((0, 0), (0, 1), (7, 1), (1 << 40, (1 << 62) + 3)):
        expected = rounding.keys(seed, parameter, step)
        assert on_device.keys(seed, parameter, step, device) == expected
        tensors = rounding.keys(seed, parameter, torch.tensor(step, device=device))
        assert tuple(int(key) for key in tensors) == expected
