"""The table of algorithms against the code that it speaks of."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import pytest

from fusedopt.kernels.rules import REGISTRY

ROOT = Path(__file__).resolve().parents[2]
# experiments and tools are not installed. Last, so that they hide nothing that is.
sys.path.append(str(ROOT))

algorithm_table = importlib.import_module("tools.algorithm_table")
ROWS = algorithm_table.ROWS
OWN_RULES = [r for r in REGISTRY.values() if r.update.fn.__module__.startswith("fusedopt.kernels")]

# Of the documents that the project is built on, the two of its own, and what other papers add.
NAMES = [
    *(f"000-{x}" for x in "abcdefgh"),
    *(f"002-{x}" for x in "abcdefg"),
    *(f"003-{x}" for x in "abc"),
    *(f"004-{x}" for x in "abcde"),
    "2402.18824",
    "new",
    "2302.06675",
    "2405.15682",
    "2506.02285",
]
rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def test_every_algorithm_has_a_row() -> None:
    # Catches an algorithm that is lost from the table, and one that is there twice.
    assert [row.name for row in ROWS] == NAMES


def test_the_page_has_the_table_as_it_is() -> None:
    # Catches a page that says what was true once: python -m tools.algorithm_table --write.
    text = algorithm_table.SECTION.page.read_text(encoding="utf-8")
    assert algorithm_table.SECTION.within(text) == text


@rows
def test_row_is_in_the_code(row) -> None:
    # Catches a name that has gone, and a variant that no test, verify or codegen runs.
    assert row.rule or row.lives
    for file in algorithm_table.files(row):
        assert (ROOT / file).is_file(), file
    if row.rule is not None:
        assert algorithm_table.example(row) is not None, f"no example group of {row.rule}"


@rows
def test_row_has_checks_that_exist(row) -> None:
    # Catches a test that was renamed or taken out.
    assert row.checks
    for check in row.checks:
        if check.startswith("experiments."):
            name = check.rpartition(".")[2]
            assert name in importlib.import_module("experiments").NAMES
        else:
            file, _, function = check.partition("::")
            tree = ast.parse((ROOT / algorithm_table.file_of_tests(file)).read_text("utf-8"))
            assert function in {x.name for x in tree.body if isinstance(x, ast.FunctionDef)}


@pytest.mark.parametrize("rule", OWN_RULES, ids=lambda rule: rule.name)
def test_every_rule_has_a_row(rule) -> None:
    # Catches a family of updates that the table forgets.
    rules = [REGISTRY[row.rule] for row in ROWS if row.rule]
    families = set(map(algorithm_table.file_of_rule, rules))
    assert algorithm_table.file_of_rule(rule) in families
