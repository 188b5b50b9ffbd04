"""Progress on standard error, drawn by rich; for ``--json`` nothing is drawn, nor rich needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Show(Protocol):
    """Draws how far a command has come."""

    def __call__(self, text: str, done: int = 0, total: int = 0) -> None:
        """Draw ``done`` of ``total`` (0 where it is not known), with what is being done."""


@contextmanager
def progress(title: str, quiet: bool, *, transient: bool = True) -> Iterator[Show]:
    """Show how far a long command has come.

    Args:
        title: what is being done.
        quiet: draw nothing, as for ``--json``: then rich need not be installed.
        transient: leave nothing behind at the end.

    Yields:
        The function that draws.
    """
    if quiet:
        yield lambda text, done=0, total=0: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    counted = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    columns = TextColumn(title), *counted, TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True), transient=transient) as bar:
        task = bar.add_task("", total=None)

        def show(text: str, done: int = 0, total: int = 0) -> None:
            bar.update(task, description=text, total=total or None, completed=done)

        yield show
