"""States in a pickle of an optimizer: torch's of an 8-bit float does not load."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..formats.saved import viewed

Entry = tuple[Tensor, str]


def as_patterns(states: Mapping[Tensor, Any]) -> tuple[Mapping[Tensor, Any], list[Entry]]:
    """Return states with the patterns of 8-bit floats in their place, as integers, and where."""
    found: list[Entry] = []
    for p, state in states.items():
        if isinstance(state, Mapping):
            found += [(p, name) for name, value in state.items() if _is_float8(value)]
    if not found:
        return states, found
    shown: dict[Tensor, Any] = defaultdict(dict, states)
    shown |= {p: dict(states[p]) for p, _ in found}
    for p, name in found:
        shown[p][name] = viewed(shown[p][name], torch.uint8)
    return shown, found


def as_floats(states: Mapping[Tensor, Any], patterns: Sequence[Entry]) -> None:
    """Undo ``as_patterns``, in place."""
    for p, name in patterns:
        states[p][name] = viewed(states[p][name], torch.float8_e4m3fn)


def _is_float8(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float8_e4m3fn
