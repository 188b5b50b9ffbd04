"""``verify``: rules, and the elements of them that rounding decides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fusedopt import testing
from fusedopt.conditioning import reach
from fusedopt.kernels import lang
from fusedopt.kernels.lang import jit, tl, where
from fusedopt.kernels.rule import Rule
from fusedopt.kernels.rules import LION, RMSPROP, SGD, SVAG_SGD
from fusedopt.kernels.rules.cautious import shrunk
from fusedopt.kernels.rules.lion import update as lion

BF16, FP32 = torch.bfloat16, torch.float32
# SGD with momentum and cautious decay, of which coefficients are as ``sgd.COEFFICIENTS``.
CAUTIOUS = SGD.example_groups[-1]

pytestmark = pytest.mark.skipif(lang.triton is None, reason="needs Triton")


@jit
def lion_the_other_way(p, inputs, states, coefficients, OPTIONS: tl.constexpr):
    new, states = lion(p, inputs, states, coefficients, OPTIONS)
    return 2.0 * coefficients[2] * p - new, states


@jit
def lion_of_the_gradient(p, inputs, states, coefficients, OPTIONS: tl.constexpr):
    _, states = lion(p, inputs, states, coefficients, OPTIONS)
    sign = where(inputs[0] > 0, 1.0, where(inputs[0] < 0, -1.0, inputs[0]))
    return p * coefficients[2] - coefficients[3] * sign, states


@jit
def lion_that_rests(p, inputs, states, coefficients, OPTIONS: tl.constexpr):
    new, states = lion(p, inputs, states, coefficients, OPTIONS)
    return where((states[0] < 0.02) & (states[0] > -0.02), p * coefficients[2], new), states


@jit
def averaged(inputs, states, coefficients):
    return coefficients[2] * states[0] + coefficients[3] * inputs[0]


@jit
def decayed_everywhere(p, inputs, states, coefficients, OPTIONS: tl.constexpr):
    d = averaged(inputs, states, coefficients)
    return p * (1.0 - coefficients[1]) - coefficients[5] * d, (d,)


@jit
def decayed_nowhere(p, inputs, states, coefficients, OPTIONS: tl.constexpr):
    d = averaged(inputs, states, coefficients)
    return p - coefficients[5] * d, (d,)


@jit
def decayed_against_the_step(p, inputs, states, coefficients, OPTIONS: tl.constexpr):
    d = averaged(inputs, states, coefficients)
    return shrunk(p, -d, 1.0 - coefficients[1]) - coefficients[5] * d, (d,)


@jit
def decayed_by_the_gradient(p, inputs, states, coefficients, OPTIONS: tl.constexpr):
    d = averaged(inputs, states, coefficients)
    return shrunk(p, inputs[0], 1.0 - coefficients[1]) - coefficients[5] * d, (d,)


@jit
def decayed_unless_still(p, inputs, states, coefficients, OPTIONS: tl.constexpr):
    d = averaged(inputs, states, coefficients)
    p = where(d == 0.0, p, shrunk(p, d, 1.0 - coefficients[1]))
    return p - coefficients[5] * d, (d,)


@jit
def forgetful(p, inputs, states, coefficients, OPTIONS: tl.constexpr):
    d = averaged(inputs, states, coefficients)
    return shrunk(p, d, 1.0 - coefficients[1]) - coefficients[5] * d, states


@jit
def inexact(p, inputs, states, coefficients, OPTIONS: tl.constexpr):
    # Five epsilons of float64 off.
    new = p - coefficients[5] * inputs[0]
    return new + 1.1102230246251565e-15 * new, states


LION_MUTANTS = (lion_the_other_way, lion_of_the_gradient, lion_that_rests)
DECAY_MUTANTS = (
    decayed_everywhere,
    decayed_nowhere,
    decayed_against_the_step,
    decayed_by_the_gradient,
    decayed_unless_still,
    forgetful,
)


def _name(value):
    return getattr(getattr(value, "fn", value), "__name__", None)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(testing, "SHAPES", ((300,), (), (0,)))


@pytest.mark.parametrize("dtype", [BF16, torch.float16, FP32], ids=str)
@pytest.mark.parametrize(
    ("rule", "group", "update"),
    [(LION, LION.example_groups[0], mutant) for mutant in LION_MUTANTS]
    + [(SGD, CAUTIOUS, mutant) for mutant in DECAY_MUTANTS],
    ids=lambda value: _name(value) if callable(value) else "",
)
def test_a_wrong_sign_is_found(small, rule, group, update, dtype, device):
    # Catches an excuse for the sign that covers elements whose sign is plain.
    assert testing.compare(rule, group, dtype, device).passed
    found = testing.compare(replace(rule, update=update), group, dtype, device)
    assert found.ulps > 2 * found.tolerance and not found.passed


def test_what_is_inexact_everywhere_is_found(small, device):
    # Catches a count of undecided elements that nobody reads: each by itself may be rounding.
    group = SGD.example_groups[0]
    found = testing.compare(replace(SGD, update=inexact), group, torch.float64, device)
    assert found.ulps <= found.tolerance and found.undecided > 0.5 * found.compared
    assert not found.passed


@pytest.mark.parametrize(
    ("rule", "number", "dtype"),
    [
        # Signs of sums that are rounding, or zero.
        (LION, 0, BF16),
        (LION, 0, torch.float16),
        # Of gradient and decay nothing is left: the square of a rounding, or 0.
        (RMSPROP, 1, BF16),
        (SGD, -1, BF16),
        # Steps are many times a parameter that ends where it began: 32 ulps after five of them.
        (SVAG_SGD, 4, FP32),
    ],
    ids=["Lion bf16", "Lion fp16", "RMSprop bf16", "SGD bf16", "SVAG SGD fp32"],
)
def test_a_right_kernel_passes_where_rounding_decides(rule, number, dtype, device):
    found = testing.compare(rule, rule.example_groups[number], dtype, device)
    assert found.passed and found.moved, found


def _reach(rule, group, p, gradient, *states, dtype=BF16, step=2):
    operands = [torch.tensor(x, dtype=FP32) for x in (p, gradient, *states)]
    return reach(rule, group, step, operands, dtype)


def test_reach_of_a_sign():
    # A sum of products that cancels but for its rounding, one that is plain, and an exact zero.
    p, gradient, average = [1.0, 1.0, 1.0], [4.0, 4.0, 0.0], [-1.0, 1.0, 0.0]
    parameter, _ = _reach(LION, LION.example_groups[0], p, gradient, average)
    lr = LION.example_groups[0]["lr"]
    # Of 1 - lr and 1 + lr in bfloat16.
    assert parameter[0] == pytest.approx(2 * lr, abs=0.01)
    assert parameter[1:].tolist() == [0.0, 0.0]


def test_reach_of_a_cautious_decay():
    # mu b + d is rounding in the first element; wherever it is, the decay is lr wd = 0.21.
    group = {**CAUTIOUS, "momentum": 0.2}
    parameter, _ = _reach(SGD, group, [3.0, 3.0, -3.0], [1.0, 1.0, 1.0], [-5.0, 5.0, 5.0])
    assert parameter[0] == pytest.approx(0.21 * 3, abs=0.02)
    assert parameter[1:].max() < 0.02


def test_reach_of_a_square_goes_both_ways():
    # Catches a range of what was found: a square has its least within, not at an end.
    group = RMSPROP.example_groups[1]
    moved = _reach(RMSPROP, group, [-1.71875], [0.171875], [0.0], [0.0], step=1)
    p, inputs = torch.tensor([-1.71875]), (torch.tensor([0.171875]),)
    numbers, options = RMSPROP.coefficients(group, 1), RMSPROP.options(group)
    _, (square, _) = RMSPROP.twin(p, inputs, (torch.zeros(1), torch.zeros(1)), numbers, options)
    assert square > 0 and moved[1] > square


def test_a_rule_that_counts_no_steps_is_told_of_two(small, device):
    # Catches coefficients of a step that the optimizer never asks for.
    asked = []

    def coefficients(group, step):
        asked.append(step)
        return LION.coefficients(group, step)

    rule: Rule = replace(LION, coefficients=coefficients, update=lion_the_other_way)
    assert not testing.compare(rule, LION.example_groups[0], FP32, device).passed
    assert set(asked) == {1, 2}
