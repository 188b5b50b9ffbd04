"""Codegen against its baseline: what counts as worse, and what is not compared."""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fusedopt.cli import codegen, codegen_baseline
from fusedopt.kernels.lang import triton

VERSION = triton.__version__

SCRIPT = """
import json
from fusedopt.cli import codegen
work = [("cuda:90", "Adam fp32"), ("cuda:90", "clip_factor (2)"), ("hip:gfx942", "SGD bf16")]
print(json.dumps([codegen.compile_row(item) for item in work]))
"""


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def rows(compiled) -> list[dict]:
    return copy.deepcopy(compiled)


@pytest.fixture
def baseline(compiled, tmp_path) -> Path:
    path = tmp_path / "codegen.json"
    codegen_baseline.record(path, compiled, VERSION)
    return path


@pytest.fixture
def command(monkeypatch, rows, capsys):
    """Run codegen, over the rows instead of all variants: its exit status and what it prints."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(codegen, "_unusable", lambda targets: None)
        monkeypatch.setattr(codegen, "_compile_all", lambda *_, **__: iter(rows))
        main = importlib.import_module("fusedopt.__main__").main
        targets = ["--target", "cuda:90", "--target", "hip:gfx942"]
        status = main(["codegen", *targets, *map(str, arguments)])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def test_a_baseline_has_one_line_a_variant(baseline, compiled):
    known = codegen_baseline.load(baseline)
    assert known["triton"] == VERSION and set(known["targets"]) == {"cuda:90", "hip:gfx942"}
    adam = dict(zip(known["columns"], known["targets"]["cuda:90"]["Adam fp32"], strict=True))
    assert adam["bytes_per_element"] == 28 and 16 < adam["registers"] <= 64 and adam["stack"] == 0
    lines = baseline.read_text().splitlines()
    assert [sum(row["variant"] in line for line in lines) for row in compiled] == [1, 1, 1]


def test_the_baseline_of_the_checkout_can_be_read():
    """Catches columns that were added without recording, by which every comparison would end."""
    root = Path(__file__).resolve().parents[2]
    known = codegen_baseline.load(root / "bench" / "baselines" / "codegen.json")
    (targets,) = re.findall(r"^TARGETS \?= (.*)$", (root / "Makefile").read_text(), re.MULTILINE)
    assert set(known["targets"]) == set(targets.split())
    for target in ("cuda:80", "cuda:90", "cuda:100"):
        loops = {
            name: dict(zip(known["columns"], values, strict=True))["loop"]
            for name, values in known["targets"][target].items()
            if name.startswith("linear_samples") and " bf16 " in name
        }
        assert len(loops) > 10 and None not in loops.values(), target


def test_the_same_code_meets_its_baseline(command, baseline):
    status, printed, _ = command("--baseline", baseline, "--json")
    found = json.loads(printed)
    assert status == 0 and found["regressed"] == 0
    assert found["baseline"] == {
        "triton": VERSION, "compared": 3, "note": None, "new": [], "removed": [],
    }  # fmt: skip
    status, printed, _ = command("--baseline", baseline)
    assert status == 0 and "3 variants compared" in printed


@pytest.mark.parametrize(
    ("column", "change", "complaint"),
    [
        ("registers", lambda x: x + 4, None),
        ("registers", lambda x: x + 9, "registers"),
        ("registers", lambda x: x - 20, None),
        ("stack", lambda x: x + 4, "stack"),
        ("bytes_per_element", lambda x: x + 4, "32 bytes an element, 28"),
        ("bytes_per_element", lambda x: 0.0, "0 bytes an element, 28"),
        ("shared", lambda x: x + 64, "shared"),
    ],
)
def test_what_uses_more_than_it_did_fails(command, baseline, rows, column, change, complaint):
    rows[0][column] = change(rows[0][column])
    status, printed, _ = command("--baseline", baseline, "--json")
    found = json.loads(printed)
    assert status == found["regressed"] == bool(complaint)
    complaints = found["variants"][0]["regressed"]
    assert [complaint in text for text in complaints] == ([True] if complaint else [])


def test_few_registers_may_not_double():
    known = {"registers": 20, "stack": 0, "shared": 0, "bytes_per_element": 4.0, "loop": None}
    assert codegen_baseline.worse({**known, "registers": 22}, known) == []
    assert codegen_baseline.worse({**known, "registers": 23}, known) != []


def test_a_loop_of_products_may_not_grow():
    """Catches a longer end of a sample, and a loop that is not found any more."""
    known = {"registers": 200, "stack": 0, "shared": 0, "bytes_per_element": 0.0, "loop": 300}
    assert codegen_baseline.worse({**known, "loop": 315}, known) == []
    for loop in (316, None):
        (complaint,) = codegen_baseline.worse({**known, "loop": loop}, known)
        assert complaint == f"{loop} instructions in the loop of products, 300 in the baseline"


def test_new_and_removed_variants_are_named(command, baseline, rows):
    rows[1]["variant"] = "clip_factor (3)"
    status, printed, _ = command("--baseline", baseline)
    assert status == 0
    assert "cuda:90 clip_factor (3): not in the baseline" in printed
    assert "cuda:90 clip_factor (2): only in the baseline" in printed
    # Of a target that was not compiled, nothing is missing.
    rows.pop()
    found = json.loads(command("--baseline", baseline, "--json")[1])["baseline"]
    assert found["removed"] == ["cuda:90 clip_factor (2)"] and found["compared"] == 1


def test_another_triton_is_not_compared_but_budgets_hold(command, baseline, rows):
    text = baseline.read_text()
    baseline.write_text(text.replace(f'"triton": "{VERSION}"', '"triton": "1.2.3"'))
    rows[0]["registers"] += 100
    status, printed, _ = command("--baseline", baseline)
    assert status == 0 and "not compared with the baseline, which is of Triton 1.2.3" in printed
    rows[0]["broken"] = ["stack"]
    assert command("--baseline", baseline)[0] == 1


def test_record_writes_what_was_compiled_unless_budgets_are_broken(command, rows, tmp_path):
    path = tmp_path / "new.json"
    rows[0]["broken"] = ["stack"]
    status, _, errors = command("--record", path)
    assert status == 1 and not path.exists() and "not written" in errors
    rows[0]["broken"] = []
    status, printed, _ = command("--record", path, "--json")
    assert status == 0 and json.loads(printed)["broken"] == 0
    assert command("--baseline", path)[0] == 0


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 1, "columns": ["registers"]}'])
def test_a_file_that_is_no_codegen_baseline_is_named(command, tmp_path, text):
    path = tmp_path / "wrong.json"
    path.write_text(text)
    status, printed, errors = command("--baseline", path)
    assert status == 2 and not printed and "wrong.json is no baseline" in errors
