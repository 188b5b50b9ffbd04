"""Coefficients formed on the device: by one kernel, by PyTorch, on the host, and in 60 digits."""

from __future__ import annotations

from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from contract import DEVICE

from fusedopt.backends.triton_coefficients import TritonCoefficients
from fusedopt.coefficients import LiveTable
from fusedopt.kernels import formula as formulas
from fusedopt.kernels import live_coefficients
from fusedopt.kernels.rules import REGISTRY

# Of float64. A power is within two units in the last place in every library; what is taken from 1
# keeps that absolutely, and so has a larger share of what is left.
UNIT = 2.0**-52
STEPS = (1.0, 2.0, 7.0, 1e3, 123457.0, 1e6)

EXACT: dict[str, Any] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b, "pow": lambda a, b: a**b, "gt": lambda a, b: Decimal(int(a > b)),
}  # fmt: skip

each_group = pytest.mark.parametrize(
    ("rule", "group"),
    [
        pytest.param(rule, group, id=f"{rule.name} {i}")
        for rule in REGISTRY.values()
        for i, group in enumerate(rule.example_groups)
    ],
)


def _table(rule: Any, groups: Any, group_of: list[int], with_step: bool = False) -> LiveTable:
    table = LiveTable(rule, DEVICE, group_of, groups, with_step)
    table.values.fill_(float("nan"))
    return table


