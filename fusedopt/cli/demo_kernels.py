"""The demo's last part: one step of a trained model by the kernels and by the reference backend.

On a CPU the kernels run in Triton's interpreter, which must be switched on before Triton is
imported: the step is then taken in a process of its own, ``python -m fusedopt.cli.demo_kernels``.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fusedopt
from fusedopt.kernels.multi_tensor import BLOCK
from fusedopt.testing import worst_ulps

# In units in the last place of the largest of old value and both new ones. Either backend rounds
# about a dozen times, by half a unit, and may order the operations differently. A wrong eps of 1e-7
# would show as hundreds.
TOLERANCE = 16.0


@dataclass
class KernelStep:
    """The two backends' results of one step, compared."""

    interpreted: bool
    parameters: int
    tensors: int
    programs: int
    seconds: float  # of the kernels' step
    worst_ulps: float  # of any parameter or state
    tolerance_ulps: float
    update_ulps: float  # the largest update of a parameter: what an idle kernel would be off by
    ok: bool


class KernelError(Exception):
    """The kernels did not run to their end; the message is one line."""


def missing_reason() -> str | None:
    """Say what the interpreter lacks here, or None."""
    for module, name in (("triton", "Triton"), ("numpy", "numpy, which the interpreter needs,")):
        if importlib.util.find_spec(module) is None:
            return f"{name} is not installed"
    return None


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Take what a step needs: parameters, gradients, and torch.optim's checkpoint."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        "parameters": [p.detach() for p in parameters],
        "gradients": [p.grad for p in parameters],
        "checkpoint": optimizer.state_dict(),
    }


def compare_backends(start: dict[str, Any]) -> KernelStep:
    """Take one step from a snapshot with either backend."""
    device = start["parameters"][0].device
    seconds = {}
    after = {}
    for backend in ("triton", "reference"):
        optimizer = _restore(start, backend)
        begin = time.perf_counter()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds[backend] = time.perf_counter() - begin
        after[backend] = _values(optimizer)
    before = _values(_restore(start, "reference"))
    pairs = zip(after["triton"], after["reference"], before, strict=True)
    worst = max(worst_ulps(ours, theirs, old) for ours, theirs, old in pairs)
    count = len(start["parameters"])
    moved = zip(after["triton"][:count], before[:count], strict=True)
    update = max(worst_ulps(new, old, old) for new, old in moved)
    sizes = [p.numel() for p in start["parameters"]]
    return KernelStep(
        interpreted=device.type == "cpu",
        parameters=sum(sizes),
        tensors=count,
        programs=sum(-(-size // BLOCK) for size in sizes),
        seconds=seconds["triton"],
        worst_ulps=worst,
        tolerance_ulps=TOLERANCE,
        update_ulps=update,
        # Agreement would mean nothing if a kernel that does nothing agreed as well.
        ok=worst <= TOLERANCE < update,
    )


def compare_in_interpreter(start: dict[str, Any]) -> KernelStep:
    """Take the step in a process whose kernels run in Triton's interpreter.

    Raises:
        KernelError: if that process fails.
    """
    package_root = str(Path(fusedopt.__file__).parents[1])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "start.pt")
        torch.save(start, file)
        command = [sys.executable, "-m", "fusedopt.cli.demo_kernels", str(file)]
        child = subprocess.run(command, env=environment, capture_output=True, text=True)
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
        raise KernelError(f"in the interpreter: {lines[-1]}")
    return KernelStep(**json.loads(child.stdout))


def _restore(start: dict[str, Any], backend: str) -> fusedopt.AdamW:
    """Build an optimizer over copies of a snapshot, with torch.optim's checkpoint loaded."""
    parameters = [torch.nn.Parameter(p.clone()) for p in start["parameters"]]
    for parameter, gradient in zip(parameters, start["gradients"], strict=True):
        parameter.grad = gradient
    groups = [
        {"params": [parameters[index] for index in group["params"]]}
        for group in start["checkpoint"]["param_groups"]
    ]
    optimizer = fusedopt.AdamW(groups, backend=backend)
    # torch's load_state_dict keeps the tensors it is given, and the step writes them.
    optimizer.load_state_dict(copy.deepcopy(start["checkpoint"]))
    return optimizer


def _values(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """List the parameters, then their states."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return parameters + [value for p in parameters for value in optimizer.state[p].values()]


def main() -> None:
    """Compare the backends from the snapshot in a file and print the result as JSON."""
    torch.set_num_threads(1)
    print(json.dumps(asdict(compare_backends(torch.load(sys.argv[1])))))


if __name__ == "__main__":
    main()
