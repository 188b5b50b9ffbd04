"""The table of GPU times against the results that are kept."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# bench and tools are not installed. Last, so that they hide nothing that is.
sys.path.append(str(ROOT))

table = importlib.import_module("tools.benchmark_table")
reader = importlib.import_module("bench.gpu.result")


def row(contender: str, milliseconds: float, ratio: float, **more) -> dict:
    plain = {
        "case": "gpt2", "tensors": 148, "parameters": 124439808, "rule": "AdamW", "types": "fp32",
        "contender": contender, "clip": False, "scaler": False, "status": "measured",
        "reason": None, "device_ms": {"median": milliseconds, "p10": 0.0, "p90": 9.0},
        "host_ms": 0.1, "launches": 1, "bytes_per_parameter": 28.0, "gbps": 2222.4,
        "percent_of_copy": 88.6, "extra_peak_bytes": 0, "error": None, "ratio_to_ours": ratio,
    }  # fmt: skip
    assert set(more) <= set(plain)
    return {**plain, **more}


ENVIRONMENT = {
    "device": "NVIDIA H100 80GB HBM3", "driver": "580.1", "power_limit_w": 700.0, "cuda": "13.0",
    "torch": "2.11.0", "triton": "3.6.0", "commit": "0123456789abcdef", "capability": [9, 0],
    "uncommitted_changes": False, "date": "2026-02-03T04:05:06+00:00",
}  # fmt: skip
RESULT = {
    "schema": 1, "kind": "bench", "measurement": True, "note": "", "environment": ENVIRONMENT,
    "settings": {"set": "core", "partial": False},
    "copy": {"gbps": {"median": 2507.0, "p10": 1.0, "p90": 1.0}, "bytes": 1, "by_case": {}},
    "rows": [
        row("fusedopt", 1.6, 1.0, scaler=True),
        row("torch-fused", 9.9, 7.77, clip=True, scaler=True),
        row("fusedopt", 1.5678, 1.0),
        row("torch-fused", 1.8, 1.148),
        row("torch-foreach", 4.7, 3.01),
        row("torch-compiled", 1.7, 1.084, status="failed"),
        row("fusedopt", 1.75, 1.0, clip=True, gbps=2275.0, percent_of_copy=90.7, launches=3),
        row("torch-fused", 2.6, 1.4857, clip=True),
        row("fusedopt", 9.0, 1.0, case="large", parameters=10**9),
        row("fusedopt", 0.9, 1.0, types="bf16", case="huge", parameters=2147483653,
            percent_of_copy=95.1),
        row("torch-fused", 0.8, 0.93, types="bf16", case="huge"),
        row("fusedopt", 0.8, 1.0, types="bf16", status="does not fit", device_ms=None),
        row("fusedopt", 0.5, 1.0, rule="SGD"),
    ],
    "first_step": [
        {"contender": "fusedopt", "rule": "AdamW", "types": "fp32", "seconds": 1.234,
         "variants_compiled": 1, "reason": None},
        {"contender": "optimi", "rule": "AdamW", "types": "fp32", "seconds": None,
         "variants_compiled": None, "reason": "missing"},
    ],
    "missing": [], "host": [], "failed": [],
}  # fmt: skip


@pytest.fixture
def result() -> dict:
    return copy.deepcopy(RESULT)


def keep(folder: Path, name: str, result: dict, **environment) -> None:
    result = {**result, "environment": {**result["environment"], **environment}}
    (folder / name).write_text(json.dumps(result))


def test_the_page_has_the_table_as_the_results_have_it() -> None:
    # Catches a page that says what an older result said: python -m tools.benchmark_table --write.
    text = table.SECTION.page.read_text(encoding="utf-8")
    assert table.SECTION.within(text) == text


def test_without_a_result_that_is_said_with_the_command(tmp_path) -> None:
    assert reader.newest(tmp_path) is None
    assert "The whole set has not been taken on a GPU yet." in table.text(None)
    assert "python -m bench.gpu" in table.text(None)


def test_every_figure_is_the_results(result) -> None:
    # Catches a column read from another contender, clip, scaler or case.
    lines = [line for line in table.text(result).splitlines() if line.startswith("| ")]
    assert lines[1:] == [
        "| gpt2 | 124,439,808 | fp32 | - | 1.57 | 2222 | 89 | 1.15 | 3.01 | - | 1 |",
        "| gpt2 | 124,439,808 | fp32 | yes | 1.75 | 2275 | 91 | 1.49 | - | - | 3 |",
        "| large | 1,000,000,000 | fp32 | - | 9 | 2222 | 89 | - | - | - | 1 |",
        "| huge | 2,147,483,653 | bf16 | - | 0.9 | 2222 | 95 | 0.93 | - | - | 1 |",
        "| gpt2 | 124,439,808 | bf16 | - | does not fit | - | - | - | - | - | - |",
    ]
    assert {line.count("|") for line in lines} == {len(table.HEADINGS) + 1}


def test_where_and_with_what_it_was_taken_is_said(result) -> None:
    text = table.text(result)
    for fact in (
        "NVIDIA H100 80GB HBM3", "driver 580.1", "CUDA 13.0", "PyTorch 2.11.0", "Triton 3.6.0",
        "700 W", "commit 012345678", "2026-02-03", "moves 2507 GB/s",
        "fusedopt AdamW fp32 1.2 s (1 kernels compiled)",
    ):  # fmt: skip
        assert fact in text, fact
    assert "uncommitted" not in text and "Failed" not in text and "optimi" not in text


def test_what_speaks_against_a_result_is_said(result) -> None:
    result["environment"]["uncommitted_changes"] = True
    result["environment"]["commit"] = None
    result["failed"] = ["gpt2 AdamW"]
    result["note"] = "Read me."
    text = table.text(result)
    assert "commit unknown **with uncommitted changes**" in text
    assert "**Failed: gpt2 AdamW.**" in text and "Read me." in text


def test_the_newest_measurement_on_a_gpu_is_taken(result, tmp_path) -> None:
    keep(tmp_path, "a.json", result, device="old")
    keep(tmp_path, "b.json", result, device="new", date="2026-02-03T06:00:00+01:00")
    # Later, and none of them counts.
    later = "2027-01-01T00:00:00+00:00"
    keep(tmp_path, "c.json", result | {"measurement": False}, date=later)
    keep(tmp_path, "d.json", result | {"kind": "gpu"}, date=later)
    keep(tmp_path, "e.json", result, date=later, capability=None, device="a processor")
    some = result | {"settings": {"partial": True}}
    keep(tmp_path, "some.json", some, date=later, device="part")
    (tmp_path / "f.json").write_text("[1, 2")
    (tmp_path / "g.json").write_text("[]")
    assert reader.newest(tmp_path)["environment"]["device"] == "new"
    keep(tmp_path, "h.json", result, device="newer", date="2026-02-03T05:00:01Z")
    assert reader.newest(tmp_path)["environment"]["device"] == "newer"
    assert reader.newest(tmp_path, partial=True)["environment"]["device"] == "part"


def test_a_gpu_run_does_not_take_an_older_result_for_its_own(result, tmp_path) -> None:
    findings = importlib.import_module("bench.gpu.findings")
    stages = importlib.import_module("bench.gpu.stages")
    # To the second: what was taken within that of the beginning is the run's.
    begun = datetime(2026, 2, 3, 4, 5, 6, tzinfo=timezone.utc)
    for partial in (False, True):
        keep(tmp_path, "a.json", result | {"settings": {"partial": partial}, "failed": []})
        for seconds, own in ((-1, True), (0, True), (1, False)):
            setting = stages.Setting(
                tmp_path, tmp_path, "cuda:90", begun=begun + timedelta(seconds=seconds)
            )
            if own:
                assert findings.bench(setting, [])["rows"] > 0
            else:
                with pytest.raises(findings.Bad, match="no measurement"):
                    findings.bench(setting, [])


def test_another_schema_is_an_error(result, tmp_path) -> None:
    keep(tmp_path, "a.json", result | {"schema": 2})
    with pytest.raises(ValueError, match="a.json: schema 2"):
        reader.newest(tmp_path)


def test_only_what_is_between_the_markers_changes(monkeypatch, result, tmp_path) -> None:
    keep(tmp_path, "a.json", result)
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    section = table.SECTION
    written = section.within(f"before\n{section.begin}\nold\n{section.end}\nafter\n")
    assert written.startswith(f"before\n{section.begin}\n") and "old" not in written
    assert written.endswith(f"\n{section.end}\nafter\n") and "| gpt2 |" in written
    assert section.within(written) == written
    with pytest.raises(ValueError, match="no place"):
        section.within("nothing")


def test_the_summary_of_a_gpu_run(result) -> None:
    # Catches clipping's ratio taken from the row with a loss scale, and the largest case, which has
    # no clipping, in the place of one that has.
    figures = reader.summary(result)
    assert figures["copy GB/s"] == 2507.0
    assert figures["AdamW fp32 % of copy"] == 88.6 and figures["AdamW fp32 fused/ours"] == 1.148
    assert figures["AdamW fp32 fused/ours, clip"] == 1.4857
    assert figures["AdamW bf16 case"] == "huge" and figures["AdamW bf16 fused/ours"] == 0.93
    assert figures["AdamW bf16 fused/ours, clip"] is None
    assert figures["least fused/ours"] == 0.93
    result["rows"], result["copy"] = [], None
    assert reader.summary(result)["rows"] == 0


def test_contenders_are_called_as_the_benchmark_calls_them() -> None:
    contenders = importlib.import_module("bench.step.contenders").CONTENDERS
    rules = importlib.import_module("bench.step.rules").RULES
    assert {reader.OURS, reader.FUSED, reader.FOREACH, reader.COMPILED} <= set(contenders)
    assert reader.RULE in rules
