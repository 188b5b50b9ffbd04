"""The device functions of ``kernels/codecs`` under the signatures of their twins in PyTorch.

Without a GPU they run in Triton's interpreter: set ``TRITON_INTERPRET=1`` before fusedopt is
imported.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedopt.kernels.codecs import kahan, masters, rounding
from fusedopt.kernels.lang import INTERPRETED, jit, tl

TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int16: tl.int16,
    torch.int8: tl.int8,
}

# The interpreter does a block by numpy; a GPU needs blocks that fit into registers.
BLOCK = 1 << 16 if INTERPRETED else 1024


def _launch(kernel, tensors, out, **constants) -> None:  # type: ignore[no-untyped-def]
    numel = out[0].numel()
    kernel[(math.ceil(numel / BLOCK),)](*tensors, *out, numel, **constants, BLOCK=BLOCK)


@jit
def _split(value, bits, parameter, rest, numel, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    noise = None
    if bits is not None:
        noise = tl.load(bits + offsets, mask).to(tl.uint32, bitcast=True)
    high, low = masters.split(tl.load(value + offsets, mask), noise, TYPE)
    tl.store(parameter + offsets, high, mask)
    tl.store(rest + offsets, low, mask)


def split(
    value: Tensor, remainder: torch.dtype, bits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Split as ``fusedopt.memory.masters.split`` does."""
    parameter = torch.zeros_like(value, dtype=torch.bfloat16)
    rest = torch.zeros_like(value, dtype=remainder)
    _launch(_split, (value, bits), (parameter, rest), TYPE=TYPES[remainder])
    return parameter, rest


@jit
def _join(parameter, rest, value, numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    joined = masters.join(tl.load(parameter + offsets, mask), tl.load(rest + offsets, mask))
    tl.store(value + offsets, joined, mask)


def join(parameter: Tensor, remainder: Tensor) -> Tensor:
    """Join as ``fusedopt.memory.masters.join`` does."""
    value = torch.zeros_like(parameter, dtype=torch.float32)
    _launch(_join, (parameter, remainder), (value,))
    return value


@jit
def _kahan_split(value, parameter, rest, numel, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    high, low = kahan.split(tl.load(value + offsets, mask), TYPE)
    tl.store(parameter + offsets, high, mask)
    tl.store(rest + offsets, low, mask)


def kahan_split(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Split as ``fusedopt.memory.kahan.split`` does."""
    parameter = torch.zeros_like(value, dtype=dtype)
    compensation = torch.zeros_like(parameter)
    _launch(_kahan_split, (value,), (parameter, compensation), TYPE=TYPES[dtype])
    return parameter, compensation


@jit
def _kahan_join(parameter, rest, value, numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    joined = kahan.join(tl.load(parameter + offsets, mask), tl.load(rest + offsets, mask))
    tl.store(value + offsets, joined, mask)


def kahan_join(parameter: Tensor, compensation: Tensor) -> Tensor:
    """Join as ``fusedopt.memory.kahan.join`` does."""
    value = torch.zeros_like(parameter, dtype=torch.float32)
    _launch(_kahan_join, (parameter, compensation), (value,))
    return value


@jit
def _stochastic(value, bits, out, numel, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    noise = tl.load(bits + offsets, mask).to(tl.uint32, bitcast=True)
    rounded = rounding.stochastic(tl.load(value + offsets, mask), noise, TYPE)
    tl.store(out + offsets, rounded, mask)


def stochastic(value: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Round as ``fusedopt.memory.rounding.stochastic`` does."""
    out = torch.zeros_like(value, dtype=dtype)
    _launch(_stochastic, (value, bits), (out,), TYPE=TYPES[dtype])
    return out


@jit
def _keys(triple, out):
    key0, key1 = rounding.keys(tl.load(triple), tl.load(triple + 1), tl.load(triple + 2))
    tl.store(out, key0.to(tl.int64))
    tl.store(out + 1, key1.to(tl.int64))


def keys(seed: int, parameter: int, step: int, device: str = "cpu") -> tuple[int, int]:
    """Form keys as ``fusedopt.memory.rounding.keys`` does."""
    out = torch.zeros(2, dtype=torch.int64, device=device)
    _keys[(1,)](torch.tensor([seed, parameter, step], device=device), out)
    key0, key1 = out.tolist()
    return key0, key1


@jit
def _random_bits(index, keys, out, numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    key0, key1 = tl.load(keys).to(tl.uint32), tl.load(keys + 1).to(tl.uint32)
    number = tl.load(index + offsets, mask)
    lower, upper = number.to(tl.uint32), (number >> 32).to(tl.uint32)
    bits = rounding.random_bits(lower, upper, key0, key1)
    tl.store(out + offsets, bits.to(tl.int32, bitcast=True), mask)


def random_bits(index: Tensor, key0: int, key1: int) -> Tensor:
    """Draw as ``fusedopt.memory.rounding.random_bits`` does."""
    out = torch.zeros_like(index, dtype=torch.int32)
    _launch(_random_bits, (index, torch.tensor([key0, key1], device=index.device)), (out,))
    return out
