"""What a run prints."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.harness.tables import mebibytes, number, wide

Entry = dict[str, Any]


def report(result: dict[str, Any], console: Console) -> None:
    """Print every table that there is something for."""
    console = wide(console, 180)
    if result["note"]:
        meaning = "" if result["measurement"] else "Not a measurement: "
        console.print(f"[bold]{meaning}{result['note']}.[/bold]", soft_wrap=True)
    # Reasons are other people's words: what stands in brackets there is no markup.
    show = partial(console.print, markup=False, soft_wrap=True)
    if result["copy"] is not None:
        show(_copy(result["copy"]))
    for case in dict.fromkeys(row["case"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["case"] == case]
        console.print(_case(case, rows, result["copy"]))
        for line in _unmeasured(rows):
            show(line, highlight=False)
    for print_part in (_host, _sharded, _first_step, _training):
        table = print_part(result)
        if table is not None:
            console.print(table, markup=False)
    if result["per_sample"] is not None:
        from bench.per_sample.report import report as report_per_sample

        report_per_sample(result["per_sample"], console)
    for entry in result["missing"]:
        show(f"Missing: {entry['contender']}: {entry['reason']}")
    for text in result["failed"]:
        show(f"FAILED {text}", style="bold red")


def _copy(copy: Entry) -> str:
    gbps = copy["gbps"]
    return (
        f"A copy of {copy['bytes'] / 2**20:.0f} MiB: {gbps['median']:.4g} GB/s read and written"
        f" ({gbps['p10']:.4g} to {gbps['p90']:.4g})"
    )


_COLUMNS: tuple[tuple[str, Callable[[Entry], str]], ...] = (
    ("ms", lambda row: _time(row, "median")),
    ("p10", lambda row: _time(row, "p10")),
    ("p90", lambda row: _time(row, "p90")),
    ("over ours", lambda row: number(row["ratio_to_ours"], ".3f")),
    ("host ms", lambda row: number(row["host_ms"], ".3g")),
    ("launches", lambda row: number(row["launches"], "d")),
    ("B/param", lambda row: number(row["bytes_per_parameter"], "g")),
    ("GB/s", lambda row: number(row["gbps"], ".0f")),
    ("% of copy", lambda row: number(row["percent_of_copy"], ".0f")),
    ("extra MiB", lambda row: mebibytes(row["extra_peak_bytes"])),
    ("ulps", lambda row: number(row["error"] and row["error"]["ulps"], ".3g")),
)


def _case(case: str, rows: list[Entry], copy: Entry | None) -> Table:
    first = rows[0]
    title = f"{case}: {first['tensors']:,} tensors, {first['parameters']:,} parameters"
    if copy is not None and case in copy["by_case"]:
        title += f"; a copy just before: {copy['by_case'][case]:.4g} GB/s"
    table = Table(title=title)
    for column in ("update", "contender"):
        table.add_column(column, no_wrap=True)
    measured = [row for row in rows if row["status"] == "measured"]
    columns = [(name, [cell(row) for row in measured]) for name, cell in _COLUMNS]
    columns = [(name, cells) for name, cells in columns if any(text != "-" for text in cells)]
    for name, _ in columns:
        table.add_column(name, justify="right", no_wrap=True)
    before = None
    for i, row in enumerate(measured):
        update = f"{row['rule']} {row['types']}"
        if before not in (None, update):
            table.add_section()
        table.add_row(
            "" if update == before else update,
            _who(row),
            *(cells[i] for _, cells in columns),
        )
        before = update
    return table


def _who(row: Entry) -> str:
    return row["contender"] + " + clip" * row["clip"] + " + scaler" * row["scaler"]


def _unmeasured(rows: list[Entry]) -> list[str]:
    """Say in one line for each reason what was not measured, and why."""
    found: dict[tuple[str, str], dict[str, dict[str, None]]] = {}
    for row in rows:
        if row["status"] != "measured":
            entry = found.setdefault((row["status"], row["reason"]), {"who": {}, "what": {}})
            entry["who"][_who(row)] = None
            entry["what"][f"{row['rule']} {row['types']}"] = None
    return [
        f"{status.capitalize()}: {_some(entry['what'])}: {_some(entry['who'])}: {reason}"
        for (status, reason), entry in found.items()
    ]


def _some(names: dict[str, None], most: int = 4) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(list(names)[:most]) + rest


def _time(row: Entry, which: str) -> str:
    return number(row["device_ms"] and row["device_ms"][which])


def _host(result: Entry) -> Table | None:
    if not result["host"]:
        return None
    title = "Host time of step(), the launch stubbed (torch's kernels run, on 16 elements a tensor)"
    columns = ("rule", "tensors", "gradients", "contender", "µs", "over ours", "launches")
    table = Table(*columns, title=title)
    for row in result["host"]:
        names = (row["rule"], f"{row['tensors']:,}", row["gradients"], row["contender"])
        ratio = number(row["ratio_to_ours"], ".2f")
        table.add_row(*names, f"{row['microseconds']:.0f}", ratio, number(row["launches"], "d"))
    return table


def _sharded(result: Entry) -> Table | None:
    if not result["sharded"]:
        return None
    title = "Host time of clipping and an AdamW step over shards of 8 x 8, no launch, no collective"
    columns = ("placement", "tensors", "contender", "first, µs a tensor", "later", "launches")
    table = Table(*columns, title=title)
    for row in result["sharded"]:
        names = (row["placement"], f"{row['tensors']:,}", row["contender"])
        if row["reason"] is not None:
            table.add_row(*names, row["reason"])
            continue
        times = (number(row[key], ".3g") for key in ("first_us", "later_us"))
        table.add_row(*names, *times, number(row["launches"], "g"))
    return table


def _first_step(result: Entry) -> Table | None:
    if not result["first_step"]:
        return None
    title = "First step of a process, nothing compiled before"
    table = Table("rule", "types", "contender", "seconds", "kernels compiled", title=title)
    for row in result["first_step"]:
        seconds = number(row["seconds"], ".3g") if row["reason"] is None else row["reason"]
        names = (row["rule"], row["types"], row["contender"])
        table.add_row(*names, seconds, number(row["variants_compiled"], "d"))
    return table


def _training(result: Entry) -> Table | None:
    if not result["training"]:
        return None
    columns = ("contender", "tokens/s", "ms a step", "of it clip and update", "over ours")
    table = Table(*columns, title="Training a GPT-2 with clipping")
    for row in result["training"]:
        share = f"{row['optimizer_ms']:.3g} ms, {100 * row['share']:.1f} %"
        speed = f"{row['tokens_per_second']:,.0f}"
        table.add_row(
            row["contender"], speed, f"{row['step_ms']:.4g}", share, f"{row['ratio']:.3f}"
        )
    return table
