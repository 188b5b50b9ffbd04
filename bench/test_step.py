"""The step of every contender on every parameter set: tiny on a CPU, real on a GPU.

``python -m fusedopt bench`` has more rows, takes the contenders in turn, and flushes the cache.
"""

from __future__ import annotations

import pytest
import torch

from bench.step import OURS, correctness, models
from bench.step.codecs import CODECS
from bench.step.contenders import CONTENDERS
from bench.step.rules import RULES
from bench.step.sets import EAGER
from bench.step.workload import Workload

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
TYPES = "bf16"  # so that the huge tensor fits


def _workload(case: str) -> Workload:
    sizes = models.case if ON_GPU else models.tiny
    return Workload(sizes(case), CODECS[TYPES], RULES["AdamW"], DEVICE)


@pytest.mark.parametrize("clip", [False, True], ids=["plain", "clipped"])
@pytest.mark.parametrize("contender", EAGER)
@pytest.mark.parametrize("case", models.CASES)
def test_step(benchmark, case, contender, clip):
    benchmark.group = f"AdamW.step() in {TYPES}, {case}{', clipped' if clip else ''}"
    try:
        workload = _workload(case)
        expected = correctness.expect(workload, clip)
        step = CONTENDERS[contender].make(workload, clip, None).step
        # What is timed is right.
        bound = workload.codec.bound_of(contender == OURS, clip, workload.device)
        correctness.check(workload, expected, step, bound)
    except torch.OutOfMemoryError:
        pytest.skip("does not fit")

    def run() -> None:
        step()
        if ON_GPU:
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=20, warmup_rounds=2)
