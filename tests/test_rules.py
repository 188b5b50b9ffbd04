"""Every rule in the registry, with each of its example groups, against three oracles.

The kernel against the rule's twin and against its own source executed by torch; the source
against the twin in float64; the twin against torch.optim; and numbers worked by hand. A new rule
is covered by adding it to the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import fusedopt
import pytest
import torch
from fusedopt import backends
from fusedopt.backends import Slot
from fusedopt.kernels.lang import jit, sqrt, tl
from fusedopt.kernels.rule import Rule
from fusedopt.kernels.rules import REGISTRY
from oracles import (
    INTERPRETED,
    TORCH_CLASS,
    ForeignName,
    Trajectory,
    as_scalars,
    assert_same_trajectory,
    describe,
    give_gradient,
    make_gradients,
    optimizer_of,
    source_of,
    wide,
)
from tolerances import FORMULA, STEP, TRAJECTORY, assert_close_ulps, assert_equal, bits
from torch import Tensor

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
        (torch.float16, torch.float64),
    )
]
SIZE = 60


def _params(count: int, dtype: torch.dtype, device: torch.device) -> list[torch.nn.Parameter]:
    return [
        torch.nn.Parameter(torch.randn(SIZE, dtype=torch.float64, device=device).to(dtype))
        for _ in range(count)
    ]


def _groups(params: Sequence[Tensor], groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**group, "params": [p]} for p, group in zip(params, groups, strict=True)]


def _spread(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradients of very different sizes, some of them about as small as eps."""
    size = torch.logspace(-6, 1, like.numel(), dtype=torch.float64, device=like.device)
    return (torch.randn(like.numel(), dtype=torch.float64, device=like.device) * size).to(dtype)


# --- the registry ----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_examples_reach_every_branch(rule: Rule) -> None:
    # Catches an option that no test, no `verify` and no ahead-of-time build ever turns on.
    seen = [rule.options(group) for group in rule.example_groups]
    for position in range(len(seen[0])):
        assert {options[position] for options in seen} == {False, True}, position
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


# --- kernel against its source and its twin --------------------------------------------------


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
            gradient = _spread(p, gradient_type)
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
                assert_close_ulps(
                    got[name], value, old, STEP[value.dtype], f"step {step}: group {i}: {name}"
                )


def _copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}


@pytest.mark.skipif(not INTERPRETED, reason="compiled code contracts products and sums")
@pytest.mark.parametrize(("stored", "gradient_type"), TYPES)
@pytest.mark.parametrize("rule", RULES)
def test_kernel_is_its_source_to_the_bit(
    rule: Rule, stored: torch.dtype, gradient_type: torch.dtype, device: torch.device
) -> None:
    # Catches whatever the skeleton adds to or leaves out of the rule: a wrong row of
    # coefficients, a type too narrow, a second rounding, a rounding that is not to nearest even.
    params = _params(len(rule.example_groups), stored, device)
    start = [p.detach().clone() for p in params]
    kernel = optimizer_of(rule)(_groups(params, rule.example_groups), backend="triton")
    gradients = [_spread(p, gradient_type) for p in params]
    for p, gradient in zip(params, gradients, strict=True):
        give_gradient(p, gradient)
    kernel.step()
    compute = wide([stored, gradient_type])
    source = source_of(rule.update)
    for i, group in enumerate(rule.example_groups):
        names = rule.states(group)
        zero = torch.zeros_like(start[i], dtype=compute)
        p, states = source(
            start[i].to(compute),
            (gradients[i].to(compute),),
            tuple(zero for _ in names),
            as_scalars(rule.coefficients(group, 1.0), compute, device),
            rule.options(group),
        )
        assert_equal(params[i], p.to(stored), start[i], f"group {i}: p")
        for name, value in zip(names, states, strict=True):
            got = kernel.state[params[i]][name]
            assert_equal(got, value.to(stored), zero.to(stored), f"group {i}: {name}")


