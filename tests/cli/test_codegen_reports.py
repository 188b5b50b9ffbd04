"""Codegen with reports that were kept: what is compiled again, and what is held all the same."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusedopt.cli import codegen, codegen_reports
from fusedopt.kernels.aot import Report

# In a process without the interpreter: rows that were compiled, and then with what was kept of them
# while nothing can be compiled. Names of one variant after one change each.
SCRIPT = r"""
import dataclasses, json, sys
from pathlib import Path
from fusedopt.cli import codegen, codegen_reports
from fusedopt.kernels import aot
from fusedopt.kernels.rules import adam

work = [("cuda:90", "Adam fp32"), ("cuda:90", "clip_factor (2)"), ("hip:gfx942", "SGD bf16")]
path = Path(sys.argv[1])
rows = [codegen.compile_row(item, named=True) for item in work]
codegen_reports.record(path, rows[:2])
again = [codegen.compile_row(item, reports=path) for item in work]

def broken(*_):
    raise RuntimeError("the compiler was called")

compile_variant, aot.compile_variant = aot.compile_variant, broken
codegen_reports.is_checked = lambda name: False
alone = [codegen.compile_row(item, reports=path) for item in work]
aot.compile_variant = compile_variant

target = aot.parse_target("cuda:90")
one = next(v for v in aot.variants(target) if v.name == "Adam fp32")
names = {"nothing": aot.identity(one, target)}

def change(what, target=target, **fields):
    names[what] = aot.identity(dataclasses.replace(one, **fields), target)

change("how it is called", name="another")
change("threads", threads=2 * one.threads)
change("registers", registers=40)
change("exactness", exact=True)
change("stages", stages=2)
change("type", arguments={**one.arguments, "control": "*fp32"})
change("a constant", constants={**one.constants, "BLOCK": 2048})
change("target", target=aot.parse_target("cuda:80"))
called = adam.apply_moments
source = called.src
called._unsafe_update_src(source.replace("    shrink,", "    # Nothing.\n    shrink,", 1))
change("a comment")
called._unsafe_update_src(source.replace(" - ", " + "))
change("what the rule calls")
print(json.dumps([rows, again, alone, names]))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("reports") / "reports.jsonl"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return path, *json.loads(done.stdout)


def test_the_name_is_of_what_decides_the_code(found):
    """Catches a report that outlives its kernel, and one that is lost with every comment."""
    names = found[4]
    same = {"nothing", "how it is called", "a comment"}
    assert {what for what, name in names.items() if name == names["nothing"]} == same
    assert len(set(names.values())) == len(names) - 2


def test_what_is_kept_is_not_compiled_and_says_the_same(found):
    _, rows, again, alone, _ = found
    assert [row["kept"] for row in again] == [row["kept"] for row in alone] == [True, True, False]
    plain = [{k: v for k, v in row.items() if k != "kept"} for row in again]
    assert plain == rows and not any(row["broken"] for row in rows)
    assert again[:2] == alone[:2]
    assert alone[2]["broken"] == ["does not compile: RuntimeError: the compiler was called"]


def test_a_kept_report_is_held_to_budgets(found, tmp_path, monkeypatch):
    path, (row, *_), *_ = found
    monkeypatch.setattr(codegen.aot, "identity", lambda *_: row["identity"])
    monkeypatch.setattr(codegen_reports, "is_checked", lambda name: False)
    wrong = tmp_path / "wrong.jsonl"
    codegen_reports.record(wrong, [{**row, "registers": 65}])
    work = ("cuda:90", "Adam fp32")
    assert codegen.compile_row(work, reports=path)["broken"] == []
    assert "65 registers" in codegen.compile_row(work, reports=wrong)["broken"][0]


