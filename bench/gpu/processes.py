"""Commands under a time limit that holds for whatever they start, too."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

# A command that is out of time is interrupted, as by Ctrl-C, and may write down what it has.
GRACE = 3.0
PAUSE = 0.05


@dataclass(frozen=True)
class Command:
    """One command of a stage.

    Attributes:
        name: a word for headings.
        arguments: program and arguments.
        environment: variables besides those of all stages.
        required: whether its failure is the stage's, and ends it.
        least: seconds without which it is not begun.
    """

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    required: bool = True
    least: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What became of a command.

    Attributes:
        command: which.
        status: its exit status; None where its time was over, or it was not begun.
        seconds: what it took.
        output: its standard output.
        errors: its standard error.
        begun: whether it ran at all.
    """

    command: Command
    status: int | None
    seconds: float
    output: str
    errors: str
    begun: bool = True

    @property
    def timed_out(self) -> bool:
        """Whether it was stopped because its time was over."""
        return self.begun and self.status is None


def run(
    command: Command,
    limit: float,
    environment: Mapping[str, str],
    folder: Path,
    work: Path,
    tick: Callable[[], object] = lambda: None,
) -> Outcome:
    """Run a command to its end, or to the end of its time.

    Args:
        command: what.
        limit: seconds, those of being interrupted included.
        environment: all variables; the command's own are added.
        folder: to run in.
        work: for its output, which goes to files: a pipe could be held open by a process left over.
        tick: called while it runs.
    """
    output, errors = work / "output", work / "errors"
    begin = time.monotonic()
    with output.open("wb") as out, errors.open("wb") as err:
        try:
            process = subprocess.Popen(
                command.arguments, cwd=folder, env={**environment, **command.environment},
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
                preexec_fn=_heed_interrupts,
            )  # fmt: skip
        except OSError as error:
            return Outcome(command, 127, time.monotonic() - begin, "", f"{error}\n")
        try:
            ended = _wait(process.pid, begin + limit - min(GRACE, limit / 4), tick)
            if not ended:
                _signal(process.pid, signal.SIGINT)
                _wait(process.pid, begin + limit, tick)
        finally:
            # Whatever it has left behind. It is not reaped yet, so its number is still its own.
            _signal(process.pid, signal.SIGKILL)
            # A process that hangs in the GPU's driver hears of no signal: it is left behind.
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
    return Outcome(
        command,
        process.returncode if ended else None,
        time.monotonic() - begin,
        output.read_text(encoding="utf-8", errors="replace"),
        errors.read_text(encoding="utf-8", errors="replace"),
    )


def _heed_interrupts() -> None:
    """Have a child heed interrupts, which a shell has its jobs in the background ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait(pid: int, end: float, tick: Callable[[], object]) -> bool:
    """Whether a child ended before the time did; it is not reaped."""
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() >= end:
            return False
        tick()
        time.sleep(PAUSE)
    return True


def _signal(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        # Nobody is left.
        return
