"""Compares what the host check finds with the committed baseline."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench.harness.output import write_whole

from .host import CASES, ELEMENTS, MODES, ROUNDS, TENSORS, Case, calls, measure_afresh

SCHEMA = 1

# A ratio may be this much larger than the baseline's. On a machine with twice as many busy
# processes as processors, the best of the attempts was never more than 1.2 times larger.
TIME = 1.5
ATTEMPTS = 8
# A step may make this many times as many calls: versions of Python and torch differ a little.
CALLS = 1.3
# And this many more for each tensor.
CALLS_A_TENSOR = 0.1

Rows = list[dict[str, Any]]


def check(
    baseline: Mapping[str, Any],
    cases: Sequence[Case] = CASES,
    advance: Callable[[str], object] = lambda name: None,
) -> Rows:
    """Measure, and compare with a baseline.

    Args:
        baseline: as ``load`` returns it.
        cases: which classes.
        advance: called with the name of what is measured next.

    Returns:
        For each class and mode its figures, those of the baseline, and in ``slower`` what is worse.

    Raises:
        ValueError: for a class or mode that the baseline has not.
    """
    rows = []
    for case in cases:
        for mode in MODES:
            name = f"{case.name} {mode}"
            if name not in baseline["rows"]:
                raise ValueError(f"the baseline has no {name}: record it anew")
            advance(name)
            rows.append(_compare(case, mode, baseline["rows"][name]))
    return rows


def _compare(case: Case, mode: str, known: Mapping[str, float]) -> dict[str, Any]:
    bound = TIME * known["ratio"]
    found = float("inf")
    for _ in range(ATTEMPTS):
        # What is slow because of other processes is not slow every time.
        found = min(found, measure_afresh(case, mode))
        if found <= bound:
            break
    count, per_tensor = calls(case, mode)
    slower = []
    if found > bound:
        slower.append(f"{found:.3f} of torch {case.against}'s time, more than {bound:.3f}")
    if count > CALLS * known["calls"]:
        slower.append(f"{count} calls a step, more than {CALLS * known['calls']:.0f}")
    if per_tensor > known["calls_a_tensor"] + CALLS_A_TENSOR:
        slower.append(f"{per_tensor:.2f} calls a tensor, not {known['calls_a_tensor']:.2f}")
    return {
        "class": case.name,
        "mode": mode,
        "against": case.against,
        "ratio": found,
        "baseline_ratio": known["ratio"],
        "calls": count,
        "baseline_calls": known["calls"],
        "calls_a_tensor": per_tensor,
        "baseline_calls_a_tensor": known["calls_a_tensor"],
        "slower": slower,
    }


def record(
    cases: Sequence[Case] = CASES, advance: Callable[[str], object] = lambda name: None
) -> dict[str, Any]:
    """Measure a new baseline: the best of the attempts, as the check takes it."""
    rows = {}
    for case in cases:
        for mode in MODES:
            advance(f"{case.name} {mode}")
            ratio = min(measure_afresh(case, mode) for _ in range(ATTEMPTS))
            count, per_tensor = calls(case, mode)
            figures = {"ratio": round(ratio, 4), "calls": count, "calls_a_tensor": per_tensor}
            rows[f"{case.name} {mode}"] = figures
    return {
        "schema": SCHEMA,
        "command": "python -m bench.regression host --record",
        "what": f"fastest of {ROUNDS} rounds, {TENSORS} tensors of {ELEMENTS} elements",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rows": rows,
    }


def load(path: Path) -> dict[str, Any]:
    """Read a baseline.

    Raises:
        ValueError: where the file is none; the message says how one is made.
    """
    try:
        baseline = json.loads(path.read_text(encoding="utf-8"))
        if baseline["schema"] != SCHEMA:
            raise ValueError(f"schema {baseline['schema']}, not {SCHEMA}")
        for row in baseline["rows"].values():
            if not (row["ratio"] > 0 and row["calls"] > 0 and row["calls_a_tensor"] >= 0):
                raise ValueError(f"no figures: {row}")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no baseline ({error!r}); python -m bench.regression host --record makes one"
        ) from error
    return dict(baseline)


def save(path: Path, baseline: Mapping[str, Any]) -> None:
    """Write a baseline, one row a line."""
    head = {name: value for name, value in baseline.items() if name != "rows"}
    lines = [f" {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    rows = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in baseline["rows"].items()]
    text = "\n".join(["{", *lines, ' "rows": {', ",\n".join(rows), " }", "}"])
    write_whole(path, text + "\n")
