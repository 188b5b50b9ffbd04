"""The result as it is kept: where and with what it was measured, and its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from bench.environment import environment
from bench.files import write_whole
from experiments import output

from .aims import aims
from .figure import draw


def new(settings: dict[str, Any], device: str, measurement: bool, note: str) -> dict[str, Any]:
    """Return a result without figures."""
    return {
        "experiment": "per_sample",
        "measurement": measurement,
        "note": note,
        "settings": settings,
        "environment": _environment(device),
        "linear": [],
        "training": None,
        "aims": [],
        "failed": [],
    }


def _environment(device: str) -> dict[str, Any]:
    """Return what ran, with what decides how torch forms products of many factors."""
    return environment(device) | {
        "opt_einsum": torch.backends.opt_einsum.is_available(),
        "bf16_reduced_precision_reduction": (
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        ),
    }


def keep(result: dict[str, Any], folder: Path) -> None:
    """Write what there is so far, in case that the run does not come to its end."""
    result["aims"] = aims(result)
    write_whole(folder / "per_sample.json", json.dumps(result, indent=1))


def write(result: dict[str, Any], folder: Path) -> None:
    """Write JSON and PNG."""
    result["aims"] = aims(result)
    output.write(result, draw(result), folder)
