"""The result as it is kept: where and with what it was measured, and whether aims are met."""

from __future__ import annotations

from typing import Any

import torch

from bench.harness import output
from bench.harness.environment import environment

from .aims import aims


def new(settings: dict[str, Any], device: str, measurement: bool, note: str) -> dict[str, Any]:
    """Return a result without figures."""
    return {
        "experiment": "per_sample",
        **output.new(settings, _environment(device), measurement, note),
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


def keep(result: dict[str, Any], file: output.File) -> None:
    """Write what there is so far, in case that the run does not come to its end."""
    result["aims"] = aims(result)
    file.keep(result)
