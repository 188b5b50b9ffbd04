"""The table of GPU times, of docs/benchmarks.md: ``python -m tools.benchmark_table [--write]``.

Every figure is read from the newest result of ``python -m fusedopt bench`` on a GPU that is kept in
``bench/results``; where there is none, that is said.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from bench.gpu.result import COMPILED, FOREACH, FUSED, OURS, RULE, date, find, newest, over
from tools.readme import ROOT, Section

RESULTS = ROOT / "bench" / "results"

NOTHING = (
    "**The whole set has not been taken on a GPU yet.** `python -m bench.gpu --out DIR` takes it,"
    " on a machine with one."
)
HEADINGS = (
    "case", "parameters", "types", "clipping", "ms", "GB/s", "% of a copy", "torch fused",
    "torch foreach", "torch.compile", "launches",
)  # fmt: skip


def text(result: Mapping[str, Any] | None) -> str:
    """Return what stands between the markers, in Markdown.

    Args:
        result: as ``python -m fusedopt bench`` writes it, or None.
    """
    if result is None:
        return NOTHING
    parts = [_origin(result), "\n".join(_table(result)), *_first_step(result)]
    return "\n\n".join(parts)


def _origin(result: Mapping[str, Any]) -> str:
    facts = result["environment"]
    versions = [
        f"{title} {facts[name]}"
        for name, title in (
            ("driver", "driver"),
            ("cuda", "CUDA"),
            ("torch", "PyTorch"),
            ("triton", "Triton"),
        )
        if facts[name]
    ]
    if facts["power_limit_w"]:
        versions.append(f"{facts['power_limit_w']:g} W")
    commit = f"commit {facts['commit'][:9]}" if facts["commit"] else "commit unknown"
    if facts["uncommitted_changes"]:
        commit += " **with uncommitted changes**"
    day = date(result).date().isoformat()
    lines = [
        f"`{RULE}` on {facts['device']} ({', '.join(versions)}), {commit}, {day}."
        " Times are medians; GB/s are of the bytes that the update has to move; torch's columns are"
        " its time over ours, with `clip_grad_norm_` in front where there is clipping.",
    ]
    if result["copy"] is not None:
        lines.append(f"A device copy moves {result['copy']['gbps']['median']:.0f} GB/s.")
    lines += [result["note"]] if result["note"] else []
    failed = [f"**Failed: {'; '.join(result['failed'])}.**"] if result["failed"] else []
    return " ".join([*lines, *failed])


def _table(result: Mapping[str, Any]) -> Iterator[str]:
    yield f"| {' | '.join(HEADINGS)} |"
    yield "|" + "|".join("---" if i < 4 else "---:" for i in range(len(HEADINGS))) + "|"
    for row in result["rows"]:
        if (row["rule"], row["contender"]) == (RULE, OURS) and not row["scaler"]:
            yield f"| {' | '.join(_cells(result, row))} |"


def _cells(result: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[str]:
    yield from (row["case"], f"{row['parameters']:,}", row["types"])
    yield "yes" if row["clip"] else "-"
    if row["status"] != "measured":
        yield row["status"]
        yield from ["-"] * (len(HEADINGS) - 5)
        return
    yield _number(row["device_ms"] and row["device_ms"]["median"], ".3g")
    yield _number(row["gbps"], ".0f")
    yield _number(row["percent_of_copy"], ".0f")
    same = {name: row[name] for name in ("case", "rule", "types", "clip")}
    for contender in (FUSED, FOREACH, COMPILED):
        yield _number(over(find(result, **same, contender=contender)), ".2f")
    yield _number(row["launches"], "d")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _first_step(result: Mapping[str, Any]) -> Iterator[str]:
    """Say what the first step of a process takes, as far as it was taken."""
    taken = [row for row in result["first_step"] if row["seconds"] is not None]
    if taken:
        steps = []
        for row in taken:
            compiled = row["variants_compiled"]
            of = "" if compiled is None else f" ({compiled} kernels compiled)"
            what = f"{row['contender']} {row['rule']} {row['types']}"
            steps.append(f"{what} {row['seconds']:.1f} s{of}")
        yield f"First step of a process, with empty caches: {', '.join(steps)}."


SECTION = Section(
    "benchmarks",
    "the table of GPU times",
    lambda: text(newest(RESULTS)),
    "docs/benchmarks.md",
)

if __name__ == "__main__":
    sys.exit(SECTION.main())
