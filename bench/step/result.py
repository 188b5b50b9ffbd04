"""The result as it is kept: its parts, and the name of its files."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from bench.harness import output
from bench.harness.environment import environment, slug

from . import SCHEMA


def new(settings: dict[str, Any], device: str, measurement: bool, note: str) -> dict[str, Any]:
    """Return a result without figures."""
    return {
        "schema": SCHEMA,
        "kind": "bench",
        **output.new(settings, environment(device), measurement, note),
        "copy": None,
        "missing": [],
        "rows": [],
        "host": [],
        "sharded": [],
        "first_step": [],
        "per_sample": None,
        "training": None,
        "failed": [],
    }


def file(folder: Path, result: dict[str, Any]) -> output.File:
    """Return where a result goes: its device and commit name the files.

    Raises:
        OSError: where there can be no such folder.
    """
    return output.File(folder, slug(result["environment"]) + _suffix(result))


def _suffix(result: dict[str, Any]) -> str:
    """Return what keeps a run from replacing one that has measured more, or something else."""
    settings = result["settings"]
    suffix = f"-{settings['set']}" if settings["set"] in ("full", "quick") else ""
    if settings["partial"]:
        when = datetime.fromisoformat(result["environment"]["date"])
        suffix += f"-partial-{when:%Y%m%d-%H%M%S}"
    return suffix