def test_one_in_some_is_compiled_and_must_be_the_same(found, monkeypatch):
    path, (row, *_), *_ = found
    kept = codegen_reports.load(path)[row["identity"]]
    monkeypatch.setattr(codegen.aot, "identity", lambda *_: row["identity"])
    monkeypatch.setattr(codegen.aot, "compile_variant", lambda *_: None)
    monkeypatch.setattr(codegen_reports, "is_checked", lambda name: True)
    work = ("cuda:90", "Adam fp32")
    monkeypatch.setattr(codegen.aot, "report", lambda *_: kept)
    assert codegen.compile_row(work, reports=path)["broken"] == []
    other = Report(**{**vars(kept), "registers": kept.registers - 1})
    monkeypatch.setattr(codegen.aot, "report", lambda *_: other)
    (complaint,) = codegen.compile_row(work, reports=path)["broken"]
    was = kept.registers
    assert complaint == f"registers is {was - 1}, but {was} in the reports"


def test_some_are_checked_and_few():
    checked = [codegen_reports.is_checked(f"{i:016x}") for i in range(4096)]
    assert sum(checked) == 4096 / codegen_reports.CHECKED and codegen_reports.CHECKED >= 16


def test_two_changes_of_the_file_are_merged_by_having_both(found, tmp_path):
    path, rows, *_ = found
    head, *lines = path.read_text().splitlines()
    assert len(lines) == 2 and lines == sorted(lines)
    merged = tmp_path / "merged.jsonl"
    merged.write_text("\n".join([head, *reversed(lines), lines[0]]) + "\n")
    assert codegen_reports.load(merged) == codegen_reports.load(path)
    other = json.loads(lines[0])
    other[1] += 1
    torn = tmp_path / "torn.jsonl"
    torn.write_text("\n".join([head, *lines, json.dumps(other)]))
    with pytest.raises(ValueError, match=f"two reports of {other[0]}"):
        codegen_reports.load(torn)


def _command(monkeypatch, capsys, rows, *arguments):
    monkeypatch.setattr(codegen, "_unusable", lambda targets: None)
    monkeypatch.setattr(codegen, "_compile_all", lambda *_, **__: iter(rows))
    main = importlib.import_module("fusedopt.__main__").main
    return main(["codegen", "--target", "cuda:90", *map(str, arguments)]), capsys.readouterr()


def test_the_command_tells_and_records(found, tmp_path, monkeypatch, capsys):
    path, _, again, _, _ = found
    status, printed = _command(monkeypatch, capsys, again, "--reports", path)
    assert status == 0 and f"2 variants are as in {path}, of which" in printed.out
    assert f"1 are not: --record-reports {path} adds them" in printed.out
    new = tmp_path / "new.jsonl"
    status, printed = _command(monkeypatch, capsys, again, "--record-reports", new)
    assert status == 0 and f"wrote {new}" in printed.err
    assert set(codegen_reports.load(new)) == {row["identity"] for row in again}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reports", "FILE", "--instructions"], "machine code, which --reports has not"),
        (["--record-reports", "FILE", "--only", "SGD"], "of all variants: leave --only out"),
        (["--reports", "NONE"], "NONE has no reports of codegen"),
        (["--reports", "WRONG"], "WRONG has no reports of codegen"),
    ],
)
def test_what_cannot_be_is_one_line(found, arguments, message, tmp_path, monkeypatch, capsys):
    files = {"FILE": found[0], "NONE": tmp_path / "NONE", "WRONG": tmp_path / "WRONG"}
    files["WRONG"].write_text('["identity", "registers"]\n["0", 1]\n')
    chosen = [files.get(word, word) for word in arguments]
    status, printed = _command(monkeypatch, capsys, [], *chosen)
    assert status == 2 and printed.out == "" and message in printed.err
    assert printed.err.count("\n") == 1


def test_the_reports_of_the_checkout_can_be_read():
    path = Path(__file__).resolve().parents[2] / "bench" / "baselines" / "codegen_reports.jsonl"
    assert len(codegen_reports.load(path)) > 1000