# --- source against twin, in float64 ---------------------------------------------------------


@pytest.mark.parametrize(("rule", "group"), CASES)
def test_source_against_twin_in_float64(rule: Rule, group: Mapping[str, Any]) -> None:
    # Catches a slip in either statement of the formula that single precision could hide.
    source, options = source_of(rule.update), rule.options(group)
    p = torch.randn(SIZE, dtype=torch.float64)
    states = tuple(torch.zeros_like(p) for _ in rule.states(group))
    for step in range(1, 8):
        gradient = _spread(p, torch.float64)
        inputs = tuple(gradient**degree for degree in rule.degrees)
        numbers = rule.coefficients(group, float(step))
        got_p, got = source(p, inputs, states, as_scalars(numbers, torch.float64), options)
        new_p, new = rule.twin(p, inputs, states, numbers, options)
        assert len(got) == len(new) == len(states)
        assert_close_ulps(got_p, new_p, p, FORMULA, f"step {step}: p")
        for name, a, b, old in zip(rule.states(group), got, new, states, strict=True):
            # A maximum stays where it is.
            moved = 0.0 if name.startswith("max") and step > 1 else 0.5
            assert_close_ulps(a, b, old, FORMULA, f"step {step}: {name}", moved=moved)
        p, states = new_p, new


GLOBAL = 2.0


def _honest(p, inputs, states, coefficients, OPTIONS):
    return p - coefficients[0] * inputs[0] / sqrt(inputs[0] * inputs[0]), states


def _reads_global(p, inputs, states, coefficients, OPTIONS):
    return p - GLOBAL * inputs[0], states


def _reads_global_in_dead_code(p, inputs, states, coefficients, OPTIONS):
    if OPTIONS[0]:
        p = p - GLOBAL
    return p, states


def _asks_where_it_is(p, inputs, states, coefficients, OPTIONS):
    return p * tl.program_id(0), states


def _reads_memory(p, inputs, states, coefficients, OPTIONS):
    return tl.load(inputs[0]), states


def _casts(p, inputs, states, coefficients, OPTIONS):
    return p.to(inputs[0].dtype), states


def _calls_python(p, inputs, states, coefficients, OPTIONS):
    return max(p, inputs[0]), states


def test_source_oracle_runs_an_elementwise_function() -> None:
    one = torch.ones(1, dtype=torch.float64)
    p, states = source_of(jit(_honest))(3 * one, (-2 * one,), (), (0.5 * one,), (False,))
    assert p.item() == 3.5
    assert states == ()


@pytest.mark.parametrize(
    "function",
    [
        _reads_global, _reads_global_in_dead_code, _asks_where_it_is, _reads_memory, _casts,
        _calls_python,
    ],
)  # fmt: skip
def test_source_oracle_refuses_all_but_arguments(function: Callable[..., Any]) -> None:
    # Catches an oracle that lends a rule what the rule must not have.
    with pytest.raises(ForeignName):
        source_of(jit(function))


# --- twin against torch.optim ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("rule", [r for r in RULES if r.values[0].name in TORCH_CLASS])
def test_twin_against_torch(rule: Rule, dtype: torch.dtype, device: torch.device) -> None:
    # Catches a misread formula. On the CPU the twin makes torch's calls, so not a bit differs.
    params = _params(len(rule.example_groups), dtype, device)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    labels = [describe(group, rule.example_groups[0]) for group in rule.example_groups]
    twin = optimizer_of(rule)(_groups(params, rule.example_groups), backend="reference")
    torch_class: Any = TORCH_CLASS[rule.name]
    by_torch = torch_class(_groups(copies, rule.example_groups), foreach=False)
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
    groups = [{**group, "capturable": True} for group in rule.example_groups]
    params = _params(len(groups), torch.float64, device)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    labels = [describe(group, rule.example_groups[0]) for group in rule.example_groups]
    live = optimizer_of(rule)(_groups(params, groups), backend=backend)
    torch_class: Any = TORCH_CLASS[rule.name]
    by_torch = torch_class(_groups(copies, rule.example_groups), foreach=False)
    gradients = make_gradients(params, 30 if backend == "reference" else 5)
    assert_same_trajectory(
        Trajectory(live, labels), Trajectory(by_torch, labels), gradients, TRAJECTORY
    )


