"""Results as they are kept: files that may be read while a run goes on, or after it was killed."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def new(
    settings: dict[str, Any], environment: dict[str, Any], measurement: bool, note: str
) -> dict[str, Any]:
    """Return what every result begins with.

    Args:
        settings: what was asked for.
        environment: where it is measured, as ``bench.harness.environment`` has it.
        measurement: whether its figures mean anything.
        note: what a reader has to know first, or "".
    """
    return {
        "measurement": measurement,
        "note": note,
        "environment": environment,
        "settings": settings,
    }


class File:
    """Where a result goes: a JSON file, and pictures beside it.

    Args:
        folder: made if need be.
        name: of the files, without an ending.

    Raises:
        OSError: where there can be no such folder.
    """

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.stem = folder / name
        self.json = self.path(".json")

    def path(self, ending: str) -> Path:
        """Return the path of one of the files."""
        return self.stem.with_name(self.stem.name + ending)

    def keep(self, result: dict[str, Any]) -> None:
        """Write what there is; whoever reads meanwhile sees the file before or the file after."""
        write_json(self.json, result)


def write_json(path: Path, value: Any) -> None:
    """Write a value as strict JSON, whole."""
    write_whole(path, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file; at every moment there is the one before or the one after.

    Args:
        path: its folder is made if need be.
        text: all that it is to hold.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def plain(value: Any) -> Any:
    """Return what strict JSON can say: null for what is not finite, and no more digits than mean
    something.
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value
