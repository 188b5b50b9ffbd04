"""Progress on standard error: a bar on a terminal, lines in a log, nothing for ``--json``."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

# Seconds between two lines of a log.
EVERY = 10.0


class Show(Protocol):
    """Draws how far a command has come."""

    def __call__(self, text: str, done: int = 0, total: int = 0) -> None:
        """Draw ``done`` of ``total`` (0 where it is not known), with what is being done."""


class Lines:
    """Writes how far a command has come where there is no terminal to draw on."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._counted = False
        self._next = 0.0
        if title:
            self._write(title)

    def __call__(self, text: str, done: int = 0, total: int = 0) -> None:
        """Write a line where a stage begins or ends, and in between from time to time."""
        if not total:
            self._counted = False
            if text:
                self._write(f"{self._title}: {text}" if self._title else text)
            return
        begins, self._counted = not self._counted, True
        if begins or done == total or time.monotonic() >= self._next:
            parts = (self._title, f"{done} of {total}", text)
            self._write(": ".join(part for part in parts if part))

    def _write(self, line: str) -> None:
        self._next = time.monotonic() + EVERY
        print(line, file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, quiet: bool, *, transient: bool = True) -> Iterator[Show]:
    """Show how far a long command has come.

    Args:
        title: what is being done.
        quiet: draw nothing, as for ``--json``: then rich need not be installed.
        transient: leave nothing behind at the end, on a terminal.

    Yields:
        The function that draws.
    """
    if quiet:
        yield lambda text, done=0, total=0: None
        return
    # Also for a log, which needs none of it: the tables at the end do, and a command that cannot
    # draw them must say so before its work and not after.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines(title)
        return
    counted = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    columns = TextColumn(title), *counted, TextColumn("{task.description}")
    with Progress(*columns, console=console, transient=transient) as bar:
        task = bar.add_task("", total=None)

        def show(text: str, done: int = 0, total: int = 0) -> None:
            bar.update(task, description=text, total=total or None, completed=done)

        yield show
