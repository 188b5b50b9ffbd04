"""``fusedopt.json`` in a cache: what was compiled, and what the entries are good for."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fusedopt

from ..kernels import aot
from ..kernels.lang import triton

FILE = "fusedopt.json"


def versions(target_name: str) -> dict[str, str]:
    """Name the versions that entries for a target are made by; they serve no other."""
    from triton.compiler.compiler import make_backend

    target = aot.parse_target(target_name)
    found = {
        "fusedopt": fusedopt.__version__,
        "triton": triton.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if target.backend == "cuda":
        # "... release 12.8, V12.8.93 ... Build ...", and what it was asked for.
        words = str(make_backend(target).hash()).split()
        found["ptxas"] = next((w.strip(",") for w in words if w.startswith("V")), " ".join(words))
    return found


def write(cache: Path, rows: Sequence[dict[str, Any]], targets: Sequence[str]) -> None:
    """Record what was compiled; records of other targets stay."""
    path = cache / FILE
    try:
        old = json.loads(path.read_text(encoding="utf-8"))["targets"]
    except (OSError, ValueError, KeyError, TypeError):
        old = {}
    record = {
        # Entries hold their own paths.
        "cache": str(cache),
        "targets": {**old, **{name: _of_target(name, rows, old.get(name)) for name in targets}},
    }
    temporary = cache / f"{FILE}.{os.getpid()}"
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def _of_target(
    name: str, rows: Sequence[dict[str, Any]], old: dict[str, Any] | None
) -> dict[str, Any]:
    made_by = versions(name)
    own = [row["variant"] for row in rows if row["target"] == name and not row["error"]]
    # A second run with other filters adds to the first.
    known = old["variants"] if old is not None and old.get("versions") == made_by else []
    return {"versions": made_by, "variants": sorted({*known, *own})}
