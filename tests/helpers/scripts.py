"""The scripts of ``examples/``, run as a user does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_example(name: str, *arguments: str, launcher: tuple[str, ...] = ()) -> str:
    """Run an example and return what it prints; raise where it fails or takes five minutes."""
    # Without the interpreter mode that the tests switch on, and one thread a process.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    command = [sys.executable, *launcher, str(ROOT / "examples" / f"{name}.py"), *arguments]
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def losses(printed: str) -> list[float]:
    """The losses of lines such as ``step   20  loss 0.5``."""
    return [float(value) for value in re.findall(r"^step +\d+  loss ([\d.]+)", printed, re.M)]
