"""Every rule in the registry, with each of its example groups, against three oracles.

The kernel against the rule's twin and against its own source executed by torch; the source
against the twin in float64; the twin against torch.optim. A new rule is covered by adding it to
the registry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from oracles import INTERPRETED, as_scalars, source_of
from tolerances import FORMULA, STEP, TRAJECTORY, assert_close_ulps, assert_equal, assert_untouched
from torch import Tensor
from trajectory import (
    TORCH_CLASS,
    Trajectory,
    assert_same_trajectory,
    away_from_zero,
    describe,
    give_gradient,
    make_gradients,
    optimizer_of,
    torch_groups,
    wide,
)

from fusedopt import backends
from fusedopt.backends import Entries
from fusedopt.kernels.lang import jit, tl
from fusedopt.kernels.rule import Rule
from fusedopt.kernels.rules import REGISTRY
from fusedopt.testing import another

RULES = [pytest.param(rule, id=name) for name, rule in REGISTRY.items()]
CASES = [
    pytest.param(rule, group, id=f"{name}-{describe(group, rule.example_groups[0])}")
    for name, rule in REGISTRY.items()
    for group in rule.example_groups
]
# Stored types of parameter (with its states) and gradient.
TYPES = [
    pytest.param(p, g, id=f"{str(p)[6:]}-{str(g)[6:]}")
    for p, g in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float64, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
        # Last, and compared with the twin only: torch rounds float64 to float16 by way of
        # float32, the kernel at once.
        (torch.float16, torch.float64),
    )
]
SIZE = 60
# States that the first step leaves at 0: an average of one point is that point.
STILL = {"ScheduleFreeAdamW": {"z_minus_x"}}


def _params(count: int, dtype: torch.dtype, device: torch.device) -> list[torch.nn.Parameter]:
    # Of magnitude at least a half: where a step is what momentum and gradient leave of each other,
    # a small parameter would show the roundings of both.
    like = torch.empty(SIZE, dtype=torch.float64, device=device)
    return [torch.nn.Parameter(away_from_zero(like, like.dtype).to(dtype)) for _ in range(count)]


def _groups(params: Sequence[Tensor], groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**group, "params": [p]} for p, group in zip(params, groups, strict=True)]


def _signed(size: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    random = torch.randn(like.numel(), dtype=torch.float64, device=like.device)
    return (size.to(random) * random.sign()).to(dtype)


def _ordinary(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradients from 1 to 10: larger than weight_decay * p, so that their sum does not cancel."""
    return _signed(torch.logspace(0, 1, like.numel()), like, dtype)


