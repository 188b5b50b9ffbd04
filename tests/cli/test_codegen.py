"""Compiled kernels, without a GPU: what they move, what they use, and that budgets are held."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import pytest

from fusedopt import __main__ as cli
from fusedopt.kernels import aot, lang
from fusedopt.kernels.aot import Budget, Report
from fusedopt.kernels.aot.formats import Kept
from fusedopt.kernels.aot.update import update_kept, update_tensors
from fusedopt.kernels.rules import ADAM as ADAM_RULE
from fusedopt.kernels.rules import REGISTRY

# Compiled in one subprocess without the interpreter, which this process has turned on.
SCRIPT = """
import json, sys
from fusedopt.kernels import aot
from fusedopt.examples.signum import SIGNUM
from fusedopt.kernels.rules import register
register(SIGNUM)
target = aot.parse_target("cuda:90")
wanted = json.loads(sys.argv[1])
rows = {}
for variant in aot.variants(target):
    if variant.name in wanted:
        compiled = aot.compile_variant(variant, target)
        result = aot.report(compiled, target)
        moved = result.bytes_moved(variant)
        broken = variant.budget.broken(variant, result, target)
        rows[variant.name] = [moved, result.registers, broken, aot.waits(compiled, target)]
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
    "ScheduleFreeAdamW fp32": 28,
    "Signum fp32": 20,
    "partial_norms (2) fp32": 4,
    "partial_norms (inf) bf16": 2,
    # Scales have 4 / 128 bytes a state, read and written.
    "Adam bf16 stochastic int8 states": 10.125,
    "Adam bf16 remainder8 int8 states": 12.125,
    "Adam bf16 bf16 and uint8 states": 12.0625,
    "Adam bf16 remainder bf16 states": 18,
    "Adam bf16 float32 master fp32 states": 30,
    "SGD (momentum) bf16 int8 states": 8.0625,
    "update_from_samples BatchDecoupledAdam bf16 remainder8 int8 states": 20.125,
    # Of layers' parameters, what is read: errors and input once, for gradient and squares together.
    "partial_sums bias bf16": 2,
    "partial_sums gain and bias bf16": 4,
    "partial_sums RMSNorm gain fp32": 8,
    # Errors once, and the squares that they are added to.
    "embedding sum_chunks bf16": 6,
    # Walked row by row, and off 16 bytes: narrow accesses, which are not counted.
    "Adam bf16 remainder8 int8 states rowwise": 0,
    "Adam bf16 remainder8 int8 states unaligned": 0,
}
CODED = [name for name in BYTES if "states" in name]


# The same for the per-sample kernels: for each variant, the broken budgets, whether shared memory
# holds the operands of all stages but one, and whether a product runs on into the next turn.
PER_SAMPLE_SCRIPT = """
import json, sys
from fusedopt.kernels import aot
from fusedopt.kernels.aot import samples
rows = {}
target = aot.parse_target("cuda:90")
for variant in samples.variants(target):
    if not variant.name.startswith(tuple(json.loads(sys.argv[1]))):
        continue
    compiled = aot.compile_variant(variant, target)
    result = aot.report(compiled, target)
    rows[variant.name] = {
        "broken": variant.budget.broken(variant, result, target),
        "shared": result.shared,
        "stages": variant.stages,
        "blocks": [variant.constants.get("BLOCK_" + x, 0) for x in ("O", "I", "ROWS")],
        "runs_on": "wgmma.wait_group.sync.aligned 1" in compiled.asm.get("ptx", ""),
    }
print(json.dumps(rows))
"""


