"""Coefficients by name: in the rules, and wherever they are printed or written out."""

from __future__ import annotations

import ast
import inspect
import textwrap

import checkout  # noqa: F401  # native.generate is imported from it
import pytest

from fusedopt import Rule
from fusedopt.kernels import aot
from fusedopt.kernels.rules import ADAM, REGISTRY, RMSPROP
from native.generate import sources
from native.generate.table import LIBRARY


@pytest.mark.parametrize("rule", REGISTRY.values(), ids=lambda rule: rule.name)
def test_every_coefficient_has_a_name(rule: Rule) -> None:
    assert len(set(rule.coefficient_names)) == rule.n_coefficients > 0
    for group in rule.example_groups:
        assert len(rule.coefficients(group, 2.0)) == rule.n_coefficients


@pytest.mark.parametrize("rule", [ADAM, RMSPROP], ids=lambda rule: rule.name)
def test_names_are_those_that_the_update_unpacks(rule: Rule) -> None:
    # Catches a name that is printed beside another coefficient's value.
    tree = ast.parse(textwrap.dedent(inspect.getsource(rule.twin)))
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and "coefficients" in ast.unparse(node.value):
            (target,) = node.targets
            if isinstance(target, ast.Tuple) and "T." not in ast.unparse(node.value):
                found += [ast.unparse(name) for name in target.elts]
    assert tuple(found) == rule.coefficient_names


def test_what_one_minus_beta_is_called() -> None:
    group = {**ADAM.example_groups[0], "betas": (0.75, 0.5), "lr": 0.125}
    named = dict(zip(ADAM.coefficient_names, ADAM.coefficients(group, 1.0), strict=True))
    assert named["one_minus_beta1"] == 0.25 and named["beta2"] == named["one_minus_beta2"] == 0.5
    assert named["step_size"] == 0.5 and named["root_bias"] == 0.5**0.5


def test_rules_without_names() -> None:
    def make(**options):
        return Rule(
            "x", None, None, lambda group, step: (1.0, 2.0), lambda group: (), (), **options
        )

    assert make(n_coefficients=2).coefficient_names == ("coefficient 0", "coefficient 1")
    assert make(coefficient_names=("a", "b")).n_coefficients == 2
    with pytest.raises(ValueError, match="x: 3 coefficients have 2 names"):
        make(n_coefficients=3, coefficient_names=("a", "b"))


def test_variants_name_them() -> None:
    names = {
        v.name: v.coefficients for v in aot.variants(aot.parse_target("cuda:90")) if v.coefficients
    }
    assert names["Adam fp32"] == ADAM.coefficient_names
    assert {name.split()[0] for name in names} > {"SGD", "RMSprop", "Adam", "update_from_samples"}


@pytest.mark.parametrize("entry", LIBRARY, ids=lambda entry: entry.rule.name)
def test_c_names_them(entry) -> None:
    lines = sources.coefficients(entry, dict.fromkeys(entry.flags, False))
    for i, name in enumerate(entry.rule.coefficient_names):
        (line,) = [line for line in lines if line.startswith(f"row[{i}] ")]
        assert line.endswith(f"; /* {name} */")
