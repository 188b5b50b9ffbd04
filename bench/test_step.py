"""The step of every contender on every parameter set: tiny on a CPU, real on a GPU.

``python -m fusedopt bench`` has more rows, takes the contenders in turn, and flushes the cache.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# The package that this file lies in: pytest alone puts only the folder on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.step import OURS, gate, models  # noqa: E402
from bench.step.codecs import CODECS  # noqa: E402
from bench.step.contenders import CONTENDERS  # noqa: E402
from bench.step.problem import Problem  # noqa: E402
from bench.step.rules import RULES  # noqa: E402
from bench.step.sets import EAGER  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
TYPES = "bf16"  # so that the huge tensor fits


def _problem(case: str) -> Problem:
    sizes = models.case if ON_GPU else models.tiny
    return Problem(sizes(case), CODECS[TYPES], RULES["AdamW"], DEVICE)


@pytest.mark.parametrize("clip", [False, True], ids=["plain", "clipped"])
@pytest.mark.parametrize("contender", EAGER)
@pytest.mark.parametrize("case", models.CASES)
def test_step(benchmark, case, contender, clip):
    benchmark.group = f"AdamW.step() in {TYPES}, {case}{', clipped' if clip else ''}"
    try:
        problem = _problem(case)
        expected = gate.expect(problem, clip)
        step = CONTENDERS[contender].make(problem, clip, None).step
        # What is timed is right.
        bound = problem.codec.bound_of(contender == OURS, clip, problem.device)
        gate.check(problem, expected, step, bound)
    except torch.OutOfMemoryError:
        pytest.skip("does not fit")

    def run() -> None:
        step()
        if ON_GPU:
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=20, warmup_rounds=2)
