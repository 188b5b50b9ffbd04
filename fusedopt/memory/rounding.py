"""The PyTorch twin of ``kernels/codecs/rounding.py``: stochastic rounding and its random bits.

What is drawn and why is said there. Patterns of 32 bits are int32 here, whose arithmetic wraps
around, and keys and seeds of 64 bits likewise: torch has no arithmetic on unsigned ones. Its shift
to the right is the arithmetic one, so what it brings in is masked.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

Integer = TypeVar("Integer", int, Tensor)


def keys(seed: int, parameter: int, step: int | Tensor) -> tuple[int | Tensor, int | Tensor]:
    """Form the two keys of a parameter's step.

    Args:
        seed: of which the lower 64 bits count.
        parameter: the parameter's number.
        step: the step's number; or an int64 tensor of no dimension, on whose device the keys are.

    Returns:
        Two numbers from 0 to 2^32 - 1.
    """
    state = _mix64(_mix64(_signed(seed, 64)) ^ parameter)
    if isinstance(step, Tensor):
        return _halves(_mix64(step ^ state))
    return _halves(_mix64(step ^ state))


def _halves(x: Integer) -> tuple[Integer, Integer]:
    return x & 0xFFFFFFFF, (x >> 32) & 0xFFFFFFFF


def _mix64(x: Integer) -> Integer:
    """Permute the numbers of 64 bits."""
    x = _signed(x + _signed(0x9E3779B97F4A7C15, 64), 64)
    x = _signed((x ^ _shifted(x, 30, 64)) * _signed(0xBF58476D1CE4E5B9, 64), 64)
    x = _signed((x ^ _shifted(x, 27, 64)) * _signed(0x94D049BB133111EB, 64), 64)
    return x ^ _shifted(x, 31, 64)


def random_bits(index: Tensor, key0: int | Tensor, key1: int | Tensor) -> Tensor:
    """Draw 32 random bits for each element.

    Args:
        index: int64, the elements' numbers in the whole parameter, below 2^63.
        key0: from 0 to 2^32 - 1, a number or an int64 tensor of no dimension.
        key1: the same.

    Returns:
        int32, of the shape of ``index``.
    """
    upper = _low32((index >> 32) * 0x9E3779B9 + key1)
    x = _mix32(_low32(index ^ key0), 15, 0xD168AAAD, 15, 0xAF723597, 15)
    return _mix32(x ^ upper, 17, 0x9E485565, 16, 0xEF1D6B47, 16)


def spread(index: Tensor, turns: int | Tensor) -> Tensor:
    """Return 32 bits an element that are evenly spread over steps, as the kernel has them.

    Args:
        index: int64, the elements' numbers in the whole parameter.
        turns: from 0 to 2^32 - 1, what all have moved on by.
    """
    x = _low32(index ^ ((index >> 32) * 0x27D4EB2F))
    x *= _signed(0x9E3779B1, 32)
    x ^= _shifted(x, 15, 32)
    x *= _signed(0x85EBCA77, 32)
    x ^= _shifted(x, 13, 32)
    return _low32(x.long() + turns)


def turned(bits: Tensor) -> Tensor:
    """Exchange the halves of 32 bits, int32."""
    return (bits << 16) | _shifted(bits, 16, 32)


def _mix32(x: Tensor, a: int, b: int, c: int, d: int, e: int) -> Tensor:
    """Permute the numbers of 32 bits; ``x`` is overwritten."""
    for shift, factor in ((a, b), (c, d)):
        x ^= _shifted(x, shift, 32)
        x *= _signed(factor, 32)
    x ^= _shifted(x, e, 32)
    return x


def stochastic(value: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Round values up or down to a neighbour, by chance, so that the mean is the value.

    Args:
        value: float32, or float64, which is rounded to float32 first; of any shape.
        bits: int32 of that shape, 32 random bits each.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
    """
    pattern = value.float().view(torch.int32)
    magnitude = pattern & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        infinity = 0x7F80
        # Beyond 2^31 - 1 a nan's sum is negative: nans are replaced below.
        rounded = (magnitude + _shifted(bits, 16, 32)) >> 16
    else:
        infinity = 0x7C00
        rounded = _stochastic_float16(magnitude, bits)
    rounded = rounded.clamp_(max=infinity - 1)
    rounded.masked_fill_(magnitude >= 0x7F800000, infinity)
    rounded.masked_fill_(magnitude > 0x7F800000, infinity | infinity >> 1)
    return (rounded | ((pattern >> 16) & 0x8000)).to(torch.int16).view(dtype)


def _stochastic_float16(magnitude: Tensor, bits: Tensor) -> Tensor:
    """Round finite float32 patterns to those of float16, without an upper limit."""
    exponent = magnitude >> 23
    normal = ((magnitude + _shifted(bits, 19, 32)) >> 13) - (112 << 10)
    below = 126 - exponent.clamp(max=112)
    significand = ((magnitude & 0x7FFFFF) | 0x800000) >> (below - 31).clamp(0, 31)
    below = below.clamp(max=31)
    noise = _shifted(bits, 1, 32) >> (31 - below)
    # In int64, because the sum may reach 2^31.
    subnormal = ((significand.long() + noise) >> below).int()
    return torch.where(exponent >= 113, normal, subnormal)


def _signed(x: Integer, width: int) -> Integer:
    """Take a number modulo 2^width into the signed range; tensors wrap around by themselves."""
    if isinstance(x, Tensor):
        return x
    half = 1 << (width - 1)
    return (x + half) % (2 * half) - half


def _shifted(x: Integer, count: int, width: int) -> Integer:
    """Shift to the right, zeros coming in."""
    return (x >> count) & ((1 << (width - count)) - 1)


def _low32(x: Tensor) -> Tensor:
    """Return the lower 32 bits of int64, in a tensor of its own."""
    return x.to(torch.int32)
