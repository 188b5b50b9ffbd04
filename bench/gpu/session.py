"""Runs the stages one after the other within one deadline, and keeps what each of them gave."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import processes, report
from .findings import Bad
from .processes import Command, Outcome
from .stages import ROOT, LeftOut, Setting, Stage

Say = Callable[[str], object]


def budget(stages: Sequence[Stage], left: float) -> float:
    """Return the seconds that the first of some stages may take.

    Its own limit at most, and not what is kept for those behind it: if the limits are more than
    there is, each of them has its proportion. What a stage leaves, later ones may use.

    Args:
        stages: those that are still to run.
        left: seconds until the deadline.
    """
    behind = sum(stage.limit for stage in stages[1:] if stage.kept)
    kept = behind * min(1.0, left / (stages[0].limit + behind))
    return max(0.0, min(stages[0].limit, left - kept))


def run(
    stages: Sequence[Stage],
    setting: Setting,
    environment: Mapping[str, str],
    end: float,
    say: Say,
    tick: Callable[[], object] = lambda: None,
    keep: Callable[[list[dict[str, Any]]], object] = lambda results: None,
) -> list[dict[str, Any]]:
    """Run stages; one that fails or is out of time does not keep the next from running.

    Args:
        stages: in their order.
        setting: what their commands depend on.
        environment: variables of all commands.
        end: when all must be over, by ``time.monotonic()``.
        say: told of each beginning and end.
        tick: called while a command runs.
        keep: given the results so far after each stage, in case that the run is killed.

    Returns:
        For each stage its ``stage``, ``result`` (passed, failed, out of time, left out),
        ``seconds``, ``limit``, ``figures`` and ``reason``.
    """
    results = []
    for i, stage in enumerate(stages):
        limit = budget(stages[i:], end - time.monotonic())
        say(f"[{i + 1}/{len(stages)}] {stage.name}, at most {limit:.0f} s")
        begin = time.monotonic()
        found = _run_stage(stage, setting, environment, begin + limit, tick)
        seconds = time.monotonic() - begin
        results.append({"stage": stage.name, **found, "seconds": seconds, "limit": limit})
        keep(results)
        say(f"      {found['result']} after {seconds:.0f} s  {report.told(found)}")
    return results


def _run_stage(
    stage: Stage,
    setting: Setting,
    environment: Mapping[str, str],
    end: float,
    tick: Callable[[], object],
) -> dict[str, Any]:
    try:
        commands = stage.commands(setting)
    except LeftOut as why:
        report.log(setting.out, stage.name, str(why), "")
        return {"result": "left out", "figures": {}, "reason": str(why)}
    outcomes: list[Outcome] = []
    for command in commands:
        outcome = _run_command(stage, command, setting, environment, end, tick)
        outcomes.append(outcome)
        if outcome.status != 0 and outcome.begun and command.required:
            break
    return _judge(stage, setting, outcomes)


def _run_command(
    stage: Stage,
    command: Command,
    setting: Setting,
    environment: Mapping[str, str],
    end: float,
    tick: Callable[[], object],
) -> Outcome:
    left = end - time.monotonic()
    heading = f"{stage.name}: {command.name}"
    if left < command.least:
        report.log(setting.out, heading, f"not begun: {left:.0f} s left", "")
        return Outcome(command, None, 0.0, "", "", begun=False)
    outcome = processes.run(command, max(left, 0.0), environment, ROOT, setting.work, tick)
    status = "out of time" if outcome.timed_out else f"exit status {outcome.status}"
    heading += f": {status}, {outcome.seconds:.1f} s"
    output = f"$ {shlex.join(command.arguments)}\n{outcome.output}"
    report.log(setting.out, heading, output, outcome.errors)
    return outcome


def _judge(stage: Stage, setting: Setting, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Say whether a stage passed: by the exit statuses, and by what its output says."""
    reasons = []
    result = "passed"
    for outcome in outcomes:
        name = outcome.command.name
        if outcome.timed_out and outcome.command.required:
            result = "out of time"
            reasons.append(f"{name} was stopped after {outcome.seconds:.0f} s")
        elif outcome.begun and outcome.status != 0 and outcome.command.required:
            result = "failed"
            reasons.append(f"{name}: exit status {outcome.status}{_last_line(outcome)}")
    figures: dict[str, Any] = {}
    try:
        figures = stage.read(setting, outcomes)
    except Bad as bad:
        figures = bad.figures
        reasons.append(str(bad))
        result = "failed" if result == "passed" else result
    except Exception as error:  # noqa: BLE001 - a command may have printed anything
        # Where it was stopped or failed, that is why.
        if result == "passed":
            result = "failed"
            reasons.append(f"its output cannot be read: {type(error).__name__}: {error}")
            # Of commands whose exit status alone says nothing, the one that failed tells why.
            reasons += [
                f"{x.command.name}: exit status {x.status}{_last_line(x)}"
                for x in outcomes
                if x.begun and x.status
            ]
    return {"result": result, "figures": figures, "reason": "; ".join(reasons)}


def _last_line(outcome: Outcome) -> str:
    lines = outcome.errors.strip().splitlines() or outcome.output.strip().splitlines()
    return f": {lines[-1]}" if lines else ""
