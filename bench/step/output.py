"""The result as it is kept: written whole after every group, so that a run cut short keeps it."""

from __future__ import annotations

import json
import math
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.environment import environment, slug
from bench.files import write_whole

SCHEMA = 1


def new(settings: dict[str, Any], device: str, measurement: bool, note: str) -> dict[str, Any]:
    """Return a result without figures."""
    return {
        "schema": SCHEMA,
        "kind": "bench",
        "measurement": measurement,
        "note": note,
        "environment": environment(device),
        "settings": settings,
        "copy": None,
        "missing": [],
        "rows": [],
        "host": [],
        "first_step": [],
        "per_sample": None,
        "training": None,
        "failed": [],
    }


class File:
    """Where a result goes.

    Args:
        folder: made if need be.
        result: whose device and commit name the files.

    Raises:
        OSError: where there can be no such folder.
    """

    def __init__(self, folder: Path, result: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.stem = folder / (slug(result["environment"]) + _suffix(result))
        self.json = self.path(".json")

    def path(self, ending: str) -> Path:
        """Return the path of one of the files."""
        return self.stem.with_name(self.stem.name + ending)

    def keep(self, result: dict[str, Any]) -> None:
        """Write what there is; whoever reads meanwhile sees the file before or the file after."""
        text = json.dumps(plain(result), indent=1, allow_nan=False)
        write_whole(self.json, text + "\n")


def _suffix(result: dict[str, Any]) -> str:
    """Return what keeps a run from replacing one that has measured more, or something else."""
    settings = result["settings"]
    suffix = f"-{settings['set']}" if settings["set"] in ("full", "quick") else ""
    if settings["partial"]:
        when = datetime.fromisoformat(result["environment"]["date"])
        suffix += f"-partial-{when:%Y%m%d-%H%M%S}"
    return suffix


def plain(value: Any) -> Any:
    """Return what strict JSON can say, with no more digits than mean something."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value
