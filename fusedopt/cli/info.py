"""``python -m fusedopt info``: what this machine has, and which backend is used for it.

With ``--model-parameters`` or ``--shapes``: what a model and its optimizer keep and move.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from typing import Any

import torch

import fusedopt
from fusedopt import backends
from fusedopt.cli import info_memory
from fusedopt.kernels import lang
from fusedopt.kernels.rules import REGISTRY


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--json", action="store_true", help="machine-readable output, nothing else")
    info_memory.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Print what was found."""
    if info_memory.is_wanted(options):
        return _run_memory(options)
    facts = collect()
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(title="fusedopt", show_header=False)
    for name, value in facts.items():
        if name != "devices":
            table.add_row(name, ", ".join(value) if isinstance(value, list) else str(value))
    devices = Table(title="devices")
    for column in ("device", "name", "backend", "why"):
        devices.add_column(column)
    for device in facts["devices"]:
        devices.add_row(device["device"], device["name"], device["backend"], device["why"])
    console = Console()
    console.print(table)
    console.print(devices)
    return 0


def _run_memory(options: argparse.Namespace) -> int:
    try:
        found = info_memory.collect(options)
    except info_memory.Problem as problem:
        print(f"info: {problem}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        info_memory.print_tables(found)
    return 0


def collect() -> dict[str, Any]:
    """Gather versions, devices and backends."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return {
        "fusedopt": fusedopt.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": getattr(lang.triton, "__version__", lang.MISSING),
        "cuda": torch.version.cuda or "none",
        "rocm": torch.version.hip or "none",
        "interpreter": "on" if lang.INTERPRETED else "off (TRITON_INTERPRET=1 turns it on)",
        "triton cache": os.environ.get("TRITON_CACHE_DIR", "default"),
        "rules": list(REGISTRY),
        "devices": [_describe(device) for device in devices],
    }


def _describe(device: torch.device) -> dict[str, str]:
    backend, why = backends.choose(device)
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {"device": str(device), "name": name, "backend": backend, "why": why}
