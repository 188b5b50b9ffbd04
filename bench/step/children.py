"""The parts that run in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from bench.harness.places import ROOT

from . import first_step

# Of one process: a compiler that does not come to its end must not take the other parts along.
LIMIT = 240.0


class PartFailed(Exception):
    """A process did not end as it should have."""


def _start(
    module: str, arguments: Sequence[str], environment: dict[str, str]
) -> subprocess.Popen[str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", module, *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # In a group of their own: compilers start processes, too.
    return subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes)


def _run(module: str, arguments: Sequence[str], environment: dict[str, str]) -> str:
    process = _start(module, arguments, environment)
    try:
        out, err = process.communicate(timeout=LIMIT)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise PartFailed(f"{module}: took more than {LIMIT:.0f} s") from None
        raise
    if process.returncode:
        last = err.strip().splitlines()[-1:] or ["no message"]
        raise PartFailed(f"{module}: exit status {process.returncode}: {last[0][:300]}")
    return out


def host(quick: bool, rules: Sequence[str], contenders: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the rows of the host part, of all rules and contenders where none is named.

    Raises:
        PartFailed: where the process failed.
    """
    arguments = ["--quick"] * quick + [word for rule in rules for word in ("--rule", rule)]
    arguments += [word for name in contenders for word in ("--contender", name)]
    out = _run("bench.step.host", arguments, {"TRITON_INTERPRET": "1"})
    return [json.loads(line) for line in out.splitlines()]


def sharded(quick: bool) -> list[dict[str, Any]]:
    """Return the rows of the part on sharded parameters.

    Raises:
        PartFailed: where the process failed.
    """
    arguments = ["--quick"] * quick
    out = _run("bench.step.sharded", arguments, {"TRITON_INTERPRET": "1"})
    return [json.loads(line) for line in out.splitlines()]


def first_steps(device: str, quick: bool, contenders: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield a row for each first step; one that fails has the reason and no time."""
    for contender, rule, types in first_step.CPU if device == "cpu" else first_step.CORE:
        if contenders and contender not in contenders:
            continue
        row: dict[str, Any] = {"contender": contender, "rule": rule, "types": types}
        row |= {"seconds": None, "variants_compiled": None, "reason": None}
        arguments = [contender, rule, types, "--device", device] + ["--quick"] * quick
        with tempfile.TemporaryDirectory() as empty:
            caches = {"TRITON_CACHE_DIR": f"{empty}/triton"}
            caches |= {"TORCHINDUCTOR_CACHE_DIR": f"{empty}/inductor", "TRITON_INTERPRET": "0"}
            try:
                # Whatever a compiler prints comes before.
                row |= json.loads(_run("bench.step.first_step", arguments, caches).splitlines()[-1])
            except PartFailed as error:
                row["reason"] = str(error)
        yield row
