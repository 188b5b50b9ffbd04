"""What variants used when the baseline was recorded: for ``python -m fusedopt codegen --baseline``.

A budget is a limit that is stated for a few; the baseline holds every variant to what it has
reached. It is of one version of Triton, whose assembler is its own: with any other version, nothing
is compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SCHEMA = 2

# Columns of the file, by their names in a row of codegen's.
COLUMNS = ("registers", "stack", "shared", "bytes_per_element", "loop")

# How much more a variant may use: registers as a share and in number, shared memory and the
# instructions of a loop of products as a share; stack and bytes moved, not at all.
REGISTERS_SHARE, REGISTERS_MORE = 1.1, 8
SHARED_SHARE = 1.1
LOOP_SHARE = 1.05

Row = dict[str, Any]
# Of each target, its variants' columns.
Targets = Mapping[str, Mapping[str, Sequence[Any]]]


def load(path: Path) -> dict[str, Any]:
    """Read a baseline.

    Raises:
        ValueError: where the file is none; the message says how one is made.
    """
    try:
        baseline: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if (baseline["schema"], baseline["columns"]) != (SCHEMA, list(COLUMNS)):
            raise ValueError(f"schema {baseline['schema']} with columns {baseline['columns']}")
        for variants in baseline["targets"].values():
            for name, values in variants.items():
                if len(values) != len(COLUMNS):
                    raise ValueError(f"{name} has {len(values)} columns")
        str(baseline["triton"])
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no baseline of codegen ({error!r}); --record {path} makes one"
        ) from error
    return baseline


def record(path: Path, rows: Iterable[Row], triton: str) -> None:
    """Write what variants use, one a line.

    Args:
        path: where to.
        rows: of codegen; none of them may have failed to compile.
        triton: the version that compiled them.
    """
    targets: dict[str, list[str]] = {}
    for row in rows:
        values = [row[column] for column in COLUMNS]
        line = f"{json.dumps(row['variant'])}: {json.dumps(values)}"
        targets.setdefault(row["target"], []).append(line)
    blocks = [
        f"{json.dumps(target)}: {{\n" + ",\n".join(lines) + "\n}"
        for target, lines in targets.items()
    ]
    head = f'"schema": {SCHEMA}, "triton": {json.dumps(triton)}, "columns": {json.dumps(COLUMNS)}'
    text = "{" + head + ', "targets": {\n' + ",\n".join(blocks) + "\n}}\n"
    path.write_text(text, encoding="utf-8")


def compare(rows: Iterable[Row], baseline: Mapping[str, Any], triton: str) -> dict[str, Any]:
    """Hold rows to a baseline; each is given what is worse as ``regressed``.

    Args:
        rows: of codegen.
        baseline: as ``load`` returns it.
        triton: the version that compiled the rows.

    Returns:
        ``triton``, the baseline's version; ``compared``, how many; ``note``, why that is none;
        ``new`` and ``removed``, names of variants that only one of the two has, with the target.
    """
    found: dict[str, Any] = {"triton": baseline["triton"], "compared": 0, "note": None}
    found |= {"new": [], "removed": []}
    if baseline["triton"] != triton:
        found["note"] = (
            f"not compared with the baseline, which is of Triton {baseline['triton']};"
            f" this is {triton}"
        )
        return found
    targets: Targets = baseline["targets"]
    seen: dict[str, set[str]] = {}
    for row in rows:
        seen.setdefault(row["target"], set()).add(row["variant"])
        known = targets.get(row["target"], {}).get(row["variant"])
        if known is None:
            found["new"].append(f"{row['target']} {row['variant']}")
        elif "registers" in row:
            found["compared"] += 1
            row["regressed"] = worse(row, dict(zip(COLUMNS, known, strict=True)))
    for target, names in seen.items():
        gone = targets.get(target, {}).keys() - names
        found["removed"] += [f"{target} {name}" for name in sorted(gone)]
    return found


def worse(row: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """Say what a variant uses more of than it did."""
    complaints = []
    was, now = known["registers"], row["registers"]
    if now > REGISTERS_SHARE * was or now > was + REGISTERS_MORE:
        complaints.append(f"{now} registers, {was} in the baseline")
    if row["stack"] > known["stack"]:
        complaints.append(f"{row['stack']} bytes of stack, {known['stack']} in the baseline")
    was, now = known["shared"], row["shared"]
    if now > SHARED_SHARE * was:
        complaints.append(f"{now} bytes of shared memory, {was} in the baseline")
    was, now = known["bytes_per_element"], row["bytes_per_element"]
    if now != was:
        # Fewer are narrower accesses, which this counts the wide ones of.
        complaints.append(f"128-bit accesses of {now:g} bytes an element, {was:g} in the baseline")
    was, now = known["loop"], row["loop"]
    # A loop that is not found any more is one that nobody counts.
    if was is not None and (now is None or now > LOOP_SHARE * was):
        complaints.append(f"{now} instructions in the loop of products, {was} in the baseline")
    return complaints
