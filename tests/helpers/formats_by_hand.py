"""How parameters and states are kept, read by hand: from the text of docs and docstrings alone.

Nothing of the package is used. Values are float64, in the shape of the parameter.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

GROUP = 128
# Relative errors of float32 arithmetic between memory and memory: six roundings.
ARITHMETIC = 6 * 2.0**-24
# Of one rounding to nearest.
HALF_UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8,
             torch.float16: 2.0**-11}  # fmt: skip
FLOAT8 = torch.float8_e4m3fn
NONNEGATIVE = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "size")


def _pattern(x: Any) -> Any:
    return numpy.asarray(x, numpy.float32).view(numpy.int32).astype(numpy.int64)


@functools.cache
def levels(dtype: torch.dtype) -> Tensor:
    """What the codes 0, 1, ... without their sign stand for, relative to the scale."""
    if dtype == FLOAT8:
        # 4 bits of exponent, 3 of mantissa; the last of 128 patterns is nan.
        code = torch.arange(127, dtype=torch.float64)
        exponent, mantissa = (code / 8).floor(), code % 8
        small = mantissa * 2.0**-9
        return torch.where(exponent == 0, small, (8 + mantissa) * 2 ** (exponent - 10)) / 448
    largest, power = {torch.int8: (127, 3), torch.uint8: (255, 6)}[dtype]
    q = numpy.arange(largest + 1)
    bits = power * (_pattern(q) - _pattern(largest)) + _pattern(1.0)
    level = bits.astype(numpy.int32).view(numpy.float32).astype(numpy.float64)
    level[0] = 0
    return torch.from_numpy(level)


def code_type(option: str, name: str) -> torch.dtype:
    """In what a state of a name is kept under ``state_dtype`` "int8" or "fp8"."""
    if option == "fp8":
        return FLOAT8
    return torch.uint8 if name in NONNEGATIVE else torch.int8


def group_dim(shape: Sequence[int]) -> int:
    """From which dimension on elements are in rows: the last one with 128 elements behind it."""
    size = 1
    for dim in range(len(shape) - 1, -1, -1):
        size *= shape[dim]
        if size >= GROUP:
            return dim
    return 0


def scale_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Scales stand for up to 128 elements of the dimensions that groups run along."""
    dim = group_dim(shape)
    row = int(numpy.prod(shape[dim:], dtype=int))
    return (*shape[:dim], -(-row // GROUP))


def spread(scale: Tensor, shape: Sequence[int]) -> Tensor:
    """Each element's scale, from those of the groups."""
    dim = group_dim(shape)
    row = int(numpy.prod(shape[dim:], dtype=int))
    rows = scale.double().reshape(int(numpy.prod(shape[:dim], dtype=int)), -1)
    return rows.repeat_interleave(GROUP, 1)[:, :row].reshape(tuple(shape))


def group_max(x: Tensor) -> Tensor:
    """Largest magnitude of each group, in the shape of the scales."""
    dim = group_dim(x.shape)
    row = int(numpy.prod(x.shape[dim:], dtype=int))
    rows = x.abs().reshape(int(numpy.prod(x.shape[:dim], dtype=int)), row)
    rows = torch.nn.functional.pad(rows, (0, -row % GROUP))
    return rows.reshape(len(rows), -(-row // GROUP), GROUP).amax(2).reshape(scale_shape(x.shape))


def split_code(code: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitude and sign of codes, as int64."""
    if code.dtype == FLOAT8:
        byte = code.view(torch.uint8).long()
        return byte & 127, torch.where(byte > 127, -1, 1)
    return code.long().abs(), torch.where(code.long() < 0, -1, 1)


def is_code(x: Tensor) -> bool:
    """Whether a tensor holds 8-bit codes."""
    return x.dtype in (torch.int8, torch.uint8, FLOAT8)


def read(state: Mapping[str, Tensor], name: str) -> Tensor:
    """A state in float64, of whatever it is kept in."""
    kept = state[name]
    if not is_code(kept):
        return kept.to(torch.float64, copy=True)
    size, sign = split_code(kept)
    return levels(kept.dtype)[size] * sign * spread(state[f"{name}_scale"], kept.shape)


def assert_encoded(
    state: Mapping[str, Tensor], name: str, exact: Tensor, arithmetic: float = ARITHMETIC
) -> None:
    """Assert that codes and scale are a state's: the codes next to each value, up or down."""
    code, scale = state[name], state[f"{name}_scale"]
    assert scale.dtype == torch.float32 and tuple(scale.shape) == scale_shape(exact.shape), name
    largest = group_max(exact)
    apart = (scale.double() - largest).abs()
    assert (apart <= 4 * arithmetic * largest + 1e-45).all(), f"{name}: scale off by {apart.max()}"
    size, sign = split_code(code)
    table = torch.cat((levels(code.dtype), torch.tensor([torch.inf], dtype=torch.float64)))
    share = exact / spread(scale, exact.shape).clamp(min=1e-300)
    slack = 8 * arithmetic * share.abs()
    below, above = table[(size - 1).clamp(min=0)], table[size + 1]
    if name in NONNEGATIVE:
        assert ((size > 0) | (exact == 0)).all(), f"{name}: a value above 0 has code 0"
        below = torch.where(size == 1, 0.0, below)
    inside = (share.abs() - slack < above) & ((share.abs() + slack > below) | (size == 0))
    assert inside.all(), (
        f"{name}: {int((~inside).sum())} codes are not next to their values: "
        f"{code[~inside][:3].float()} for {share[~inside][:3]}"
    )
    assert ((size == 0) | (sign == torch.where(exact < 0, -1, 1))).all(), f"{name}: signs"


def joined(p: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """A parameter in float64, with what is kept beside it."""
    p = p.detach()
    if "compensation" in state:
        return p.double() + state["compensation"].double()
    rest = state.get("master")
    if rest is None:
        return p.to(torch.float64, copy=True)
    if rest.dtype == torch.float32:
        return rest.double()
    shift = 0 if rest.dtype == torch.int16 else 8
    high = p.contiguous().view(torch.int16).long() << 16
    return (high + (rest.long() << shift)).to(torch.int32).view(torch.float32).double()


def rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The neighbours of float64 values in a type, as float64: at or below, and at or above."""
    near = x.to(dtype)
    other = torch.nextafter(near, torch.where(near.double() < x, torch.inf, -torch.inf).to(dtype))
    other = torch.where(near.double() == x, near, other)
    return torch.minimum(near, other).double(), torch.maximum(near, other).double()
