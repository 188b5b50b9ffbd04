"""What the tests of the command for a machine with a GPU share."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
# bench is not installed. Last, so that it hides nothing that is.
sys.path.append(str(ROOT))


def module(name: str) -> ModuleType:
    return importlib.import_module(f"bench.gpu.{name}")


def make_setting(folder: Path):
    """Folders for results and for work, on a GPU that is only said to be there."""
    out, work = folder / "out", folder / "work"
    out.mkdir()
    work.mkdir()
    return module("stages").Setting(out, work, "cuda:90")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the checkout, with compiled kernels."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "", **environment}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True
    )
