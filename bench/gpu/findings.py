"""Key figures of each stage, from what its commands printed and wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from .processes import Outcome
from .result import date, newest, summary

if TYPE_CHECKING:
    from .stages import Setting


class Bad(Exception):
    """Something is wrong, although the commands may not have failed.

    Args:
        message: what.
        figures: those that there are.
    """

    def __init__(self, message: str, figures: dict[str, Any]) -> None:
        super().__init__(message)
        self.figures = figures


def info(setting: Setting, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return device and versions."""
    facts = json.loads(outcomes[0].output)
    device = facts["devices"][-1]
    kept = {name: facts[name] for name in ("fusedopt", "python", "torch", "triton", "cuda", "rocm")}
    figures = {"device": device["name"], "backend": device["backend"], **kept}
    if device["backend"] != "triton":
        raise Bad(f"the backend is {device['backend']}: {device['why']}", figures)
    return figures


def precompile(setting: Setting, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return how many variants were compiled."""
    found = json.loads(outcomes[0].output)
    (counts,) = found["targets"]
    kept = {name: counts[name] for name in ("compiled", "there", "failed", "bytes")}
    figures = {**kept, "C modules": found["c_modules"]["built"]}
    if counts["failed"] or not counts["compiled"] + counts["there"]:
        raise Bad(f"{counts['failed']} variants failed to compile", figures)
    return figures


def tests(setting: Setting, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return how many tests passed, failed and were skipped."""
    suites = ElementTree.parse(setting.out / "junit.xml").getroot().iter("testsuite")
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in suites:
        for name in counts:
            counts[name] += int(suite.get(name, 0))
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    figures = {"passed": passed, "failed": failed, "skipped": counts["skipped"]}
    if failed or not passed:
        raise Bad(f"{failed} tests failed, {passed} passed", figures)
    return figures


def verify(setting: Setting, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the worst distance in each type."""
    found = json.loads(outcomes[0].output)
    parts = ("rows", "formats", "operations")
    figures: dict[str, Any] = {"compared": sum(len(found[name]) for name in parts)}
    for row in found["rows"]:
        name = f"{row['dtype']} ulps"
        figures[name] = max(figures.get(name, 0.0), row["worst_ulps"])
    figures["bits of formats"] = sum(row["differing"] for row in found["formats"])
    rows = [row for name in parts for row in found[name]]
    failed = [
        row.get("rule", row.get("format", row.get("operation")))
        for row in rows
        if not row["passed"]
    ]
    if failed or not rows:
        raise Bad(f"{len(failed)} of {len(rows)} comparisons failed: {', '.join(failed)}", figures)
    return figures


def bench(setting: Setting, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return AdamW's figures."""
    result = newest(setting.out, partial=True)
    if result is None or (setting.begun is not None and date(result) < setting.begun):
        raise Bad("no measurement was written", {})
    figures = summary(result)
    if result["failed"]:
        raise Bad(f"{len(result['failed'])} failed: {'; '.join(result['failed'])}", figures)
    return figures


def sanitizer(setting: Setting, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the number of errors that each tool reports."""
    figures: dict[str, Any] = {}
    complaints = []
    for outcome in outcomes:
        name = f"{outcome.command.name} errors"
        if not outcome.begun:
            continue
        text = outcome.output + outcome.errors
        if "Device not supported" in text:
            complaints.append(f"{outcome.command.name}: the tool does not support this device")
            continue
        count = re.search(r"ERROR SUMMARY: (\d+) error", text) or re.search(
            r"RACECHECK SUMMARY: (\d+) hazard", text
        )
        figures[name] = int(count[1]) if count else None
        if figures[name] is None:
            complaints.append(f"{outcome.command.name} printed no summary")
        elif figures[name]:
            complaints.append(f"{outcome.command.name} reports {count[1]} errors")
        compared = re.search(r"(\d+) comparisons with the reference, (\d+) failed", text)
        if compared is None:
            complaints.append(f"the program under {outcome.command.name} did not come to its end")
        elif int(compared[2]) or not int(compared[1]):
            complaints.append(f"under {outcome.command.name}, {compared[0]}")
    if complaints:
        raise Bad("; ".join(complaints), figures)
    return figures


def native(setting: Setting, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return how many tests of the C library passed."""
    text = outcomes[-1].output
    count = re.search(r"(\d+) tests? failed out of (\d+)", text)
    if count is None:
        raise ValueError("ctest printed no count")
    failed, total = int(count[1]), int(count[2])
    skipped = len(re.findall(r"\*\*\*Skipped", text))
    figures = {"passed": total - failed - skipped, "failed": failed, "skipped": skipped}
    if failed or not figures["passed"]:
        raise Bad(f"{failed} of {total} tests failed, {skipped} were skipped", figures)
    if re.search(r"step_on_gpu\b.*\*\*\*Skipped", text):
        raise Bad("step_on_gpu was skipped, as if there were no GPU", figures)
    return figures


def _one(folder: Path) -> dict[str, Any]:
    """Return the result that a command wrote into a folder of its own."""
    (path,) = folder.glob("*.json")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def step(setting: Setting, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return what decides: AdamW's bandwidth beside memory's, and its time beside torch's."""
    result = _one(setting.work / "step")
    figures: dict[str, Any] = {}
    for row in result["rows"]:
        text = f"{row['case']}{' clip' if row['clip'] else ''}"
        if row["contender"] == "fusedopt":
            figures |= {f"{text} GB/s": row["gbps"], f"{text} % of copy": row["percent_of_copy"]}
        else:
            figures[f"{text} {row['contender']}/ours"] = row["ratio_to_ours"]
    with suppress(OSError, ValueError, KeyError, TypeError):
        speeds = _one(setting.work / "streams")["gbps"]
        figures |= {f"{name} GB/s": speed["median"] for name, speed in speeds.items()}
    if result["failed"] or not result["rows"]:
        raise Bad("; ".join(result["failed"]) or "nothing was measured", figures)
    return figures


def per_sample(setting: Setting, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the kernel's time over cuBLAS's at each shape; a missed aim is a figure."""
    result = _one(setting.work / "per-sample")
    figures = {
        f"{x['shape']} / cuBLAS": x["contenders"]["fused"]["ratio"] for x in result["linear"]
    }
    asked = len(result["settings"]["shapes"])
    if result["failed"] or len(figures) != asked:
        missing = f"{asked - len(figures)} of {asked} shapes were not measured"
        raise Bad("; ".join([*result["failed"], missing]), figures)
    return figures


def training(setting: Setting, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the time of a training step with statistics over that without."""
    result = _one(setting.work / "training")
    found = result["training"]
    if result["failed"] or found is None:
        raise Bad("; ".join(result["failed"]) or "no step was measured", {})
    return {"with/without": found["ratio"], "batch": found["batch"]}


def tune(setting: Setting, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the launch configuration that was chosen in each type."""
    results = _one(setting.work / "tune")["results"]
    chosen = ((x["types"], x["chosen"] and x["chosen"]["name"]) for x in results)
    return {f"AdamW {types}": name or "default" for types, name in chosen}


def formats(setting: Setting, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return of each format the share of a copy's bandwidth; a missed aim is a figure."""
    found = _one(setting.work / "formats")["formats"]
    return {f"{name} % of copy": 100 * row["of_copy"] for name, row in found.items()}


def first_step(setting: Setting, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return how many first steps were taken; their seconds are in the file."""
    result = _one(setting.work / "first-step")
    rows = result["first_step"]
    if result["failed"] or not rows:
        raise Bad("; ".join(result["failed"]) or "no first step was measured", {})
    return {"first steps": len(rows)}


def profile(setting: Setting, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return how many kernels were profiled; what was found of each is in the log."""
    text = outcomes[0].output + outcomes[0].errors
    kernels = len(re.findall(r"^ +Section: GPU Speed Of Light", text, re.MULTILINE))
    if not kernels:
        raise Bad("no kernel was profiled: counters may be for administrators alone", {})
    return {"kernels": kernels}
