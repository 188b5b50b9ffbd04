"""Where a result was measured: device, versions and commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fusedopt
from fusedopt.kernels.lang import triton

from .places import ROOT


def environment(device: str) -> dict[str, Any]:
    """Return the versions, the device by its maker's name, and the commit if git knows it.

    Versions are those of the modules that run: a checkout need not be installed.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:0"``.

    Returns:
        Plain values: memory and cache in bytes, the power limit in watts; None where unknown.
    """
    # Results of an earlier run do not make this one's code another.
    results = ":!bench/results", ":!experiments/results"
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *results)
    return {
        "fusedopt": fusedopt.__version__,
        "torch": torch.__version__,
        # Which tensors of a step share a launch of torch's fused kernels depends on it.
        "cuda": torch.version.cuda or torch.version.hip,
        "triton": None if triton is None else triton.__version__,
        "scikit-learn": _version("scikit-learn"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        # A copy of a checkout may have come without git, or with that of another commit.
        "commit": os.environ.get("FUSEDOPT_COMMIT") or _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        **_device(device),
    }


def _device(device: str) -> dict[str, Any]:
    if not device.startswith("cuda"):
        unknown = ("driver", "power_limit_w", "capability", "processors", "memory_bytes")
        return {"device": _processor(), **dict.fromkeys(unknown), "l2_bytes": None}
    properties = torch.cuda.get_device_properties(device)
    driver, power = _smi(device)
    return {
        "device": torch.cuda.get_device_name(device),
        "driver": driver,
        "power_limit_w": power,
        "capability": list(torch.cuda.get_device_capability(device)),
        "processors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
    }


def _smi(device: str) -> tuple[str | None, float | None]:
    """Return the driver's version and the power limit, as nvidia-smi prints them."""
    index = torch.device(device).index or 0
    fields = "--query-gpu=driver_version,power.limit"
    text = _output("nvidia-smi", "-i", str(index), fields, "--format=csv,noheader,nounits")
    driver, _, power = (text or "").partition(",")
    try:
        return driver.strip() or None, float(power)
    except ValueError:
        return driver.strip() or None, None


def device_slug(name: str) -> str:
    """Return a device's name as a file or a folder may have it."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def slug(facts: dict[str, Any]) -> str:
    """Return the name under which results of a device and a commit are kept."""
    return f"{device_slug(facts['device'])}-{(facts['commit'] or 'unknown')[:9]}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def _git(*arguments: str) -> str | None:
    return _output("git", "-C", str(ROOT), *arguments)


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
