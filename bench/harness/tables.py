"""What is printed: numbers in cells, tables on a console, and how far a run has come."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def number(value: float | None, form: str = ".4g") -> str:
    """Return a cell's text."""
    return "-" if value is None else format(value, form)


def mebibytes(count: int | None) -> str:
    """Return a cell's text for a number of bytes."""
    return "-" if count is None else f"{count / 2**20:.0f}"


def wide(console: Console, width: int = 140) -> Console:
    """Return a console for tables: a log file has no edge, and numbers must not be cut off at 80.

    Args:
        console: to print on, which is returned where it is a terminal.
        width: of tables elsewhere.
    """
    return console if console.is_terminal else Console(file=console.file, width=width)


def progress(console: Console) -> Progress:
    """Return a bar for each task, with how much is done and what it took."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