def _spread(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradients of very different sizes, the smallest about as small as eps."""
    return _signed(torch.logspace(-6, 1, like.numel()), like, dtype)


def _inputs(rule: Rule, gradient: Tensor, compute: torch.dtype) -> tuple[Tensor, ...]:
    """What ``statistics_for(rule)`` makes of a gradient."""
    return tuple(
        another(gradient, i).to(compute) if degree == 1 else gradient.to(compute).square()
        for i, degree in enumerate(rule.degrees)
    )


# Rules with cautious decay.
CAUTIOUS = ("Adam", "SGD", "BatchDecoupledAdam", "SVAG Adam", "SVAG SGD")


@pytest.mark.parametrize("rule", RULES)
def test_examples_reach_every_branch(rule: Rule) -> None:
    # Catches an option that no test, no `verify` and no ahead-of-time build ever turns on.
    seen = [rule.options(group) for group in rule.example_groups]
    for position in range(len(seen[0])):
        # Whoever updates as Adam or SGD does has the option, not always the group's entry.
        has_it = rule.option_names[position] != "cautious" or rule.name in CAUTIOUS
        on = {False, True} if has_it else {False}
        assert {options[position] for options in seen} == on, position
    signs = {group["maximize"] for group in rule.example_groups if "maximize" in group}
    assert signs in (set(), {False, True})


@pytest.mark.parametrize(("rule", "group"), CASES)
@pytest.mark.parametrize("step", [1, 2, 1000])
def test_coefficients_are_double_and_device_ready(
    rule: Rule, group: Mapping[str, Any], step: int
) -> None:
    # Catches a coefficient formed in float32, one that needs a host number (math.sqrt, a branch
    # on a value), and a row of the wrong length.
    numbers = rule.coefficients(group, float(step))
    assert len(numbers) == rule.n_coefficients

    def live(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(live(x) for x in value)
        return torch.tensor(float(value), dtype=torch.float64)

    tensors = {k: live(v) if k in rule.hyper else v for k, v in group.items()}
    on_device = rule.coefficients(tensors, torch.tensor(float(step), dtype=torch.float64))
    for i, (number, tensor) in enumerate(zip(numbers, on_device, strict=True)):
        expected = torch.tensor(float(number), dtype=torch.float64)
        got = torch.as_tensor(tensor, dtype=torch.float64)
        assert_close_ulps(got, expected, None, STEP[torch.float64], f"coefficient {i}")


@pytest.mark.parametrize(("stored", "gradient_type"), TYPES)
@pytest.mark.parametrize("rule", RULES)
def test_kernel_against_twin(
    rule: Rule, stored: torch.dtype, gradient_type: torch.dtype, device: torch.device
) -> None:
    # Catches what the device function says differently from the twin, step by step: each step
    # starts from the kernel's own result, so nothing accumulates and nothing hides.
    params = _params(len(rule.example_groups), stored, device)
    kernel = optimizer_of(rule)(_groups(params, rule.example_groups), backend="triton")
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    twin = optimizer_of(rule)(_groups(twins, rule.example_groups), backend="reference")
    for step in (1, 2, 3):
        before = []
        for p, q in zip(params, twins, strict=True):
            with torch.no_grad():
                q.copy_(p)
            for name, value in kernel.state.get(p, {}).items():
                twin.state[q][name].copy_(value)
            before.append({"p": p.detach().clone(), **_copies(kernel.state.get(p, {}))})
            # Of another size at each step: the average of equal squares would not move.
            gradient = _ordinary(p, gradient_type) * (1.0, 1.3, 1.7)[step - 1]
            give_gradient(p, gradient)
            give_gradient(q, gradient.clone())
        kernel.step()
        twin.step()
        for i, (p, q) in enumerate(zip(params, twins, strict=True)):
            expected = {"p": q.detach(), **twin.state.get(q, {})}
            got = {"p": p.detach(), **kernel.state.get(p, {})}
            assert got.keys() == expected.keys()
            for name, value in expected.items():
                old = before[i].get(name, torch.zeros_like(value))
                # A maximum moves at every other step only.
                moved = 0.5 if name == "p" or step == 1 else 0.2
                if step == 1 and name in STILL.get(rule.name, ()):
                    moved = 0.0
                assert_close_ulps(
                    got[name], value, old, STEP[value.dtype], f"step {step}: group {i}: {name}",
                    moved=moved,
                )  # fmt: skip


def _copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}


@pytest.mark.skipif(not INTERPRETED, reason="compiled code contracts products and sums")
@pytest.mark.parametrize(("stored", "gradient_type"), TYPES[:-1])
@pytest.mark.parametrize("rule", RULES)
def test_kernel_is_its_source_to_the_bit(
    rule: Rule, stored: torch.dtype, gradient_type: torch.dtype, device: torch.device
) -> None:
    # Catches whatever the skeleton adds to or leaves out of the rule: a wrong row of
    # coefficients, a type too narrow, a second rounding, a rounding that is not to nearest even.
    params = _params(len(rule.example_groups), stored, device)
    kernel = optimizer_of(rule)(_groups(params, rule.example_groups), backend="triton")
    if rule.name in STILL:
        # Where it does not move, the second step is looked at.
        for p in params:
            give_gradient(p, _ordinary(p, gradient_type))
        kernel.step()
    step = 2.0 if rule.name in STILL else 1.0
    start = [p.detach().clone() for p in params]
    before = [_copies(kernel.state.get(p, {})) for p in params]
    gradients = [_spread(p, gradient_type) for p in params]
    for p, gradient in zip(params, gradients, strict=True):
        give_gradient(p, gradient)
    kernel.step()
    compute = wide([stored, gradient_type])
    source = source_of(rule.update)
    for i, group in enumerate(rule.example_groups):
        names = rule.states(group)
        old = [before[i].get(name, torch.zeros_like(start[i])) for name in names]
        p, states = source(
            start[i].to(compute),
            _inputs(rule, gradients[i], compute),
            tuple(x.to(compute) for x in old),
            as_scalars(rule.coefficients(group, step), compute, device),
            rule.options(group),
        )
        assert_equal(params[i], p.to(stored), start[i], f"group {i}: p")
        for name, value, was in zip(names, states, old, strict=True):
            got = kernel.state[params[i]][name]
            assert_equal(got, value.to(stored), was, f"group {i}: {name}")


@pytest.mark.parametrize(("rule", "group"), CASES)
def test_source_against_twin_in_float64(rule: Rule, group: Mapping[str, Any]) -> None:
    # Catches a slip in either statement of the formula that single precision could hide.
    source, options = source_of(rule.update), rule.options(group)
    p = torch.randn(SIZE, dtype=torch.float64)
    states = tuple(torch.zeros_like(p) for _ in rule.states(group))
    for step in range(1, 8):
        gradient = _spread(p, torch.float64)
        inputs = _inputs(rule, gradient, torch.float64)
        numbers = rule.coefficients(group, float(step))
        got_p, got = source(p, inputs, states, as_scalars(numbers, torch.float64), options)
        # A twin may overwrite parameter and states, and nothing else.
        given = tuple(x.clone() for x in inputs)
        new_p, new = rule.twin(p.clone(), given, tuple(s.clone() for s in states), numbers, options)
        for x, y in zip(given, inputs, strict=True):
            assert_untouched(x, y, "input")
        assert len(got) == len(new) == len(states)
        assert_close_ulps(got_p, new_p, p, FORMULA, f"step {step}: p")
        for name, a, b, old in zip(rule.states(group), got, new, states, strict=True):
            # The first step moves every state, later ones do not move every maximum.
            moved = 0.5 if step == (2 if name in STILL.get(rule.name, ()) else 1) else 0.0
            assert_close_ulps(a, b, old, FORMULA, f"step {step}: {name}", moved=moved)
        p, states = new_p, new


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("rule", [r for r in RULES if r.values[0].name in TORCH_CLASS])
def test_twin_against_torch(rule: Rule, dtype: torch.dtype, device: torch.device) -> None:
    # Catches a misread formula. On the CPU the twin makes torch's calls, so not a bit differs.
    groups = torch_groups(rule)
    params = _params(len(groups), dtype, device)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    labels = [describe(group, groups[0]) for group in groups]
    twin = optimizer_of(rule)(_groups(params, groups), backend="reference")
    torch_class: Any = TORCH_CLASS[rule.name]
    by_torch = torch_class(_groups(copies, groups), foreach=False)
    assert_same_trajectory(
        Trajectory(twin, labels),
        Trajectory(by_torch, labels),
        make_gradients(params, 30),
        None if device.type == "cpu" else TRAJECTORY,
    )


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("rule", [r for r in RULES if r.values[0].name in TORCH_CLASS])
def test_live_coefficients_against_torch(rule: Rule, backend: str, device: torch.device) -> None:
    # Catches a coefficient that is right on the host and wrong when formed on the device.
    groups = torch_groups(rule)
    params = _params(len(groups), torch.float64, device)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    labels = [describe(group, groups[0]) for group in groups]
    capturable = [{**group, "capturable": True} for group in groups]
    live = optimizer_of(rule)(_groups(params, capturable), backend=backend)
    torch_class: Any = TORCH_CLASS[rule.name]
    by_torch = torch_class(_groups(copies, groups), foreach=False)
    gradients = make_gradients(params, 30 if backend == "reference" else 5)
    assert_same_trajectory(
        Trajectory(live, labels), Trajectory(by_torch, labels), gradients, TRAJECTORY
    )


@jit
def _two_inputs(p, inputs, states, coefficients, OPTIONS: tl.constexpr):
    return p - coefficients[0] * inputs[0], (states[0] + inputs[1],)


def _two_inputs_twin(p, inputs, states, coefficients, options):
    return p - coefficients[0] * inputs[0], (states[0] + inputs[1],)


TWO_INPUTS = Rule(
    name="gradient and squares",
    update=_two_inputs,
    twin=_two_inputs_twin,
    coefficients=lambda group, step: (0.25,),
    states=lambda group: ("sum",),
    hyper=(),
    n_coefficients=1,
    degrees=(1, 2),
)


class _Table:
    def __init__(self, device: torch.device) -> None:
        self.rows = [(0.25,)]
        self.row_of = [0]
        self.values = torch.tensor(self.rows, dtype=torch.float64, device=device)


def _update_two_inputs(
    backend: str, control: Sequence[float], device: torch.device
) -> tuple[Tensor, Tensor]:
    values = [torch.full((5,), v, device=device) for v in (8.0, 6.0, 10.0, 1.0)]
    entries = Entries([0], [values[0]], [[values[1]], [values[2]]], [[values[3]]], ())
    part = backends.prepare(backend, TWO_INPUTS, device, [entries])
    factors = torch.tensor(control, dtype=torch.float64, device=device)
    part.update(entries.inputs, _Table(device), factors)
    return values[0], values[3]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_scale_enters_each_input_by_its_degree(backend: str, device: torch.device) -> None:
    # p = 8 - 0.25 * (0.5 * 6) = 7.25, sum = 1 + 0.5^2 * 10 = 3.5. Catches squares that are
    # clipped like gradients.
    p, total = _update_two_inputs(backend, [0.5, 0.0, 1.0], device)
    assert p.tolist() == [7.25] * 5
    assert total.tolist() == [3.5] * 5


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_skip_flag_leaves_memory_alone(backend: str, device: torch.device) -> None:
    p, total = _update_two_inputs(backend, [float("nan"), 1.0, 1.0], device)
    assert p.tolist() == [8.0] * 5
    assert total.tolist() == [1.0] * 5
