"""What step() costs the host, with the launch left out, over what torch's costs.

Two figures, for gradients that stay where they are and for gradients that are new at every step:

* the ratio to torch's fastest implementation of the same step, by the fastest of many rounds;
* the number of calls that Python makes, in all and for each tensor. It is the same in every run;
  where gradients stay, it does not depend on the number of tensors, and a loop would show at once.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

import fusedopt
from bench.harness.pairs import make_params, ratio, without_launches

TENSORS, ELEMENTS = 1000, 16
ROUNDS = 100
# Of tensors; the difference between them gives the calls for one more.
COUNTS = (100, TENSORS)

Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A class, and what it is compared with.

    Attributes:
        name: of the class here and in ``torch.optim``.
        against: the implementation of torch's that is fastest on the host.
        options: of both.
    """

    name: str
    against: str
    options: dict[str, Any]

    def ours(self, count: int) -> torch.optim.Optimizer:
        """Make the optimizer of this project, over ``count`` tensors."""
        kind = getattr(fusedopt, self.name)
        return kind(make_params([(ELEMENTS,)] * count), backend="triton", **self.options)

    def theirs(self, count: int) -> torch.optim.Optimizer:
        """Make torch's."""
        kind = getattr(torch.optim, self.name)
        options = {**self.options, self.against: True}
        return kind(make_params([(ELEMENTS,)] * count), **options)


CASES = (
    Case("SGD", "fused", {"lr": 1e-3, "momentum": 0.9}),
    Case("RMSprop", "foreach", {"lr": 1e-3}),
    Case("Adam", "fused", {"lr": 1e-3}),
    Case("AdamW", "fused", {"lr": 1e-3}),
)
MODES = ("still", "moved")


def stepping(optimizer: torch.optim.Optimizer, mode: str) -> Step:
    """Return what takes a step; in mode ``moved``, with gradients at other addresses each time."""
    if mode == "still":
        return optimizer.step
    params = optimizer.param_groups[0]["params"]
    sets = [[torch.randn_like(p) for p in params] for _ in range(2)]
    turn = 0

    def step() -> None:
        nonlocal turn
        turn += 1
        for p, gradient in zip(params, sets[turn % 2], strict=True):
            p.grad = gradient
        optimizer.step()

    return step


def measure(case: Case, mode: str, rounds: int = ROUNDS) -> float:
    """Return the time of a step over that of torch's."""
    with without_launches() as programs:
        ours, theirs = (stepping(make(TENSORS), mode) for make in (case.ours, case.theirs))
        found = ratio(ours, theirs, rounds, of=min)
    if programs != [TENSORS] * (rounds + 1):
        raise RuntimeError(f"{case.name}: the step that was timed was not one launch of everything")
    return found


def measure_afresh(case: Case, mode: str) -> float:
    """Measure in a process of its own.

    What was freed before decides where a thousand small tensors lie, and with it how many caches
    miss: in one process, a class that is measured last seems slower than it is alone.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(measure, case, mode).result()


def calls(case: Case, mode: str) -> tuple[int, float]:
    """Return the calls that Python makes in a step, and how many more for one more tensor."""
    counted = []
    for count in COUNTS:
        with without_launches():
            step = stepping(case.ours(count), mode)
            # Of gradients that alternate, either set has to have been seen.
            for _ in range(3):
                step()
            counted.append(_count_calls(step))
    return counted[-1], (counted[-1] - counted[0]) / (COUNTS[-1] - COUNTS[0])


def _count_calls(step: Step) -> int:
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    previous = sys.getprofile()
    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(previous)
    return count
