"""Seconds of a process's first step, with nothing compiled before: ``-m bench.step.first_step``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch

from fusedopt.compilations import compilations

from . import OURS, models
from .codecs import CODECS
from .contenders import CONTENDERS
from .problem import Problem
from .rules import RULES

# Contender, rule, types. On a CPU nothing of ours is compiled, and torch compiles for minutes.
CORE = (
    (OURS, "AdamW", "fp32"),
    (OURS, "SGD-momentum", "bf16"),
    ("torch-fused", "AdamW", "fp32"),
    ("torch-compiled", "AdamW", "fp32"),
)
CPU = (CORE[0], CORE[2])


def measure(contender: str, rule: str, types: str, device: str, quick: bool) -> dict[str, Any]:
    """Return the time of the first step, and how many kernels it compiled (ours alone)."""
    place = torch.device(device)
    case = models.tiny("gpt2") if quick else models.case("gpt2")
    # The context, the libraries and the tensors are there before any optimizer.
    problem = Problem(case, CODECS[types], RULES[rule], place)
    problem.restart()
    problem.new_gradients(1, 1.0)
    arm = CONTENDERS[contender].make(problem, False, None)
    _wait(place)
    with compilations() as seen:
        begin = time.perf_counter()
        arm.step()
        _wait(place)
        seconds = time.perf_counter() - begin
    return {"seconds": seconds, "variants_compiled": seen.compiled if contender == OURS else None}


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
