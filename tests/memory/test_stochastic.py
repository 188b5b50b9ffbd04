"""Stochastic rounding: by chance, and by every chance there is."""

from __future__ import annotations

import patterns
import pytest
import torch
from torch import Tensor

from fusedopt.memory.rounding import keys, random_bits, stochastic

narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
DRAWS = 1_000_000
Z = 4.5

# Normal, close to a power of two, close to the largest, subnormal in float16, subnormal in both.
VALUES = {
    torch.bfloat16: (1.0023, -1.9999, 0.1, 3.3e38, 1.5e-39, -7e-41),
    torch.float16: (1.0001, -1.9999, 0.1, 65500.7, 4.3e-5, -1.01e-7, 1e-8, 3e-12),
}


def _neighbours(value: float, dtype: torch.dtype) -> tuple[float, float]:
    nearest = torch.tensor(value).to(dtype)
    exact = torch.tensor(value).item()
    towards = torch.tensor(torch.inf if nearest.item() < exact else -torch.inf, dtype=dtype)
    other = torch.nextafter(nearest, towards).item()
    return min(nearest.item(), other), max(nearest.item(), other)


CASES = [(dtype, value) for dtype, values in VALUES.items() for value in values]


@pytest.mark.parametrize("dtype, value", CASES, ids=str)
def test_the_mean_of_a_million_draws_is_the_value(dtype: torch.dtype, value: float) -> None:
    # Catches bits that are left out, and a step to the wrong neighbour.
    values = torch.full((DRAWS,), value)
    rounded = stochastic(values, random_bits(torch.arange(DRAWS), *keys(0, 0, 1)), dtype)
    lower, upper = _neighbours(value, dtype)
    up = rounded.double() == upper
    assert (up | (rounded.double() == lower)).all()
    chance = (values[0].item() - lower) / (upper - lower)
    z = (up.double().mean().item() - chance) / (chance * (1 - chance) / DRAWS) ** 0.5
    assert abs(z) < Z


def _every_noise(bits: int) -> Tensor:
    """All values of the upper bits, with the lower ones set: they must not count."""
    noise = (torch.arange(1 << bits) << (32 - bits)) | ((1 << (32 - bits)) - 1)
    return noise.to(torch.int32)


@pytest.mark.parametrize("low", [1, 2, 0x1234, 0x7FFF, 0x8000, 0xFFFF])
def test_every_chance_of_bfloat16(low: int) -> None:
    # Not by chance: of the 2^16 draws exactly `low` go up, of subnormal numbers too.
    noise = _every_noise(16)
    for upper in (0x0000, 0x0001, 0x3F80, 0x3FFF, 0x7F7E):
        for sign in (0, 1 << 31):
            value = patterns.float32(torch.tensor([sign | upper << 16 | low])).expand(len(noise))
            rounded = stochastic(value.contiguous(), noise, torch.bfloat16)
            up = (rounded.view(torch.int16) & 0x7FFF) - upper
            assert up.sum() == low and set(up.tolist()) == {0, 1}


@pytest.mark.parametrize("exponent", [-14, 0, 15, -15, -17, -20])
@pytest.mark.parametrize("cut", [1, 0x5A5, 0x1FFF])
def test_every_chance_of_float16(exponent: int, cut: int) -> None:
    # Catches too few bits for subnormal numbers, of which more is cut off.
    dropped = 13 + max(0, -14 - exponent)
    noise = _every_noise(dropped)
    significand = (1 << 23) | cut
    value = torch.full((len(noise),), significand * 2.0 ** (exponent - 23))
    rounded = stochastic(value, noise, torch.float16).double() * 2.0 ** -(exponent - 23)
    lower = significand >> dropped << dropped
    ups = (rounded - lower) / (1 << dropped)
    assert ups.sum() == significand - lower and set(ups.tolist()) <= {0, 1}


@narrow
@pytest.mark.parametrize("noise", [0, -1, 0x5A5A5A5A])
def test_what_the_type_has_stays(dtype: torch.dtype, noise: int) -> None:
    # Catches -0 that loses its sign, subnormal numbers, and a step that changes what it must not.
    values = patterns.every_narrow(dtype)
    rounded = stochastic(
        values.float(), torch.full((len(values),), noise, dtype=torch.int32), dtype
    )
    number = ~values.isnan()
    assert torch.equal(rounded[number].view(torch.int16), values[number].view(torch.int16))
    assert torch.equal(rounded.isnan(), values.isnan())


@narrow
def test_beyond_the_largest(dtype: torch.dtype) -> None:
    # Catches a finite value that becomes infinite, and a nan whose bits are cut off.
    largest, inf = torch.finfo(dtype).max, torch.inf
    top = torch.finfo(torch.float32).max
    above = torch.nextafter(torch.tensor(largest), torch.tensor(inf)).item()
    nan = patterns.float32(torch.tensor([0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF]))
    values = torch.cat((torch.tensor([above, -above, top, -top, inf, -inf]), nan))
    for noise in (0, -1):
        bits = torch.full((len(values),), noise, dtype=torch.int32)
        rounded = stochastic(values, bits, dtype)
        expected = [largest, -largest, largest, -largest, inf, -inf]
        assert rounded[:6].tolist() == expected and rounded[6:].isnan().all()


@narrow
def test_a_decay_far_below_a_step_happens(dtype: torch.dtype) -> None:
    # Catches decay after the rounding, and bits that are the same in every step: 500 steps of
    # 1e-5, where the neighbours of 1 are 4e-3 or 5e-4 away.
    count, steps, decay = 4096, 500, 1e-5
    p = torch.ones(count, dtype=dtype)
    index = torch.arange(count)
    for step in range(steps):
        bits = random_bits(index, *keys(0, 0, step))
        p = stochastic(p.float() * (1 - decay), bits, dtype)
    expected = (1 - decay) ** steps
    # A step's variance is that of one draw between neighbours.
    spacing = torch.finfo(dtype).eps / 2
    deviation = (steps * decay * spacing / count) ** 0.5
    assert abs(p.double().mean().item() - expected) < Z * deviation
    assert Z * deviation < 0.1 * steps * decay
