"""The options of precision of a parameter group: which there are, and which go together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels import weight_average
from ..kernels.rule import Group, Rule

# With what they are by default.
OPTIONS: Mapping[str, Any] = {
    "state_dtype": None,
    "rounding": None,
    "master": None,
    "rounding_seed": 0,
}
_CODES = ("int8", "fp8")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ROUNDINGS = (None, "stochastic", "kahan")
_MASTERS = (None, "remainder", "remainder8", "float32")
_HALVES = (torch.bfloat16, torch.float16)


def check_options(rule: Rule, group: Group) -> None:
    """Raise ValueError for options that mean nothing, or nothing together.

    Args:
        rule: the update.
        group: a parameter group; what it lacks is as by default.
    """
    for name, dtype in _state_dtypes(rule, group):
        if dtype is not None and dtype not in _FLOATS and dtype not in _CODES:
            where = f"state_dtype[{name!r}]" if name else "state_dtype"
            raise ValueError(
                f'{where} must be None, a floating torch.dtype, "int8" or "fp8", got {dtype!r}'
            )
        for state in rule.states(group):
            why = _too_coarse(rule, group, state, dtype) if name in ("", state) else None
            if why is not None:
                sound = {
                    own: dtype
                    for own in rule.states(group)
                    if _too_coarse(rule, group, own, dtype) is None
                }
                raise ValueError(
                    f"state_dtype={dtype!r} is too coarse for {state!r}: {why}."
                    + (f" Ask for {sound!r}, which leaves it out" if sound else "")
                )
    rounding, master = group.get("rounding"), group.get("master")
    for option, value, allowed in (
        ("rounding", rounding, _ROUNDINGS),
        ("master", master, _MASTERS),
    ):
        if value not in allowed:
            choices = ", ".join(map(repr, allowed))
            raise ValueError(f"{option} must be one of {choices}, got {value!r}")
    if master is not None and rounding is not None and (master, rounding) not in _TOGETHER:
        raise ValueError(
            f"rounding={rounding!r} does not go with master={master!r}: {_WHY_NOT[rounding]}. Leave"
            " one of them out"
        )
    seed = group.get("rounding_seed", 0)
    if type(seed) is not int or not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"rounding_seed must be an int of 64 bits, got {seed!r}")
    if group.get(weight_average.DECAY) is not None:
        decay, dtype, start = map(group.get, weight_average.OPTIONS)
        check_average(decay, dtype, start)


def check_average(decay: Any, dtype: Any, start: Any, prefix: str = "average_") -> None:
    """Raise ValueError for options of an average of the weights that mean nothing.

    Args:
        decay: a number, or a tensor of one, whose value is read where it is used.
        dtype: of the average; None for the parameter's.
        start: the steps before it.
        prefix: of the names in messages.
    """
    number = isinstance(decay, (int, float)) and not isinstance(decay, bool) and 0 <= decay <= 1
    if not number and not (isinstance(decay, Tensor) and decay.numel() == 1):
        raise ValueError(f"{prefix}decay must be a number from 0 to 1, got {decay!r}")
    if dtype not in (None, torch.float32, *_HALVES):
        raise ValueError(
            f"{prefix}dtype must be torch.float32, torch.bfloat16, torch.float16, or None for the"
            f" parameter's, got {dtype!r}"
        )
    if type(start) is not int or start < 0:
        raise ValueError(f"{prefix}start must be an int of at least 0, got {start!r}")


def _too_coarse(rule: Rule, group: Group, state: str, dtype: Any) -> str | None:
    """Say what would become of an update by a state in few bits; None where that is sound."""
    differing = rule.differing(group)
    if state in differing and (dtype in _CODES or dtype in _HALVES):
        return (
            f"the update takes the root of a difference of {' and '.join(differing)}, which would"
            " fall below 0"
        )
    if state in rule.summing and dtype in _CODES:
        return "it is a sum of steps, and what one step adds would be rounded away"
    if state in rule.peaking(group) and dtype in _CODES:
        return "the largest over time is kept, which would grow by what codes are rounded up by"
    return None


# An 8-bit remainder is what a float32 is rounded to.
_TOGETHER = (("remainder8", "stochastic"),)
_WHY_NOT = {
    "stochastic": 'the master is exact, and nothing is rounded (that of "remainder8" is)',
    "kahan": "either keeps what rounding the parameter leaves over",
}


def _state_dtypes(rule: Rule, group: Group) -> Iterator[tuple[str, Any]]:
    """Yield the options of single states by name, or that of all under no name."""
    option = group.get("state_dtype")
    if not isinstance(option, dict):
        yield "", option
        return
    # Also those that an option of the group switches on, which may come later.
    known = {name for own in (group, *rule.example_groups) for name in rule.states(own)}
    for name, dtype in option.items():
        if name not in known:
            states = ", ".join(map(repr, sorted(known))) or "no states"
            raise ValueError(f"state_dtype has {name!r}; {rule.name} keeps {states}")
        yield name, dtype


def check_parameters(group: Group) -> None:
    """Raise ValueError for a group that has a parameter whose type its options do not fit.

    Args:
        group: with options that are sound.
    """
    asked = ("state_dtype", "rounding", "master", weight_average.DECAY)
    if all(group.get(name) is None for name in asked):
        return
    shapes = (f"one of shape {tuple(p.shape)}" for p in group["params"])
    names = map(repr, group["param_names"]) if group.get("param_names") else shapes
    for p, name in zip(group["params"], names, strict=False):
        _check_parameter(group, p, name)


def _check_parameter(group: Group, p: Tensor, which: str) -> None:
    rounding, master = group.get("rounding"), group.get("master")
    for option, value in (("rounding", rounding), ("master", master)):
        allowed = (torch.bfloat16,) if str(value).startswith("remainder") else _HALVES
        if value is not None and p.dtype not in allowed:
            names = " or ".join(map(str, allowed))
            raise ValueError(
                f"{option}={value!r} is for parameters of {names}, and {which} is {p.dtype}. Put it"
                f" into a parameter group of its own, with {option}=None"
            )
    states = group.get("state_dtype")
    asked = states.values() if isinstance(states, dict) else (states,)
    if p.is_complex():
        for dtype in asked:
            if dtype is not None and dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"state_dtype={dtype!r} is for real parameters, and {which} is {p.dtype}. Put"
                    " it into a parameter group of its own, with state_dtype=None"
                )
    if group.get(weight_average.DECAY) is not None:
        _check_averaged(group.get(weight_average.DTYPE), p, which)


def _check_averaged(dtype: torch.dtype | None, p: Tensor, which: str) -> None:
    name = weight_average.DTYPE
    if dtype is None and p.dtype in _HALVES:
        raise ValueError(
            f"{name}=None keeps the average of {which} in {p.dtype}, which is to be asked for:"
            f" {name}={p.dtype} rounds it stochastically, torch.float32 hardly at all"
        )
    if dtype in _HALVES and p.is_complex():
        raise ValueError(
            f"{name}={dtype} is for real parameters, and {which} is {p.dtype}. Put it into a"
            f" parameter group of its own, with {name}=torch.float32"
        )
