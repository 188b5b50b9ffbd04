"""Whether Triton compiles for a target, found out before anything else is compiled."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from fusedopt.kernels import aot, lang

# What this project is compiled for at every change; these need not be tried.
KNOWN = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")

# In a process of its own: for an architecture that it does not know, LLVM ends the process.
PROBE = """
import sys
from fusedopt.kernels import aot
from fusedopt.kernels.aot.norms import clip_factor
aot.compile_variant(clip_factor(False), aot.parse_target(sys.argv[1]))
"""


def problem(targets: Sequence[str]) -> str | None:
    """Say in one line what is wrong with targets; None where they are good."""
    for target in targets:
        try:
            aot.parse_target(target)
        except ValueError as error:
            return str(error)
    for target in targets:
        if target not in KNOWN and not _compiles(target):
            return f"Triton {lang.triton.__version__} does not compile for {target}"
    return None


def _compiles(target: str) -> bool:
    command = [sys.executable, "-c", PROBE, target]
    try:
        return subprocess.run(command, capture_output=True, timeout=120).returncode == 0
    except subprocess.TimeoutExpired:
        return False
