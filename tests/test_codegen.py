"""Compiled kernels, without a GPU: what they move, what they use, and that budgets are held."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from fusedopt.kernels import aot
from fusedopt.kernels.aot import Report, Variant

# Compiled in one subprocess without the interpreter, which this process has turned on.
SCRIPT = """
import json, sys
from fusedopt.kernels import aot
from fusedopt.examples.lion import LION
from fusedopt.kernels.rules import register
register(LION)
target = aot.parse_target("cuda:90")
wanted = json.loads(sys.argv[1])
rows = {}
for variant in aot.variants():
    if variant.name in wanted:
        result = aot.report(aot.compile_variant(variant, target), target)
        moved = result.bytes_moved(variant)
        rows[variant.name] = [moved, result.registers, aot.broken_budgets(variant, result, target)]
print(json.dumps(rows))
"""

# Bytes an element, as the operands' types demand.
BYTES = {
    "Adam fp32": 28,
    "Adam bf16": 14,
    "Adam fp32/bf16 gradient": 26,
    "SGD fp32": 12,
    "SGD (momentum) fp32": 20,
    "RMSprop fp32": 20,
    "RMSprop (centered, momentum) fp32": 36,
    "Lion fp32": 20,
    "partial_norms (2) fp32": 4,
    "partial_norms (inf) bf16": 2,
}


def _without_interpreter(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def compiled() -> dict[str, tuple[float, int, list[str]]]:
    result = _without_interpreter("-c", SCRIPT, json.dumps(list(BYTES)))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_each_byte_is_moved_once_in_wide_accesses(compiled):
    assert {name: row[0] for name, row in compiled.items()} == BYTES


def test_clipping_costs_four_bytes(compiled):
    assert compiled["Adam fp32"][0] + compiled["partial_norms (2) fp32"][0] == 32


def test_budgets_hold(compiled):
    assert {name: row[2] for name, row in compiled.items() if row[2]} == {}
    assert compiled["Adam fp32"][1] <= 64


ADAM = Variant("update_tensors", "Adam", (False,), 2, ("fp32",) * 4)
GOOD = Report(registers=60, stack=0, shared=0, loads={128: 8}, stores={128: 6}, matrix=())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, None),
        ({"stack": 8}, "stack"),
        ({"registers": 65}, "registers"),
        ({"loads": {32: 32}, "stores": {32: 24}}, "128-bit"),
        ({"loads": {128: 9}}, "128-bit"),
    ],
)
def test_a_broken_budget_is_named(change, complaint):
    report = Report(**{**vars(GOOD), **change})
    broken = aot.broken_budgets(ADAM, report, aot.parse_target("cuda:90"))
    assert [complaint in text for text in broken] == ([True] if complaint else [])


def test_every_rule_type_and_alignment_is_listed():
    names = [variant.name for variant in aot.variants()]
    assert len(names) == len(set(names))
    for rule in ("SGD", "RMSprop", "Adam", "Lion"):
        for types in ("fp32", "bf16", "fp16", "fp64", "bf16/fp32 gradient", "fp32 unaligned"):
            assert any(n.startswith(rule) and n.endswith(types) for n in names), (rule, types)


def test_a_broken_budget_makes_the_command_fail(monkeypatch, capsys):
    from fusedopt.cli import codegen

    row = {"target": "cuda:90", "variant": "x", "kernel": "y", "broken": ["8 bytes of stack"]}
    monkeypatch.setattr(codegen, "_unusable", lambda targets: None)
    for broken, status in ((row["broken"], 1), ([], 0)):
        rows = [{**row, "broken": broken}]
        monkeypatch.setattr(codegen, "_compile_all", lambda *_, rows=rows, **__: iter(rows))
        options = type("Options", (), {"target": ["cuda:90"], "json": True, "jobs": 1})
        assert codegen.run(options) == status
        assert json.loads(capsys.readouterr().out)["broken"] == status


@pytest.mark.parametrize("target", ["cuda", "cuda:sm90", "hip:90", "tpu:4"])
def test_an_unknown_target_is_named(target):
    result = _without_interpreter("-m", "fusedopt", "codegen", "--target", target)
    assert result.returncode == 2 and target in result.stderr