# --- scale and skip --------------------------------------------------------------------------


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
    slot = Slot(0, values[0], (values[1], values[2]), (values[3],), ())
    part = backends.prepare(backend, TWO_INPUTS, device, [slot])
    part.update(_Table(device), torch.tensor(control, dtype=torch.float64, device=device))
    return values[0], values[3]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_scale_enters_each_input_by_its_degree(backend: str, device: torch.device) -> None:
    # p = 8 - 0.25 * (0.5 * 6) = 7.25, sum = 1 + 0.5^2 * 10 = 3.5. Catches squares that are
    # clipped like gradients.
    p, total = _update_two_inputs(backend, [0.5, 0.0], device)
    assert p.tolist() == [7.25] * 5
    assert total.tolist() == [3.5] * 5


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_skip_flag_leaves_memory_alone(backend: str, device: torch.device) -> None:
    p, total = _update_two_inputs(backend, [float("nan"), 1.0], device)
    assert p.tolist() == [8.0] * 5
    assert total.tolist() == [1.0] * 5


# --- numbers worked by hand ------------------------------------------------------------------

F = Fraction
# (class, arguments, first parameter, gradients, parameters after each step, states at the end)
BY_HAND = {
    # d = 3 + 0.5 * 2 = 4; p = 2 - 0.25 * 4 = 1.   d = -1 + 0.5 * 1 = -0.5; p = 1 + 0.125.
    "SGD-decay": (
        fusedopt.SGD, {"lr": 0.25, "weight_decay": 0.5},
        2, [3, -1], [1, F(9, 8)], {},
    ),
    # Ascent: d = -3 + 0.5 * 2 = -2; p = 2 + 0.25 * 2 = 2.5. The decay still pulls down.
    "SGD-maximize": (
        fusedopt.SGD, {"lr": 0.25, "weight_decay": 0.5, "maximize": True},
        2, [3], [F(5, 2)], {},
    ),
    # b = 4, undampened; p = 1 - 0.5 * 4 = -1.   b = 0.75 * 4 + 0.25 * 8 = 5; p = -1 - 2.5.
    # b = 0.75 * 5 + 0.25 * (-3) = 3; p = -3.5 - 1.5.
    "SGD-dampening": (
        fusedopt.SGD, {"lr": 0.5, "momentum": 0.75, "dampening": 0.75},
        1, [4, 8, -3], [-1, F(-7, 2), -5], {"momentum_buffer": 3},
    ),
    # b = 4; p = 1 - 0.5 * (4 + 0.5 * 4) = -2.   b = 2 + 2 = 4; p = -2 - 0.5 * (2 + 2) = -4.
    "SGD-nesterov": (
        fusedopt.SGD, {"lr": 0.5, "momentum": 0.5, "nesterov": True},
        1, [4, 2], [-2, -4], {"momentum_buffer": 4},
    ),
    # s = 0.25 * 8^2 = 16; p = 1 - 5 * 8 / (4 + 1) = -7.
    # s = 0.75 * 16 + 0.25 * 4^2 = 16; p = -7 - 5 * 4 / (4 + 1) = -11.
    "RMSprop": (
        fusedopt.RMSprop, {"lr": 5, "alpha": 0.75, "eps": 1},
        1, [8, 4], [-7, -11], {"square_avg": 16},
    ),
    # d = 6 + 0.5 * 4 = 8; s = 0.25 * 64 = 16; b = 8 / (4 + 1) = 1.6; p = 4 - 2 * 1.6 = 0.8.
    # d = 3.6 + 0.4 = 4; s = 0.75 * 16 + 0.25 * 16 = 16; b = 0.5 * 1.6 + 4 / 5 = 1.6; p = -2.4.
    "RMSprop-momentum": (
        fusedopt.RMSprop,
        {"lr": 2, "alpha": 0.75, "eps": 1, "momentum": 0.5, "weight_decay": 0.5},
        4, [6, F(18, 5)], [F(4, 5), F(-12, 5)],
        {"square_avg": 16, "momentum_buffer": F(8, 5)},
    ),
    # s = 0.2 * 25 = 5; a = 0.2 * 5 = 1; s - a^2 = 4; p = 3 - 2 * 5 / (2 + 0.5) = -1.
    # s = 0.8 * 5 + 0.2 * 25 = 9; a = 0.8 + 1 = 1.8; s - a^2 = 5.76; p = -1 - 10 / (2.4 + 0.5).
    "RMSprop-centered": (
        fusedopt.RMSprop, {"lr": 2, "alpha": 0.8, "eps": 0.5, "centered": True},
        3, [5, 5], [-1, -1 - F(100, 29)], {"square_avg": 9, "grad_avg": F(9, 5)},
    ),
    # m = 0.5 * 2 = 1, v = 0.25 * 4 = 1; m / (1 - 0.5) = 2, sqrt(v / (1 - 0.75)) = 2;
    # p = 1 - 9/8 * 2 / (2 + 1/4) = 0.
    # m = 0.5 + 2.5 = 3, v = 0.75 + 6.25 = 7; m / (1 - 1/4) = 4, sqrt(7 / (1 - 9/16)) = 4;
    # p = 0 - 9/8 * 4 / (4 + 1/4) = -18/17.
    "Adam": (
        fusedopt.Adam, {"lr": 1.125, "betas": (0.5, 0.75), "eps": 0.25},
        1, [2, 5], [0, F(-18, 17)], {"exp_avg": 3, "exp_avg_sq": 7},
    ),
    # The same two steps, from d = g + 0.5 p: 1.5 + 0.5 = 2 and 5 + 0 = 5.
    "Adam-decay": (
        fusedopt.Adam, {"lr": 1.125, "betas": (0.5, 0.75), "eps": 0.25, "weight_decay": 0.5},
        1, [F(3, 2), 5], [0, F(-18, 17)], {"exp_avg": 3, "exp_avg_sq": 7},
    ),
    # Decay apart from the gradient: p = (1 - 1.125 * 0.5) * 16 - 9/8 * 2 / (9/4) = 7 - 1 = 6,
    # then 7/16 * 6 - 18/17.
    "AdamW": (
        fusedopt.AdamW, {"lr": 1.125, "betas": (0.5, 0.75), "eps": 0.25, "weight_decay": 0.5},
        16, [2, 5], [6, F(21, 8) - F(18, 17)], {"exp_avg": 3, "exp_avg_sq": 7},
    ),
    # beta2 = 0.6: v = 0.4 * 10 = 4 of the first step (g^2 = 10 is not rational, so the first
    # step is 2 and the second 6): v = 1.6; p = 1 - 2 * 2 / (2 + 2) = 0.
    # v = 0.96 + 14.4 = 15.36 = v_max, 1 - 0.36 = 0.64, sqrt(15.36 / 0.64) = sqrt(24): see below.
    # Third step with g = 0 and AMSGrad: v = 9.216 is below v_max = 15.36.
    "Adam-amsgrad": (
        fusedopt.Adam, {"lr": 2, "betas": (0.0, 0.6), "eps": 2, "amsgrad": True},
        1, [2, 0], [0, 0],
        {"exp_avg": 0, "exp_avg_sq": F(24, 25), "max_exp_avg_sq": F(8, 5)},
    ),
}  # fmt: skip