def _counts(values: Any, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Make counts that the kernel is to advance to these."""
    return [torch.tensor(value - 1, dtype=dtype, device=DEVICE) for value in values]


CONTROL = torch.tensor([1.0, 0.0], dtype=torch.float64, device=DEVICE)


def _by_kernel(rule: Any, groups: Any, group_of: list[int], steps: Any) -> torch.Tensor:
    table = _table(rule, groups, group_of)
    counts = _counts(steps) if rule.counts_steps else ()
    if not counts:
        table.steps.copy_(torch.tensor(steps, dtype=torch.float64))
    TritonCoefficients(table, counts).step(groups, CONTROL)
    return table.values


def _exactly(rule: Any, group: Any, table: LiveTable, step: float) -> list[Decimal]:
    formula = table.formulas[0]
    with localcontext() as context:
        context.prec = 60
        known = [Decimal(step), Decimal(step), *map(Decimal, table.inputs[0].tolist())]
        known = known[: 2 + formula.n_inputs + len(formula.constants)]
        for name, a, b in zip(formula.operations, formula.left, formula.right, strict=True):
            known.append(EXACT[name](known[a], known[b]))
        return [known[place] for place in formula.results]


@each_group
def test_each_way_is_within_rounding_of_the_exact_value(rule: Any, group: Any) -> None:
    groups = [group]
    table = _table(rule, groups, [0] * len(STEPS))
    table.steps.copy_(torch.tensor(STEPS, dtype=torch.float64))
    table.refresh(groups)
    kernel = _by_kernel(rule, groups, [0] * len(STEPS), STEPS)
    for row, step in enumerate(STEPS):
        exact = _exactly(rule, group, table, step)
        host = rule.coefficients(group, step)
        for column, wanted in enumerate(exact):
            ways = (kernel[row, column].item(), table.values[row, column].item(), host[column])
            # 1 - beta**t is at least 0.01 here.
            allowed = Decimal(128 * UNIT) * abs(wanted)
            assert all(abs(Decimal(float(way)) - wanted) <= allowed for way in ways), column
            # What the update sees of it.
            narrow = [torch.tensor(float(way)).float() for way in (*ways, wanted)]
            torch.testing.assert_close(narrow[:3], [narrow[3]] * 3, rtol=1.2e-7, atol=0)


@pytest.mark.parametrize(("beta2", "units"), [(0.99, 8), (0.999, 64), (0.9999, 1024)])
def test_roots_and_steps_over_a_million_steps(beta2: float, units: int) -> None:
    """What docs/launches.md says: as far off as PyTorch and the host are, and no farther."""
    rule = REGISTRY["Adam"]
    group = {**rule.example_groups[0], "betas": (0.9, beta2)}
    steps = [1.0, 2.0, 3.0, 7.0, 10.0, 50.0, 100.0, 1e3, 12345.0, 1e5, 123457.0, 1e6]
    table = _table(rule, [group], [0] * len(steps))
    table.steps.copy_(torch.tensor(steps, dtype=torch.float64))
    table.refresh([group])
    kernel = _by_kernel(rule, [group], [0] * len(steps), steps)
    for row, step in enumerate(steps):
        exact, host = _exactly(rule, group, table, step), rule.coefficients(group, step)
        for name in ("root_bias", "step_size"):
            column = rule.coefficient_names.index(name)
            ways = (kernel[row, column].item(), table.values[row, column].item(), host[column])
            errors = [abs(float(Decimal(way) / exact[column] - 1)) / UNIT for way in ways]
            assert max(errors) <= units, (step, name, errors)


@each_group
def test_kernel_and_pytorch_differ_by_powers_alone(rule: Any, group: Any) -> None:
    """Equal to the bit where there is none: catches a contracted product, or another order."""
    table = _table(rule, [group], [0] * len(STEPS))
    table.steps.copy_(torch.tensor(STEPS, dtype=torch.float64))
    table.refresh([group])
    kernel = _by_kernel(rule, [group], [0] * len(STEPS), STEPS)
    formula = table.formulas[0]
    powers = {
        2 + formula.n_inputs + len(formula.constants) + i
        for i, name in enumerate(formula.operations)
        if name == "pow"
    }
    touched = set(powers)
    for i, (a, b) in enumerate(zip(formula.left, formula.right, strict=True)):
        if {a, b} & touched:
            touched.add(2 + formula.n_inputs + len(formula.constants) + i)
    for column, place in enumerate(formula.results):
        if place not in touched:
            assert torch.equal(kernel[:, column], table.values[:, column]), column


def test_counts_are_advanced_once_each_and_rows_are_those_of_their_groups() -> None:
    """Several programs, groups of two formulas in turn, and the step for a last column."""
    rule = REGISTRY["Adam"]
    one = {**rule.example_groups[0], "lr": 0.5, "betas": (0.5, 0.75)}
    # Other numbers, one formula; and another formula.
    groups = [one, {**one, "bias_correction": None}, {**one, "lr": 0.25}]
    n = live_coefficients.BLOCK + 5
    group_of = [0] * n + [1] * n + [2] * n
    table = _table(rule, groups, group_of, with_step=True)
    before = [float(i % 7) for i in range(3 * n)]
    counts = _counts([value + 1 for value in before], torch.float32)
    coefficients = TritonCoefficients(table, counts)
    assert [on_device.shape[1] for on_device in coefficients.memory()] == [2 * n, n]
    for turn in (1, 2):
        coefficients.step(groups, CONTROL)
        now = [value + turn for value in before]
        assert [count.item() for count in counts] == now
        for row, step in enumerate(now):
            wanted = [*rule.coefficients(groups[group_of[row]], step), step]
            torch.testing.assert_close(table.values[row].tolist(), wanted, rtol=1e-14, atol=0)


def test_a_skipped_step_is_not_counted() -> None:
    rule = REGISTRY["Adam"]
    groups = [rule.example_groups[0]]
    table = _table(rule, groups, [0, 0], with_step=True)
    counts = _counts((1.0, 5.0))
    control = torch.tensor([1.0, 8.0], dtype=torch.float64, device=DEVICE)
    TritonCoefficients(table, counts).step(groups, control)
    assert [count.item() for count in counts] == [0.0, 4.0]
    assert table.values[:, -1].tolist() == [0.0, 4.0]


def test_numbers_that_live_on_the_device_are_read_at_every_step() -> None:
    rule = REGISTRY["SGD"]
    live = {**rule.example_groups[0], "lr": torch.tensor(0.5, device=DEVICE)}
    live["weight_decay"] = torch.tensor([0.25], dtype=torch.float64, device=DEVICE)
    table = _table(rule, [live], [0])
    coefficients = TritonCoefficients(table)
    for lr, decay in ((0.5, 0.25), (0.125, 0.5)):
        live["lr"].fill_(lr)
        live["weight_decay"].fill_(decay)
        coefficients.step([live], CONTROL)
        named = dict(zip(rule.coefficient_names, table.values[0].tolist(), strict=True))
        assert (named["lr"], named["decay"]) == (lr, decay)


def test_a_formula_says_what_was_done() -> None:
    def coefficients(group: Any, step: Any, number: Any) -> tuple[Any, ...]:
        a, b = group["betas"]
        return -a, 1 - b**step, 2.0, a / step + (number > 1), 0.0, -0.0

    found = formulas.record(coefficients, {"betas": (0.1, 0.2)}, {"betas": 2})
    assert found.constants == (-1.0, 1.0, 1.0, 2.0, 0.0, -0.0) and found.n_inputs == 2
    assert found.operations == ("mul", "pow", "sub", "div", "gt", "add")
    # Step 0, its number 1, inputs 2 and 3, constants 4 to 9, operations from 10 on.
    assert (found.left, found.right) == ((2, 3, 5, 2, 1, 13), (4, 0, 11, 0, 6, 14))
    assert found.results == (10, 12, 7, 15, 8, 9)


def test_the_value_of_a_constant_is_no_part_of_a_kernel() -> None:
    """Catches a sign, or a decay of 0, for which a kernel would be compiled of its own."""
    group = REGISTRY["SGD"].example_groups[0]
    counts = dict.fromkeys(REGISTRY["SGD"].hyper, 1)
    down, up = (
        formulas.record(
            lambda own, step, _: REGISTRY["SGD"].coefficients(own, step),
            {**group, "maximize": maximize},
            counts,
        )
        for maximize in (False, True)
    )
    assert down.shape == up.shape and down.constants != up.constants


def test_a_branch_on_what_lives_on_the_device_is_an_error() -> None:
    with pytest.raises(TypeError, match="branched on a hyper-parameter"):
        formulas.record(lambda group, step, _: (1.0 if step > 1 else 0.0,), {}, {})
