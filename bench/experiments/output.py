"""Where a result was measured, and how it is written down."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]


def environment(device: str) -> dict[str, Any]:
    """Return the versions, the device by its maker's name, and the commit if git knows it."""
    return {
        **{name: _version(name) for name in ("fusedopt", "torch", "triton", "scikit-learn")},
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else _processor(),
        "threads": torch.get_num_threads(),
        "commit": _git("rev-parse", "HEAD"),
        # Results of an earlier experiment do not make this one's code another.
        "uncommitted_changes": bool(
            _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
        ),
    }


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
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write(result: dict[str, Any], figure: Figure, folder: Path) -> None:
    """Write NAME.json and NAME.png into the folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / result["experiment"]
    text = json.dumps(_plain(result), indent=1, allow_nan=False)
    file.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    figure.savefig(file.with_suffix(".png"), dpi=110)


def _plain(value: Any) -> Any:
    """Return what strict JSON can say: null for what is not finite, and no more digits than mean
    something.
    """
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


def report(result: dict[str, Any], folder: Path, console: Console) -> None:
    """Print the claims with what was measured, and last, in one line, whether they hold."""
    table = Table(title=f"{result['title']} ({result['seconds']:.0f} s)")
    for column in ("claim", "measured", "bound", "holds"):
        table.add_column(column)
    for claim in result["claims"]:
        numbers = (f"{claim[key]:.4g}" for key in ("measured", "bound"))
        table.add_row(claim["claim"], *numbers, "yes" if claim["holds"] else "NO")
    console.print(table)
    console.print(f"Wrote {folder / result['experiment']}.json and .png", soft_wrap=True)
    failed = [claim["claim"] for claim in result["claims"] if not claim["holds"]]
    verdict = f"{len(failed)} DO NOT HOLD: {'; '.join(failed)}" if failed else "all HOLD"
    count = len(result["claims"])
    console.print(f"{result['experiment']}: of {count} claims {verdict}", soft_wrap=True)
