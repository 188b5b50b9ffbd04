"""What the options of precision of a group come to: a codec and a type for each tensor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..kernels import weight_average
from ..kernels.codecs import format as device
from ..kernels.rule import Group, Rule

# Of 8-bit states by option: the codec of a state of either sign, and of one that is never below 0.
_CODES = {
    "int8": (device.SIGNED, device.UNSIGNED),
    "fp8": (device.FLOAT8, device.POSITIVE_FLOAT8),
}
CODE_DTYPES = {
    device.SIGNED: torch.int8,
    device.UNSIGNED: torch.uint8,
    device.FLOAT8: torch.float8_e4m3fn,
    device.POSITIVE_FLOAT8: torch.float8_e4m3fn,
}
# Of each master, the codec, and the type of what is kept beside the parameter.
_MASTERS = {
    "remainder": (device.REMAINDER, torch.int16),
    "remainder8": (device.REMAINDER, torch.int8),
    "float32": (device.FLOAT32, torch.float32),
}
SCALE = "_scale"
# Keys of what is kept beside a parameter, which belongs to it.
COMPANIONS = ("master", "compensation")
CODED = frozenset(CODE_DTYPES.values())
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class StateFormat:
    """How one state is kept.

    Attributes:
        name: of the state.
        codec: one of those in ``kernels/codecs/format.py``.
        dtype: of its tensor; None for the parameter's, or whatever floating type it has.
    """

    name: str
    codec: str
    dtype: torch.dtype | None

    @cached_property
    def is_coded(self) -> bool:
        """Whether a scale stands beside it."""
        return self.codec in device.CODES

    @property
    def names(self) -> tuple[str, ...]:
        """Keys of the state dictionary that hold it."""
        return (self.name, self.name + SCALE) if self.is_coded else (self.name,)


@dataclass(frozen=True)
class GroupFormat:
    """How the parameters of a group and their states are kept.

    Attributes:
        parameter: the codec of parameters.
        companion: key of the state dictionary that holds the rest of a parameter, or None.
        companion_dtype: its type; None for the parameter's.
        states: in the order in which the rule takes them.
        seed: of what is rounded stochastically.
        average: how the average of the weights is kept; None for none.
    """

    parameter: str
    companion: str | None
    companion_dtype: torch.dtype | None
    states: tuple[StateFormat, ...]
    seed: int
    average: StateFormat | None = None

    @cached_property
    def kept(self) -> tuple[StateFormat, ...]:
        """The states, and the average."""
        return self.states if self.average is None else (*self.states, self.average)

    @cached_property
    def is_plain(self) -> bool:
        """Whether all is as torch keeps it."""
        casts = all(s.codec == device.CAST and s.dtype is None for s in self.states)
        return casts and self.parameter == device.CAST and self.average is None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Keys of the state dictionary that hold tensors, in the order of the address table."""
        own = () if self.companion is None else (self.companion,)
        return own + tuple(name for state in self.kept for name in state.names)

    @cached_property
    def device(self) -> device.Format:
        """What the kernel is compiled for."""
        codecs = tuple(state.codec for state in self.kept)
        found = device.Format(self.parameter, codecs, self.average is not None)
        return device.Format(average=found.average) if found.is_cast else found

    @cached_property
    def codecs(self) -> dict[str, str]:
        """For the key of each coded state, its codec."""
        return {state.name: state.codec for state in self.states if state.is_coded}

    @cached_property
    def _dtypes(self) -> dict[str, torch.dtype | None]:
        found = {state.name: state.dtype for state in self.kept}
        if self.companion is not None:
            found[self.companion] = self.companion_dtype
        return found

    def dtype(self, name: str, parameter: torch.dtype) -> torch.dtype:
        """Return the type of a tensor that is kept, for a parameter of some type."""
        if name not in self._dtypes:
            return torch.float32  # a scale
        return _like(self._dtypes[name] or parameter, parameter)

    def is_free(self, name: str) -> bool:
        """Whether a tensor may have any floating type, as a state that torch keeps."""
        return name in self._dtypes and self._dtypes[name] is None and name != self.companion


def _like(dtype: torch.dtype, parameter: torch.dtype) -> torch.dtype:
    return dtype.to_complex() if parameter.is_complex and not dtype.is_complex else dtype


def format_of(rule: Rule, group: Group) -> GroupFormat:
    """Read the options of precision of a group, which ``check_options`` has found to be sound."""
    parameter, companion, companion_dtype = device.CAST, None, None
    rounding, master = group.get("rounding"), group.get("master")
    if master is not None:
        parameter, companion_dtype = _MASTERS[master]
        companion = "master"
        if rounding is not None:
            parameter = device.REMAINDER_STOCHASTIC
    elif rounding == "stochastic":
        parameter = device.STOCHASTIC
    elif rounding == "kahan":
        parameter, companion = device.KAHAN, "compensation"
    states = tuple(_state(rule, name, group.get("state_dtype")) for name in rule.states(group))
    seed = group.get("rounding_seed", 0)
    return GroupFormat(parameter, companion, companion_dtype, states, seed, _average(group))


def _average(group: Group) -> StateFormat | None:
    if group.get(weight_average.DECAY) is None:
        return None
    dtype = group.get(weight_average.DTYPE)
    # To nearest, an average of which a step moves less than half a unit would stay where it is.
    codec = device.STOCHASTIC if dtype in _HALVES else device.CAST
    return StateFormat(weight_average.NAME, codec, dtype)


def _state(rule: Rule, name: str, option: Any) -> StateFormat:
    if isinstance(option, dict):
        option = option.get(name)
    if isinstance(option, str):
        codec = _CODES[option][name in rule.nonnegative]
        return StateFormat(name, codec, CODE_DTYPES[codec])
    positive = option == torch.float16 and name in rule.nonnegative
    return StateFormat(name, device.POSITIVE_CAST if positive else device.CAST, option)


def codec_of(dtype: torch.dtype, nonnegative: bool) -> str | None:
    """Return how a state of some type is coded; None for what are no codes of such a state.

    Args:
        dtype: of its tensor.
        nonnegative: whether it is never below 0.
    """
    if dtype == torch.float8_e4m3fn:
        return device.POSITIVE_FLOAT8 if nonnegative else device.FLOAT8
    codec = device.UNSIGNED if nonnegative else device.SIGNED
    return codec if dtype == CODE_DTYPES[codec] else None


def keeps_state(rule: Rule, group: Group) -> bool:
    """Whether anything is kept of a group's parameters: tensors, or the step."""
    if rule.counts_steps:
        return True
    format = format_of(rule, group)
    return bool(format.names) or format.device.counts


def keeps_steps(rule: Rule, group: Group) -> bool:
    """Whether ``state["step"]`` is kept: the rule reads it, or what is stored depends on it."""
    return rule.counts_steps or format_of(rule, group).device.counts
