"""What has been measured, read from the results that are kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.gpu.result import OURS, RULE, find
from tools.readme import ROOT

Result = Mapping[str, Any]

GPU = "bench/results/nvidia-h200/core-partial.json"
HOST = "bench/results/amd-epyc-436218b89.json"
# Between them the step's time is a line: what does not grow with the tensors, and what does.
SMALL, LARGE = "gpt2", "llama-3.2-1b"


@cache
def read(path: str) -> Result:
    """Read a kept result, by its path from the project's root."""
    found: Result = json.loads(Path(ROOT / path).read_text(encoding="utf-8"))
    return found


@dataclass(frozen=True)
class Device:
    """A float32 AdamW step with clipping on one GPU.

    Attributes:
        name: of the GPU.
        memory: its bytes.
        launches: kernels in a step.
        fixed: seconds that do not depend on the size.
        bandwidth: bytes a second of what grows with the size.
    """

    name: str
    memory: float
    launches: int
    fixed: float
    bandwidth: float

    @property
    def launch(self) -> float:
        """Seconds of a launch that has next to nothing to do."""
        return self.fixed / self.launches


def device(result: Result) -> Device:
    """Draw the line through the two cases of a result.

    Raises:
        ValueError: where one of them was not measured.
    """
    rows = [
        find(result, case=case, rule=RULE, types="fp32", contender=OURS, clip=True)
        for case in (SMALL, LARGE)
    ]
    small, large = rows
    if small is None or large is None:
        raise ValueError(f"the result has no clipped {RULE} of {SMALL} and {LARGE} in float32")
    times = [1e-3 * row["device_ms"]["median"] for row in (small, large)]
    sizes = [row["parameters"] for row in (small, large)]
    each = (times[1] - times[0]) / (sizes[1] - sizes[0])
    facts = result["environment"]
    return Device(
        name=facts["device"],
        memory=facts["memory_bytes"],
        launches=large["launches"],
        fixed=times[0] - each * sizes[0],
        bandwidth=large["bytes_per_parameter"] / each,
    )


def host_seconds(result: Result, tensors: int, contender: str = OURS) -> float:
    """Return the host's time for a step of plain tensors whose gradients are new ones each time.

    Between the numbers of tensors that were measured it is a line. Those were taken with gradients
    at the same addresses; what new ones cost more, a tensor, was measured at one number.

    Raises:
        ValueError: where fewer or more tensors are asked for than were measured.
    """
    own = [r for r in result["host"] if (r["rule"], r["contender"]) == (RULE, contender)]
    still = {r["tensors"]: r["microseconds"] for r in own if r["gradients"] == "same"}
    moved = {r["tensors"]: r["microseconds"] for r in own if r["gradients"] == "moved"}
    ((count, time),) = moved.items()
    more = (time - still[count]) / count
    for low, high in pairwise(sorted(still)):
        if low <= tensors <= high:
            slope = (still[high] - still[low]) / (high - low)
            return 1e-6 * (still[low] + slope * (tensors - low) + more * tensors)
    raise ValueError(f"{tensors} tensors: measured were {min(still)} to {max(still)}")
