"""What a contender may come to, whatever it competes in."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch

# What a row or an entry says of a contender.
MEASURED, UNFIT, FAILED, SKIPPED = "measured", "does not fit", "failed", "skipped"


class Mismatch(Exception):
    """Results differ by more than rounding: no time of theirs means anything.

    Args:
        message: what differs, and by how much.
        error: the distance, if one was taken.
    """

    def __init__(self, message: str, error: Any = None) -> None:
        super().__init__(message)
        self.error = error


def first_line(error: BaseException) -> str:
    """Return what an error is, without its trace."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


def load(name: str) -> tuple[ModuleType | None, str | None]:
    """Import a module of another library; return it, or None and why it cannot be used."""
    try:
        return importlib.import_module(name), None
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        is_itself = missing == name.partition(".")[0]
        return None, "not installed" if is_itself else f"needs {error.name}"
    except Exception as error:  # whatever keeps it from working with this torch
        return None, first_line(error)


def backend_of(device: torch.device) -> str:
    """Return the backend of this library that is measured on a device."""
    return "reference" if device.type == "cpu" else "triton"
