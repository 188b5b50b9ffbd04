"""Checks of numbers, written so that nan fails."""

from __future__ import annotations

import math
from typing import Any


def check_positive(name: str, value: float) -> None:
    """Raise ValueError for what is not positive and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_not_negative(name: str, value: float) -> None:
    """Raise ValueError for what is negative or not finite."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")


def check_decay(name: str, value: Any) -> None:
    """Raise ValueError for what is no decay of an average."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value}")
