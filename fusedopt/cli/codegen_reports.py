"""Reports of machine code that was compiled before: ``python -m fusedopt codegen --reports``.

A report is kept under the name of what decides it (``aot.identity``), so a variant whose kernel,
constants, options and compiler are as they were need not be compiled to be held to budgets and
baseline. The file is one line a report: two changes to it merge by having both.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from fusedopt.kernels.aot import Report

COLUMNS = tuple(field.name for field in fields(Report))
HEAD = ["identity", *COLUMNS]

# One in so many is compiled all the same, and must be what was kept.
CHECKED = 32


@cache
def load(path: Path) -> Mapping[str, Report]:
    """Read what was kept, by identity.

    Raises:
        ValueError: where the file is none of these, or has two reports of one identity; the
            message says how one is made.
    """
    kept: dict[str, Report] = {}
    try:
        head, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        if head != HEAD:
            raise ValueError(f"columns {head}")
        for name, *values in lines:
            found = _report(dict(zip(COLUMNS, values, strict=True)))
            if kept.setdefault(name, found) != found:
                raise ValueError(f"two reports of {name}")
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} has no reports of codegen ({error!r}); --record-reports {path} writes them"
        ) from error
    return kept


def _report(columns: Mapping[str, Any]) -> Report:
    accesses = {
        name: {int(bits): count for bits, count in columns[name].items()}
        for name in ("loads", "stores", "narrow")
    }
    return Report(**{**columns, **accesses, "matrix": tuple(columns["matrix"])})


def columns(report: Report) -> dict[str, Any]:
    """Give a report the form that it has in JSON."""
    accesses = {
        name: {str(bits): count for bits, count in sorted(getattr(report, name).items())}
        for name in ("loads", "stores", "narrow")
    }
    return {**vars(report), **accesses, "matrix": list(report.matrix)}


def record(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the reports of rows that have an identity, in its order.

    Args:
        path: where to.
        rows: of codegen; those that did not compile have no report and are left out.
    """
    lines = {
        row["identity"]: json.dumps([row[column] for column in HEAD])
        for row in rows
        if "registers" in row
    }
    text = [json.dumps(HEAD), *(line for _, line in sorted(lines.items()))]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")


def is_checked(identity: str) -> bool:
    """Whether a variant is among those that are compiled although their report is kept."""
    return int(identity, 16) % CHECKED == 0


def differences(kept: Report, found: Report) -> list[str]:
    """Say where the machine code is not what was kept, which no change of the code explains."""
    return [
        f"{name} is {getattr(found, name)}, but {getattr(kept, name)} in the reports"
        for name in COLUMNS
        if getattr(found, name) != getattr(kept, name)
    ]
