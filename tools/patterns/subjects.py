"""What is checked: a codec, what goes through it, and the errors that it may make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fusedopt.memory import kahan, masters, rounding

from . import checks

TWINS = SimpleNamespace(
    split=masters.split,
    join=masters.join,
    kahan_split=kahan.split,
    kahan_join=kahan.join,
    stochastic=rounding.stochastic,
    random_bits=rounding.random_bits,
)


@dataclass(frozen=True)
class Subject:
    """One codec and one question.

    Attributes:
        name: what it is called in the result.
        patterns: how many there are: all of 32 bits, or of parameter and remainder.
        check: from the patterns (int64), counts; ``checks`` has what the names mean.
        limits: the largest errors allowed, by name.
    """

    name: str
    patterns: int
    check: Callable[[Tensor], checks.Counts]
    limits: dict[str, int] = field(default_factory=dict)


def subjects(functions: Any = TWINS) -> list[Subject]:
    """List everything, for the twins or what stands in their place."""
    return [
        _master("remainder", functions, torch.int16, False, (0, 1, 1 << 15)),
        _master("remainder8", functions, torch.int8, False, (128, 511, (1 << 15) + 128)),
        _master("remainder8, stochastic", functions, torch.int8, True, (255, 511, (1 << 15) + 255)),
        _pairs("remainder", functions, torch.int16),
        _pairs("remainder8", functions, torch.int8),
        *(_stochastic(functions, dtype) for dtype in (torch.bfloat16, torch.float16)),
        *(_kahan(functions, dtype) for dtype in (torch.bfloat16, torch.float16)),
        *(_kahan_pairs(functions, dtype) for dtype in (torch.bfloat16, torch.float16)),
    ]


def _bits(functions: Any, pattern: Tensor) -> Tensor:
    return functions.random_bits(pattern, *rounding.keys(0, 0, 1))


def _master(
    name: str, functions: Any, kind: torch.dtype, random: bool, limits: tuple[int, int, int]
) -> Subject:
    def check(pattern: Tensor) -> checks.Counts:
        bits = _bits(functions, pattern) if random else None
        return checks.master(_float32(pattern), functions.split, functions.join, kind, bits)

    below, top, shown = limits
    return Subject(
        f"{name}: float32 values",
        1 << 32,
        check,
        {
            "master: error below the largest bfloat16, worst": below,
            "master: error from there on, worst": top,
            "parameter: error below the largest bfloat16, worst": shown,
            "parameter: error from there on, worst": 0xFFFF,
        },
    )


def _pairs(name: str, functions: Any, kind: torch.dtype) -> Subject:
    split = partial(functions.split, remainder=kind)
    width = torch.iinfo(kind).bits

    def check(pattern: Tensor) -> checks.Counts:
        parameter = (pattern >> width).to(torch.int16).view(torch.bfloat16)
        return checks.pair(parameter, pattern.to(kind), split, functions.join)

    limits = {
        "value read: distance from the parameter, worst": 1 << 15,
        "value read: distance from the largest parameter, worst": 0xFFFF,
    }
    return Subject(f"{name}: pairs of parameter and remainder", 1 << (16 + width), check, limits)


def _stochastic(functions: Any, dtype: torch.dtype) -> Subject:
    def check(pattern: Tensor) -> checks.Counts:
        bits = _bits(functions, pattern)
        return checks.stochastic(_float32(pattern), bits, functions.stochastic, dtype)

    return Subject(f"stochastic rounding to {_short(dtype)}: float32 values", 1 << 32, check)


def _kahan(functions: Any, dtype: torch.dtype) -> Subject:
    def check(pattern: Tensor) -> checks.Counts:
        value = _float32(pattern)
        return checks.compensated(value, functions.kahan_split, functions.kahan_join, dtype)

    return Subject(f"kahan, {_short(dtype)}: float32 values", 1 << 32, check)


def _kahan_pairs(functions: Any, dtype: torch.dtype) -> Subject:
    split = partial(functions.kahan_split, dtype=dtype)

    def check(pattern: Tensor) -> checks.Counts:
        parameter = (pattern >> 16).to(torch.int16).view(dtype)
        compensation = pattern.to(torch.int16).view(dtype)
        return checks.pair(parameter, compensation, split, functions.kahan_join)

    return Subject(f"kahan, {_short(dtype)}: pairs of parameter and compensation", 1 << 32, check)


def _float32(pattern: Tensor) -> Tensor:
    return pattern.to(torch.int32).view(torch.float32)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
