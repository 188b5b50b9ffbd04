"""Checks of arguments, written so that nan fails, and arguments as Python's numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def number(name: str, value: Any) -> float:
    """Return a number, or what a tensor or an array of one number holds, as Python's.

    A tensor among numbers would make tensors of what is computed from them.

    Raises:
        TypeError: for what is no number.
        ValueError: for an integer beyond the largest float.
    """
    found = value
    if isinstance(value, Tensor):
        found = value.item() if value.numel() == 1 else value
    elif getattr(value, "ndim", None) == 0:
        found = value.item()
    # True counts as 1, and is a flag that went into the wrong argument.
    if isinstance(found, bool) or not isinstance(found, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        converted = float(found)
    except OverflowError:
        raise ValueError(f"{name} must be finite, and is an integer beyond all floats") from None
    return found if isinstance(found, int) else converted


def positive(name: str, value: Any) -> float:
    """Return the number; raise ValueError for what is not positive and finite."""
    found = number(name, value)
    if not 0 < found < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return found


def not_negative(name: str, value: Any) -> float:
    """Return the number; raise ValueError for what is negative or not finite."""
    found = number(name, value)
    if not 0 <= found < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")
    return found


def finite(name: str, value: Any) -> float:
    """Return the number; raise ValueError for what is not finite."""
    found = number(name, value)
    if not math.isfinite(found):
        raise ValueError(f"{name} must be finite, got {value}")
    return found


def decay(name: str, value: Any) -> float:
    """Return the number; raise ValueError for what is no decay of an average."""
    found = number(name, value)
    if not 0.0 <= found < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value}")
    return found


def check_optimizer(optimizer: Any) -> None:
    """Raise TypeError for what is no optimizer of torch's, but, say, holds one."""
    if isinstance(optimizer, Optimizer):
        return
    kind = type(optimizer).__name__
    holds = isinstance(getattr(optimizer, "optimizer", None), Optimizer)
    remedy = f": pass {kind.lower()}.optimizer" if holds else ""
    raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {kind}{remedy}")


def saved(state_dict: Any, key: str, check: Callable[[str, Any], Any]) -> Any:
    """Return an entry of a state that was saved, as ``check`` returns it.

    Raises:
        ValueError: where it is not there, or ``check`` raises.
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"the state must be a dictionary of state_dict(), got {state_dict!r}")
    if key not in state_dict:
        raise ValueError(f"the state has no {key!r}, but {', '.join(map(str, state_dict))}")
    try:
        return check(f"state_dict[{key!r}]", state_dict[key])
    except TypeError as error:
        raise ValueError(str(error)) from error


def finite_numbers(name: str, values: Any) -> list[float]:
    """Return a list of numbers; raise TypeError for none, ValueError for one that is not finite."""
    if not isinstance(values, list | tuple):
        raise TypeError(f"{name} must be a list of numbers, got {values!r}")
    return [finite(f"{name}[{i}]", value) for i, value in enumerate(values)]
