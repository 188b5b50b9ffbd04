"""Reads what ``python -m fusedopt bench`` writes: which result is the newest, and its rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.step import OURS, SCHEMA

# Contenders by the names that the benchmark gives them, beside ours.
FUSED, FOREACH, COMPILED = "torch-fused", "torch-foreach", "torch-compiled"

# What is spoken of where one rule has to stand for all.
RULE = "AdamW"


def newest(folder: Path, partial: bool = False) -> dict[str, Any] | None:
    """Return the newest measurement on a GPU among the JSON files of a folder, or None.

    Args:
        folder: other files may be there, and folders within are not looked into.
        partial: whether a run of which only some of its set was asked for will do.
    """
    found = [result for path in sorted(folder.glob("*.json")) for result in _measurement(path)]
    whole = [result for result in found if partial or not result["settings"]["partial"]]
    return max(whole, key=date, default=None)


def _measurement(path: Path) -> Iterator[dict[str, Any]]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return
    if not isinstance(result, dict) or result.get("kind") != "bench":
        return
    # A GPU has a compute capability (or an architecture), a processor has none.
    on_gpu = bool(result["environment"].get("capability"))
    if result["measurement"] and on_gpu:
        if result["schema"] != SCHEMA:
            raise ValueError(f"{path.name}: schema {result['schema']}, {SCHEMA} is read here")
        yield result


def date(result: Mapping[str, Any]) -> datetime:
    """Return when a result was taken; without a zone it is UTC."""
    # Before 3.11, Python does not read a Z.
    when = datetime.fromisoformat(result["environment"]["date"].replace("Z", "+00:00"))
    return when if when.tzinfo else when.replace(tzinfo=timezone.utc)


def measured(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows that have times."""
    return (row for row in result["rows"] if row["status"] == "measured")


def find(result: Mapping[str, Any], **wanted: Any) -> dict[str, Any] | None:
    """Return the row that was measured for a case, rule, types, contender and clip, or None.

    Loss scaling is off where nothing is said of it.
    """
    wanted = {"scaler": False, **wanted}
    for row in measured(result):
        if all(row[name] == value for name, value in wanted.items()):
            return row
    return None


def over(row: Mapping[str, Any] | None) -> float | None:
    """Return a contender's time over ours, or None where it was not measured."""
    return None if row is None else row["ratio_to_ours"]


def summary(result: Mapping[str, Any], rule: str = RULE) -> dict[str, Any]:
    """Return a rule's key figures: in each type, on the largest case that was clipped, too.

    The ratios are torch's time over ours; the least of them is that of any case and rule.
    """
    rows = list(measured(result))
    copy = result["copy"]
    figures: dict[str, Any] = {"rows": len(rows)}
    figures["copy GB/s"] = None if copy is None else copy["gbps"]["median"]
    for types in ("fp32", "bf16"):
        own = {"rule": rule, "types": types}
        ours = [row for row in rows if row["contender"] == OURS and not row["scaler"]]
        ours = [row for row in ours if all(row[name] == value for name, value in own.items())]
        plain = [row for row in ours if not row["clip"]]
        if not plain:
            continue
        clipped = {row["case"] for row in ours if row["clip"]}
        best = max(plain, key=lambda row: (row["case"] in clipped, row["parameters"]))
        own["case"] = best["case"]
        text = f"{rule} {types}"
        figures |= {
            f"{text} case": best["case"],
            f"{text} % of copy": best["percent_of_copy"],
            f"{text} fused/ours": over(find(result, **own, contender=FUSED, clip=False)),
            f"{text} fused/ours, clip": over(find(result, **own, contender=FUSED, clip=True)),
        }
    ratios = [over(row) for row in rows if row["contender"] == FUSED]
    figures["least fused/ours"] = min((x for x in ratios if x is not None), default=None)
    return figures
