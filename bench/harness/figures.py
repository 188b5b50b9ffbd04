"""What the pictures of results have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def heading(text: str, result: dict[str, Any], tiny: str) -> str:
    """Return a picture's heading, with what a reader has to know before its figures.

    Args:
        text: what is drawn, and of what device.
        result: with "measurement" and "note".
        tiny: what is small in a result that is no measurement.
    """
    if not result["measurement"]:
        return f"{text}\nNOT A MEASUREMENT: tiny {tiny}"
    return f"{text}\n{result['note']}" if result["note"] else text


def save(figure: Figure, path: Path) -> None:
    """Write a picture."""
    figure.savefig(path, dpi=110)