def _without_interpreter(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def compiling(monkeypatch):
    """Let this process run a command that compiles, and those that the command starts."""
    monkeypatch.setattr(lang, "INTERPRETED", False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")


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


def test_few_loads_come_before_the_data(compiled):
    # Where the chunk is; then its tensor's address and length; then numbers. A control value or an
    # address that is waited for by itself is one more. Other formats read addresses late.
    plain = {name: compiled[name][3] for name in BYTES if name.endswith((" fp32", " bf16"))}
    plain = {name: count for name, count in plain.items() if "partial" not in name}
    assert len(plain) >= 7 and {n: c for n, c in plain.items() if c > 3} == {}
    assert {name: compiled[name][3] for name in CODED if (compiled[name][3] or 0) > 4} == {}
    assert compiled["partial_norms (2) fp32"][3] <= 2


def test_codes_take_no_more_registers_than_are_let(compiled):
    # As many as six programs of 128 threads share an SM with. Left to itself the assembler takes
    # more: this also sees that it is told.
    assert {name: compiled[name][1] for name in CODED if compiled[name][1] > 80} == {}


@pytest.fixture(scope="module")
def counted() -> dict[str, dict]:
    command = ("-m", "fusedopt", "codegen", "--target", "cuda:90", "--instructions", "--json")
    only = [word for name in (*ELEMENTS, *LOOPS) for word in ("--only", name)]
    result = _without_interpreter(*command, "--jobs", "1", *only)
    assert result.returncode == 0, result.stderr
    return {row["variant"]: row for row in json.loads(result.stdout)["variants"]}


ELEMENTS = ("Adam bf16 fp8 states", "Adam bf16 stochastic fp8 states", "SVAG SGD bf16 unaligned")
LOOPS = tuple(f"linear_samples {form} bf16 128x128x64" for form in ("described", "dense"))


def test_an_element_of_a_whole_chunk_takes_instructions(counted):
    """Counted on one way through the machine code, and more of them where more is done."""
    found = [counted[name]["instructions_per_element"] for name in ELEMENTS]
    assert 60 < found[0] < found[1] - 20 < 300
    # All of its accesses are narrow: which of its ways is a whole chunk's cannot be told.
    assert found[2] is None


def test_instructions_of_a_loop_of_products_are_counted(counted):
    """With the end of a sample; those of descriptors are fewer than those of addresses."""
    found = [counted[name]["loop"] for name in LOOPS]
    assert 250 < found[0] < found[1] - 40 < 400


def test_some_variants_are_no_baseline(tmp_path, capsys, compiling):
    command = ["codegen", "--target", "cuda:90", "--only"]
    assert cli.main([*command, "SGD fp32", "--record", str(tmp_path / "x")]) == 2
    assert "a baseline is of all variants" in capsys.readouterr().err
    assert cli.main([*command, "Signum bf17"]) == 2
    assert "no variant has Signum bf17" in capsys.readouterr().err


ADAM = update_tensors(REGISTRY["Adam"], (False, False), ("fp32",) * 4)
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
    broken = ADAM.budget.broken(ADAM, report, aot.parse_target("cuda:90"))
    assert [complaint in text for text in broken] == ([True] if complaint else [])


CODES = update_kept(ADAM_RULE, ADAM_RULE.example_groups[0], Kept(("bf16", "bf16"), "", "int8"))
FEW = Report(
    registers=80,
    stack=0,
    shared=32,
    loads={128: 2},
    stores={128: 1},
    matrix=(),
    narrow={64: 4, 32: 4},
)


@pytest.mark.parametrize(
    ("change", "complaint", "target"),
    [
        ({}, None, "cuda:90"),
        ({"narrow": {64: 3, 32: 4}}, "64-bit accesses move 3 bytes", "cuda:90"),
        ({"narrow": {64: 4, 32: 5}}, "32-bit accesses move", "cuda:90"),
        # A master in two accesses, where one is wide enough.
        ({"loads": {128: 1}, "narrow": {64: 6, 32: 4}}, "128-bit accesses move 4 bytes", "cuda:90"),
        ({"registers": 81}, "81 registers", "cuda:90"),
        ({"registers": 128}, None, "hip:gfx942"),
        ({"registers": 129}, "129 registers", "hip:gfx942"),
    ],
)
def test_a_broken_budget_of_codes_is_named(change, complaint, target):
    report = Report(**{**vars(FEW), **change})
    broken = CODES.budget.broken(CODES, report, aot.parse_target(target))
    assert (complaint is None and not broken) or complaint in " ".join(broken)


def test_a_second_read_is_named():
    names = {v.name: v for v in aot.variants(aot.parse_target("cuda:90"))}
    own = names["embedding sum_chunks bf16"]
    loads = own.budget.read_per_element * own.block / own.threads / 16
    for factor, broken in ((1, []), (2, ["128-bit loads read 12 bytes an element, not 6"])):
        report = Report(**{**vars(GOOD), "loads": {128: int(factor * loads)}})
        assert own.budget.broken(own, report, aot.parse_target("cuda:90")) == broken


@pytest.mark.parametrize(
    ("target", "instruction"),
    [
        ("cuda:80", "mma.sync"),
        ("cuda:89", "mma.sync"),
        ("cuda:90", "wgmma.mma_async"),
        ("cuda:100", "tcgen05.mma"),
        ("cuda:120", "mma.sync"),
        ("hip:gfx942", "v_mfma_f32_32x32x8_bf16_1k"),
    ],
)
def test_a_product_without_matrix_instructions_is_named(target, instruction):
    target = aot.parse_target(target)
    for found, fine in (((), False), ((instruction,), True), (("fma",), False)):
        report = Report(**{**vars(GOOD), "matrix": found})
        assert (Budget(matrix=True).broken(ADAM, report, target) == []) is fine
        assert Budget().broken(ADAM, report, target) == []


def test_every_rule_type_and_alignment_is_listed():
    names = [variant.name for variant in aot.variants(aot.parse_target("cuda:90"))]
    assert len(names) == len(set(names))
    for rule in ("SGD", "RMSprop", "Adam", "Lion", "Signum"):
        for types in ("fp32", "bf16", "fp16", "fp64", "bf16/fp32 gradient", "fp32 unaligned"):
            assert any(n.startswith(rule) and n.endswith(types) for n in names), (rule, types)


def _options(**chosen):
    files = dict.fromkeys(("baseline", "record", "reports", "record_reports"))
    return SimpleNamespace(**files, only=None, instructions=False, **chosen)


def test_a_broken_budget_makes_the_command_fail(monkeypatch, capsys):
    from fusedopt.cli import codegen

    row = {"target": "cuda:90", "variant": "x", "kernel": "y", "broken": ["8 bytes of stack"]}
    monkeypatch.setattr(codegen, "_unusable", lambda targets: None)
    for broken, status in ((row["broken"], 1), ([], 0)):
        rows = [{**row, "broken": broken}]
        monkeypatch.setattr(codegen, "_compile_all", lambda *_, rows=rows, **__: iter(rows))
        chosen = {"target": ["cuda:90"], "json": True, "jobs": 1}
        assert codegen.run(_options(**chosen)) == status
        assert json.loads(capsys.readouterr().out)["broken"] == status


def test_a_compiler_that_ends_its_process_is_one_line(monkeypatch, capsys):
    # LLVM does so for a capability that it has no instructions for.
    from fusedopt.cli import codegen

    def compile_all(*_, **__):
        raise BrokenProcessPool

    monkeypatch.setattr(codegen, "_unusable", lambda targets: None)
    monkeypatch.setattr(codegen, "_compile_all", compile_all)
    chosen = {"target": ["cuda:130"], "json": True, "jobs": 1}
    assert codegen.run(_options(**chosen)) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and "cuda:130" in printed.err and printed.err.count("\n") == 1


# Some can be read, but not compiled for: LLVM ends the process over cuda:130.
@pytest.mark.parametrize(
    ("command", "target"),
    [
        *(("codegen", t) for t in ("cuda", "cuda:sm90", "hip:90", "tpu:4", "cuda:20", "hip:gfx1")),
        *(("precompile", t) for t in ("tpu:4", "cuda:130")),
    ],
)
def test_an_unknown_target_is_named(command, target, tmp_path, capsys, compiling):
    cache = ["--cache", str(tmp_path)] if command == "precompile" else []
    assert cli.main([command, "--target", target, *cache]) == 2
    printed = capsys.readouterr()
    assert target in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def _per_sample(*names):
    result = _without_interpreter("-c", PER_SAMPLE_SCRIPT, json.dumps(names))
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [name for name in names if not any(row.startswith(name) for row in rows)] == []
    return rows


def test_per_sample_products_are_pipelined_matrix_instructions():
    """The loads of the next sample are under way while the last block of this one is multiplied."""
    wide = [
        f"linear_samples {kind} 128x128x{rows}"
        for kind, rows in (("dense bf16", 64), ("segmented fp16", 64), ("dense fp32 tf32", 32))
    ]
    wide += ["linear_samples described bf16 128x128x64"]
    others = ["linear_rows bf16 128", "linear_rows fp32 tf32 128", "convolution_samples bf16 128"]
    rows = _per_sample(*wide, *others)
    assert {name: row["broken"] for name, row in rows.items() if row["broken"]} == {}
    # Whole tiles and shares alike.
    for name in [whole + suffix for whole in wide for suffix in ("", " shared")]:
        row = rows[name]
        o, i, k = row["blocks"]
        size = 4 if "fp32" in name else 2
        assert row["shared"] >= (row["stages"] - 1) * (o + i) * k * size, name
        assert row["runs_on"], name


def test_names_of_variants_are_unique():
    for target in ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942"):
        names = [variant.name for variant in aot.variants(aot.parse_target(target))]
        assert len(names) == len(set(names)), target
