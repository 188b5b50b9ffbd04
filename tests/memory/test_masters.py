"""Small masters against arithmetic on values; ``python -m tools.patterns`` has every pattern."""

from __future__ import annotations

import numpy as np
import patterns
import pytest
import torch
from torch import Tensor

from fusedopt.memory import masters, rounding

LARGEST = torch.finfo(torch.bfloat16).max
remainders = pytest.mark.parametrize("remainder", masters.REMAINDERS, ids=("16", "8"))


def _rounded(values: Tensor, dropped: int, ties: str) -> Tensor:
    """Round to the neighbour nearer in value among those whose lowest bits are zero."""
    pattern = patterns.magnitudes(values).numpy().astype(np.uint32)
    lower = pattern >> dropped << dropped
    upper = lower + np.uint32(1 << dropped)
    low, high, own = (x.view(np.float32).astype(np.float64) for x in (lower, upper, pattern))
    odd = (lower >> dropped) % 2 == 1
    up = (high - own < own - low) | ((high - own == own - low) & (odd | (ties == "away")))
    return torch.from_numpy(np.where(up, upper, lower).view(np.float32)).copysign(values)


def _ordinary(values: Tensor) -> Tensor:
    return values[values.abs() < LARGEST]


def test_16_bits_are_exact() -> None:
    # Catches a lost bit, and a carry that is not taken back.
    values = _ordinary(patterns.special())
    assert len(values) > 200_000
    back = masters.join(*masters.split(values, torch.int16))
    assert torch.equal(back.view(torch.int32), values.view(torch.int32))


def test_8_bits_are_the_nearest_of_24() -> None:
    # Catches ties that go elsewhere than to even, and a byte that is cut.
    values = _ordinary(patterns.special())
    back = masters.join(*masters.split(values, torch.int8))
    expected = _rounded(values, 8, "even")
    assert torch.equal(back.view(torch.int32), expected.view(torch.int32))


@remainders
def test_the_parameter_is_the_nearest(remainder: torch.dtype) -> None:
    # Catches truncation, which shrinks every weight.
    values = _ordinary(patterns.special())
    kept = values if remainder == torch.int16 else _rounded(values, 8, "even")
    parameter, _ = masters.split(values, remainder)
    expected = _rounded(kept, 16, "away")
    assert torch.equal(parameter.float().view(torch.int32), expected.view(torch.int32))


@remainders
@pytest.mark.parametrize("pattern", [0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF, 0x7F80FFFF, 0xFF808000])
def test_a_nan_is_seen(remainder: torch.dtype, pattern: int) -> None:
    # Catches what peers do: 0x7FFFFFFF becomes -0 in the weight and 0x7F800001 infinity.
    parameter, rest = masters.split(patterns.float32(torch.tensor([pattern])), remainder)
    assert parameter.isnan().all() and masters.join(parameter, rest).isnan().all()


@remainders
@pytest.mark.parametrize("sign", [1, -1])
def test_the_border_to_infinity(remainder: torch.dtype, sign: int) -> None:
    # Catches the largest values shown as infinity, and an infinity with something beside it.
    largest = torch.finfo(torch.float32).max
    values = sign * torch.tensor([largest, 3.3961776e38, LARGEST, torch.inf])
    parameter, rest = masters.split(values, remainder)
    assert parameter.tolist() == [sign * LARGEST] * 3 + [sign * torch.inf]
    back = masters.join(parameter, rest)
    assert back.isinf().tolist() == [False, False, False, True]
    unit = 2.0**104 * (1 if remainder == torch.int16 else 256)
    assert ((back[:3].double() - values[:3]).abs() < 2 * unit).all() and back[2] == values[2]


@remainders
def test_a_parameter_that_somebody_else_has_written(remainder: torch.dtype) -> None:
    # Every parameter beside remainders of others. Catches a zero that becomes nan, another sign,
    # and infinity with a remainder that reads as nan.
    info = torch.iinfo(remainder)
    parameter = patterns.every_narrow(torch.bfloat16)
    for rest in (info.min, -1, 0, 1, info.max):
        value = masters.join(parameter, torch.full_like(parameter, rest, dtype=remainder))
        assert torch.equal(value.isnan(), parameter.isnan())
        assert torch.equal(value.isinf(), parameter.isinf())
        # A master begins like this.
        assert rest or torch.equal(value.view(torch.int32), parameter.float().view(torch.int32))
        assert torch.equal(value.signbit(), parameter.signbit())
        below = parameter.abs() < LARGEST
        away = (patterns.magnitudes(value) - patterns.magnitudes(parameter.float())).abs()
        assert (away[below] <= 1 << 15).all() and (away[parameter.abs() == LARGEST] < 1 << 16).all()
        again, _ = masters.split(value, remainder)
        number = ~parameter.isnan()
        assert torch.equal(again[number].view(torch.int16), parameter[number].view(torch.int16))


def test_a_walk_is_that_of_a_float32_master() -> None:
    # Catches an error that only adds up: 1,000 updates far below a step of bfloat16.
    generator = torch.Generator().manual_seed(1)
    master = torch.randn(512, generator=generator)
    kept = masters.split(master, torch.int16)
    stood = kept[0].clone()
    for _ in range(1000):
        update = 1e-4 * torch.randn(512, generator=generator) - 1e-5 * master
        master = master + update
        kept = masters.split(masters.join(*kept) + update, torch.int16)
    assert torch.equal(masters.join(*kept), master)
    assert (kept[0] != stood).float().mean() > 0.5


def test_stochastic_8_bits_have_the_value_as_their_mean() -> None:
    # Catches bits that are cut off, and noise of too few of them. Of the 256 patterns between two
    # neighbours it is the 37th.
    count = 1 << 20
    values = patterns.float32(torch.tensor([0x3F800000 + 37])).expand(count).contiguous()
    bits = rounding.random_bits(torch.arange(count), *rounding.keys(0, 1, 2))
    back = masters.join(*masters.split(values, torch.int8, bits))
    steps = (patterns.magnitudes(back) - 0x3F800000) / 256
    assert set(steps.tolist()) == {0, 1}
    chance = 37 / 256
    z = (steps.double().mean() - chance) / (chance * (1 - chance) / count) ** 0.5
    assert abs(z) < 4.5
