"""The result as it is kept: where and with what it was measured, and its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import fusedopt
from bench.experiments import output
from fusedopt.kernels.lang import triton

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
    """Return what ran, by the modules themselves: a checkout need not be installed."""
    facts = output.environment(device) | {
        "fusedopt": fusedopt.__version__,
        "torch": torch.__version__,
        "triton": None if triton is None else triton.__version__,
        "opt_einsum": torch.backends.opt_einsum.is_available(),
        "bf16_reduced_precision_reduction": (
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        ),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "cuda": torch.version.cuda or torch.version.hip,
            "capability": list(torch.cuda.get_device_capability()),
            "processors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    return facts


def keep(result: dict[str, Any], folder: Path) -> None:
    """Write what there is so far, in case that the run does not come to its end."""
    folder.mkdir(parents=True, exist_ok=True)
    result["aims"] = aims(result)
    (folder / "per_sample.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


def write(result: dict[str, Any], folder: Path) -> None:
    """Write JSON and PNG."""
    result["aims"] = aims(result)
    output.write(result, draw(result), folder)
