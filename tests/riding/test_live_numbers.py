"""Hyper-parameters that are tensors, and change between steps: the bits are those of numbers.

For every codec of parameters and states, on both backends, with counts on the host and on the
device. Catches a number that is read once and kept, rounded on its way, or taken from another
group, and a codec that is told of another step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from format_cases import assert_same_bits_of, bits_of
from marks import both_backends
from pairwise import covering, pairs_of
from riding import BESIDE, DTYPES, RULES, STATES, goes_with, states_of
from torch import Tensor
from torch.optim import lr_scheduler

import fusedopt

SHAPES, STEPS = ((2, 75), (40,)), 3
AVERAGES = {"no": None, "fp32": torch.float32, "bf16": torch.bfloat16}

# How a number becomes a tensor.
FORMS: dict[str, Callable[[float], Tensor]] = {
    "float64": lambda value: torch.tensor(value, dtype=torch.float64),
    "float32": lambda value: torch.tensor(value, dtype=torch.float32),
    "element": lambda value: torch.tensor([value], dtype=torch.float64),
    # Of a larger tensor, at a place that is no start.
    "view": lambda value: torch.full((3,), value, dtype=torch.float64)[1],
}
# Of parameters and what is kept beside them.
KEPT = [f"{dtype} {beside}" for dtype in DTYPES for beside in BESIDE if goes_with(dtype, beside)]
OTHER: dict[str, Any] = {
    "average": list(AVERAGES), "form": list(FORMS), "capturable": ["no", "yes"],
    "change": ["written", "replaced"],
}  # fmt: skip
# On the reference every codec of states with every one of parameters; the interpreter takes a third
# of a second for a step of codes, and has the pairs.
FACTORS: dict[str, dict[str, Any]] = {
    "reference": {"rule": list(RULES), "states": list(STATES), "kept": KEPT, **OTHER},
    "triton": {
        "rule": ["sgd", "adam", "lion", "schedule_free", "batch"],
        "states": ["None", "float16", "int8", "fp8", "mixed"],
        "dtype": list(DTYPES), "beside": list(BESIDE), **OTHER,
    },
}  # fmt: skip


def sound(case: dict[str, Any]) -> bool:
    return goes_with(case.get("dtype"), case.get("beside", "nearest"))


CASES = {backend: covering(factors, sound) for backend, factors in FACTORS.items()}
for _case in CASES["triton"]:
    _case["kept"] = f"{_case['dtype']} {_case['beside']}"
RUNS = [(backend, case) for backend, cases in CASES.items() for case in cases]


def numbers_at(start: dict[str, Any], group: int, step: int) -> dict[str, Any]:
    """Numbers that are others in each group and at each step, within their bounds."""
    factor = 1.0 - 0.07 * group - 0.11 * step
    return {
        name: tuple(x * factor for x in value) if isinstance(value, tuple) else value * factor
        for name, value in start.items()
    }


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    return tuple(map(function, value)) if isinstance(value, tuple) else function(value)


class Run:
    """Groups of one parameter each, whose numbers are of one form: of tensors, or plain."""

    def __init__(
        self, case: dict[str, Any], form: str | None, backend: str, shapes: Any = SHAPES
    ) -> None:
        self.case, self.form, self.start = case, form, dict(RULES[case["rule"]][1])
        if case["average"] != "no":
            self.start["average_decay"] = 0.9
        name, _, other = RULES[case["rule"]]
        dtype, beside = case["kept"].split()
        drawn = torch.Generator().manual_seed(3)
        self.params = [
            torch.nn.Parameter(torch.randn(shape, generator=drawn).to(DTYPES[dtype]))
            for shape in shapes
        ]
        groups = [{"params": [p], **self._numbers(i, 0)} for i, p in enumerate(self.params)]
        common: dict[str, Any] = {
            "capturable": case["capturable"] == "yes", "backend": backend,
            "state_dtype": states_of(case["rule"], case["states"]), **BESIDE[beside],
        }  # fmt: skip
        if case["average"] != "no":
            common["average"] = fusedopt.WeightAverage(0.5, AVERAGES[case["average"]])
        if case["rule"] == "batch":
            common["statistics"] = fusedopt.GradSampleSquares()
        self.optimizer = getattr(fusedopt, name)(groups, **other, **common)

    def _numbers(self, group: int, step: int) -> dict[str, Any]:
        values = numbers_at(self.start, group, step)
        if self.case["form"] == "float32":
            # What such a tensor holds, as a number.
            values = {n: mapped(lambda x: torch.tensor(x).item(), v) for n, v in values.items()}
        if self.form is None:
            return values
        return {name: mapped(FORMS[self.form], value) for name, value in values.items()}

    def change(self, step: int) -> None:
        for index, group in enumerate(self.optimizer.param_groups):
            for name, value in self._numbers(index, step).items():
                if self.form is None or self.case["change"] == "replaced":
                    group[name] = value
                    continue
                new, old = (x if isinstance(x, tuple) else (x,) for x in (value, group[name]))
                for target, number in zip(old, new, strict=True):
                    target.copy_(number)

    def step(self, number: int) -> None:
        drawn = torch.Generator().manual_seed(number)
        for p in self.params:
            samples = torch.randn((4, *p.shape), generator=drawn).to(p.dtype)
            p.grad, p.grad_sample = samples.mean(0), samples  # type: ignore[attr-defined]
        self.optimizer.step()


@pytest.mark.parametrize("backend", CASES)
def test_each_pair_is_in_a_case(backend: str) -> None:
    factors, cases = FACTORS[backend], CASES[backend]
    seen = set().union(*map(pairs_of, cases))
    for a in factors:
        for b in factors:
            for x in factors[a]:
                for y in factors[b]:
                    if a < b and sound({a: x, b: y}):
                        assert ((a, x), (b, y)) in seen
    assert len(cases) < 110 and all(map(sound, cases))


def _name(value: Any) -> str:
    return (
        value
        if isinstance(value, str)
        else "-".join(map(value.get, ("rule", "states", "kept", *OTHER)))
    )


@pytest.mark.parametrize(("backend", "case"), RUNS, ids=_name)
def test_tensors_give_the_bits_of_numbers(backend: str, case: dict[str, Any]) -> None:
    interpreted = backend == "triton"
    shapes = SHAPES[:1] if interpreted else SHAPES
    tensors, numbers = (Run(case, form, backend, shapes) for form in (case["form"], None))
    plans = []
    for step in range(2 if interpreted else STEPS):
        for run in (tensors, numbers):
            run.change(step)
            run.step(step)
        plans.append(tensors.optimizer._engine.plan)
    assert_same_bits_of(tensors.optimizer, numbers.optimizer)
    if case["change"] == "written":
        # Numbers that live cost no preparation.
        assert len(set(map(id, plans))) == 1


def _plain(rule: str, **changed: Any) -> dict[str, Any]:
    plain = {name: values[0] for name, values in FACTORS["reference"].items()}
    return {**plain, "rule": rule, "average": "fp32", **changed}


@pytest.mark.parametrize("capturable", ["no", "yes"])
@pytest.mark.parametrize("rule", RULES)
def test_every_number_counts(rule: str, capturable: str) -> None:
    """Otherwise the test above would pass for nothing: each is changed alone, and shows."""
    case = _plain(rule, capturable=capturable)
    still = Run(case, "float64", "reference")
    for step in range(STEPS):
        still.step(step)
    for name in still.start:
        run = Run(case, "float64", "reference")
        run.step(0)
        for group in run.optimizer.param_groups:
            group_value = group[name] if isinstance(group[name], tuple) else (group[name],)
            for value in group_value:
                value.mul_(0.75)
        for step in range(1, STEPS):
            run.step(step)
        one, other = bits_of(run.optimizer), bits_of(still.optimizer)
        for (p, state), (q, unchanged) in zip(one, other, strict=True):
            assert not torch.equal(state["ema"][1], unchanged["ema"][1]), name
            assert torch.equal(p, q) == (name == "average_decay"), name


@both_backends
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("capturable", ["no", "yes"])
def test_from_numbers_to_tensors_and_back(backend: str, rule: str, capturable: str) -> None:
    """Catches a number that was sent before a tensor took its place, and is taken to be there."""
    case = _plain(rule, capturable=capturable, change="replaced")
    mixed, numbers = (Run(case, None, backend, SHAPES[1:]) for _ in range(2))
    for step, form in enumerate((None, "float64", None, "element", None)):
        mixed.form = form
        # The same numbers return, and those that stay beside a tensor are sent once.
        for run in (mixed, numbers):
            run.change(step % 2)
            run.step(step)
        assert_same_bits_of(mixed.optimizer, numbers.optimizer)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 1, 0.7),
    "linear": lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.3, total_iters=3),
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (2 + epoch)),
    "exponential": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.7),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 5),
    # Writes momentum, or betas, too.
    "cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=5),
    "chain": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.ExponentialLR(optimizer, 0.5)],
        [2],
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("rule", ["sgd", "adamw", "adam_c"])
@pytest.mark.parametrize("capturable", ["no", "yes"])
def test_schedulers_of_torch(scheduler: str, rule: str, capturable: str) -> None:
    """They write into the tensor that is there."""
    case = _plain(rule, capturable=capturable)
    tensors, numbers = (Run(case, form, "reference") for form in ("float64", None))
    rates = [group["lr"] for group in tensors.optimizer.param_groups]
    schedules = [SCHEDULERS[scheduler](run.optimizer) for run in (tensors, numbers)]
    seen = []
    for step in range(5):
        for run in (tensors, numbers):
            run.step(step)
        assert_same_bits_of(tensors.optimizer, numbers.optimizer)
        seen.append(numbers.optimizer.param_groups[0]["lr"])
        if step < 4:
            for schedule in schedules:
                schedule.step()
    assert all(a is g["lr"] for a, g in zip(rates, tensors.optimizer.param_groups, strict=True))
    assert len(set(seen)) > 2
