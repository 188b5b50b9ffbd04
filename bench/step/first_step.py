"""Seconds of a process's first step, with nothing compiled before: ``-m bench.step.first_step``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch

from fusedopt.compilations import compilations

from . import OURS, correctness, models
from .codecs import CODECS
from .contenders import CONTENDERS
from .rules import RULES
from .workload import Workload

# Contender, rule, types. On a CPU nothing of ours is compiled, and torch compiles for minutes.
CORE = (
    (OURS, "AdamW", "fp32"),
    (OURS, "SGD-momentum", "bf16"),
    ("torch-fused", "AdamW", "fp32"),
    ("torch-compiled", "AdamW", "fp32"),
)
CPU = (CORE[0], CORE[2])


def measure(contender: str, rule: str, types: str, device: str, quick: bool) -> dict[str, Any]:
    """Return the time of the first step, and how many kernels it compiled (ours alone).

    Raises:
        Mismatch: where that step and a second one do not lead to float64's parameters.
    """
    place = torch.device(device)
    case = models.tiny("gpt2") if quick else models.case("gpt2")
    # The context, the libraries and the tensors are there before any optimizer.
    codec = CODECS[types]
    workload = Workload(case, codec, RULES[rule], place)
    timed = CONTENDERS[contender].make(workload, False, None)
    found: list[tuple[float, int]] = []

    def step() -> None:
        _wait(place)
        with compilations() as seen:
            begin = time.perf_counter()
            timed.step()
            _wait(place)
            found.append((time.perf_counter() - begin, seen.compiled))

    taken = correctness.take(workload, step)
    # Afterwards: float64 would take some of the first step's time away.
    bound = codec.bound_of(contender == OURS, False, place)
    correctness.compare(workload, taken, correctness.expect(workload, False), bound)
    seconds, compiled = found[0]
    return {"seconds": seconds, "variants_compiled": compiled if contender == OURS else None}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> int:
    """Print the result as JSON."""
    parser = argparse.ArgumentParser("python -m bench.step.first_step", description=__doc__)
    parser.add_argument("contender", choices=list(CONTENDERS))
    parser.add_argument("rule", choices=list(RULES))
    parser.add_argument("types", choices=list(CODECS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    print(json.dumps(measure(**vars(options))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
