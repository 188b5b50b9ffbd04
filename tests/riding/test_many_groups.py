"""A thousand parameter groups, each with its own learning rate, as width-scaled parametrisations
have them: what they cost in launches, and the values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from contract import ADAMW, SGD, Case, Pair, ids
from riding import RULES
from torch.utils._python_dispatch import TorchDispatchMode

import fusedopt
from fusedopt.backends import triton, triton_coefficients

GROUPS = 1000
places = pytest.mark.parametrize("capturable", [False, True], ids=["host", "device"])


def multiplier(place: int) -> float:
    """Of lr, by the place of the parameter: 1 over its width."""
    return 1.0 / (1 + place % 8)


class _Work(TorchDispatchMode):
    """Counts what a step has done: launches of kernels, which do not run, and torch's operations.

    Views and profiling are no work.
    """

    FREE = ("profiler", "view", "select", "slice", "unbind")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.done: Counter[str] = Counter()
        for module in (triton, triton_coefficients):
            monkeypatch.setattr(module, "launch", self._launch)

    def _launch(self, kernel: Any, *_: Any, **__: Any) -> None:
        self.done[f"launch of {kernel.__name__}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(name in str(func) for name in self.FREE):
            self.done[str(func)] += 1
        return func(*args, **(kwargs or {}))

    def of(self, optimizer: Any) -> Counter[str]:
        self.done.clear()
        with self:
            optimizer.step()
        return Counter(self.done)


def _give(params: Iterable[Any]) -> None:
    """Gradients, and those of samples, which a step uses up."""
    for p in params:
        p.grad, p.grad_sample = torch.ones(3), torch.ones(2, 3)


def _optimizer(rule: str, count: int, capturable: bool, **common: Any) -> Any:
    name, numbers, other = RULES[rule]
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(GROUPS)]
    _give(params)
    size = GROUPS // count
    groups = [
        {"params": params[i * size : (i + 1) * size], "lr": numbers["lr"] * multiplier(i)}
        for i in range(count)
    ]
    if rule == "batch":
        common["statistics"] = fusedopt.GradSampleSquares()
    kind = getattr(fusedopt, name)
    common |= {"backend": "triton", "capturable": capturable}
    return kind(groups, **{**numbers, **other}, **common)


@places
@pytest.mark.parametrize("rule", ["sgd", "adamw", "schedule_free", "batch"])
def test_no_launch_more_than_for_one(
    rule: str, capturable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor an operation of torch's, with numbers that stay and with a schedule.

    Catches a launch, a bucket or a copy for each group.
    """
    work = _Work(monkeypatch)
    done = []
    for count in (GROUPS, 1):
        optimizer = _optimizer(rule, count, capturable)
        seen = []
        for step in range(4):
            seen.append(work.of(optimizer))
            if step > 1:
                for group in optimizer.param_groups:
                    group["lr"] *= 0.75
            _give(p for group in optimizer.param_groups for p in group["params"])
        done.append(seen)
    update = "update_from_samples" if rule == "batch" else "update_tensors"
    launches = {f"launch of {name}": 1 for name in [update, *["live_coefficients"] * capturable]}
    for step, (many, one) in enumerate(zip(*done, strict=True)):
        # One number is filled in, and many are copied. Of several rows, a plan sends their numbers.
        more = many.total() - one.total()
        assert more == 0 or (step == 0 and more <= 2), (many - one, one - many)
        assert {n: k for n, k in many.items() if n.startswith("launch")} == launches


def test_nor_with_all_that_rides_along(monkeypatch: pytest.MonkeyPatch) -> None:
    work = _Work(monkeypatch)
    done = []
    for count in (GROUPS, 1):
        optimizer = _optimizer(
            "adamw", count, True, clip=fusedopt.GlobalNorm(1.0), guard=fusedopt.SpikeGuard(),
            average=fusedopt.WeightAverage(0.5), telemetry=fusedopt.Telemetry(),
        )  # fmt: skip
        done.append([work.of(optimizer) for _ in range(3)][1:])
    assert done[0] == done[1]


@places
@pytest.mark.parametrize("case", [SGD, ADAMW], ids=ids)
def test_values_of_torch(case: Case, capturable: bool) -> None:
    """With as many groups of torch's, under a schedule by group."""
    groups = [{"lr": case.options["lr"] * multiplier(i)} for i in range(GROUPS)]
    pair = Pair(case, groups=groups, shapes=((2,),), ours_only={"capturable": capturable})
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, [lambda step, i=i: 1 / (1 + step * (i % 3)) for i in range(GROUPS)]
        )
        for optimizer in pair.both
    ]
    for _ in range(3):
        pair.step()
        for schedule in schedules:
            schedule.step()
    pair.check()


@places
@pytest.mark.parametrize("case", [SGD, ADAMW], ids=ids)
def test_values_of_kernels(case: Case, capturable: bool) -> None:
    """A row of the table for each group: catches one that is another's."""
    groups = [{"lr": case.options["lr"] * multiplier(i)} for i in range(20)]
    pair = Pair(
        case, groups=groups, shapes=((2,),), backend="triton", ours_only={"capturable": capturable}
    )
    pair.step(2)
    pair.check()
