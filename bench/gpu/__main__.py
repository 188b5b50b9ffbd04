"""Runs everything that needs a GPU: ``python -m bench.gpu --out DIR``, in seven minutes."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from . import report, session
from .stages import NAMES, ROOT, STAGES, LeftOut, Setting, Stage

DEADLINE = 412.0
# The longest deadline with which everything is over within seven minutes.
LONGEST = 415.0
# Seconds for the first import of torch, from a disk that has not been read yet.
PATIENCE = 60

# In a process of its own, so that no memory of the GPU is held by this one.
PROBE = """
import json, torch
found = None
if torch.cuda.is_available():
    properties = torch.cuda.get_device_properties(0)
    if torch.version.hip:
        target = "hip:" + properties.gcnArchName.partition(":")[0]
    else:
        target = f"cuda:{10 * properties.major + properties.minor}"
    found = {"device": properties.name, "target": target}
print(json.dumps(found))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line names.

    Returns:
        0 where all that ran has passed, 1 where something has not, 2 without a GPU.
    """
    begin = time.monotonic()
    options = _parse(arguments)
    stages = [stage for stage in STAGES if stage.name in (options.stages or NAMES)]
    machine = probe()
    if options.dry_run:
        _show_commands(stages, options, (machine or {}).get("target", "cuda:90"))
        return 0
    if machine is None:
        print(
            "python -m bench.gpu needs a GPU that torch can use, and torch finds none."
            " --dry-run prints what it would run.",
            file=sys.stderr,
        )
        return 2
    if importlib.util.find_spec("rich") is None:
        print("python -m bench.gpu needs rich: pip install rich", file=sys.stderr)
        return 2
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"--out {options.out}: {error.strerror}", file=sys.stderr)
        return 2
    return _run(stages, options, machine, begin)


def probe() -> dict[str, str] | None:
    """Return the GPU's name and what Triton compiles for it, or None where there is no GPU."""
    command = [sys.executable, "-c", PROBE]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        print(f"torch did not say within {PATIENCE} s whether there is a GPU", file=sys.stderr)
        return None
    if "No module named 'torch'" in done.stderr:
        advice = "take one that has: make gpu PYTHON=.venv/bin/python, say"
        print(f"{sys.executable} has no torch; {advice}", file=sys.stderr)
        return None
    if done.returncode != 0:
        print(done.stderr, file=sys.stderr)
        return None
    found: dict[str, str] | None = json.loads(done.stdout)
    return found


def environment(cache: Path, commit: str | None) -> dict[str, str]:
    """Return the variables of all commands: this checkout, one cache, and compiled kernels."""
    variables = dict(os.environ)
    # The kernels would run as Python on the CPU.
    variables.pop("TRITON_INTERPRET", None)
    paths = [str(ROOT), *filter(None, [variables.get("PYTHONPATH")])]
    variables |= {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TRITON_CACHE_DIR": str(cache),
    }
    if commit:
        variables["FUSEDOPT_COMMIT"] = commit
    return variables


def _run(
    stages: Sequence[Stage], options: argparse.Namespace, machine: dict[str, str], begin: float
) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    # Of an earlier run: a stage that does not come to its end would be read from them.
    for name in ("log.txt", "junit.xml", "results.json"):
        (options.out / name).unlink(missing_ok=True)
    columns = TextColumn("of the deadline"), BarColumn(), TimeElapsedColumn()
    summary: dict[str, Any] = {
        "schema": 1,
        "kind": "gpu",
        **machine,
        "commit": options.commit or _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "deadline": options.deadline,
    }
    with (
        # A process that was left behind may still write there.
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work,
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
    ):
        cache = (options.cache or Path(work) / "cache").resolve()
        setting = _setting(options, Path(work), machine["target"])
        task = progress.add_task("", total=options.deadline)

        def keep(results: list[dict[str, Any]]) -> None:
            summary["stages"] = results
            summary["seconds"] = time.monotonic() - begin
            report.collect(setting.work, options.out)
            report.write(summary, options.out)

        summary["stages"] = session.run(
            stages,
            setting,
            environment(cache, summary["commit"]),
            begin + options.deadline,
            lambda line: progress.console.print(line, markup=False, soft_wrap=True),
            lambda: progress.update(task, completed=time.monotonic() - begin),
            keep,
        )
    summary["seconds"] = time.monotonic() - begin
    summary["passed"] = all(s["result"] in ("passed", "left out") for s in summary["stages"])
    report.write(summary, options.out)
    report.show(summary)
    return 0 if summary["passed"] else 1


def _setting(options: argparse.Namespace, work: Path, target: str) -> Setting:
    # To the second, as results have it.
    begun = datetime.now(timezone.utc).replace(microsecond=0)
    return Setting(options.out.resolve(), work, target, options.tests, options.bench, begun)


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _show_commands(stages: Sequence[Stage], options: argparse.Namespace, target: str) -> None:
    setting = _setting(options, Path("WORK"), target)
    for stage in stages:
        print(f"# {stage.name}, at most {stage.limit:.0f} s")
        try:
            commands = stage.commands(setting)
        except LeftOut as why:
            print(f"# left out: {why}")
            continue
        for command in commands:
            variables = [f"{name}={value}" for name, value in command.environment.items()]
            print(shlex.join([*(["env", *variables] if variables else []), *command.arguments]))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench.gpu", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the results; is made")
    add("--stages", type=_names, metavar="A,B", help=f"some of {','.join(NAMES)} (all)")
    add("--tests", choices=("gpu", "all"), default="gpu", help="those that need one, or all (gpu)")
    add(
        "--bench",
        type=_words,
        default="",
        metavar="ARGUMENTS",
        help="further ones of python -m fusedopt bench",
    )
    add("--deadline", type=_deadline, default=DEADLINE, help=f"seconds in all ({DEADLINE:g})")
    add("--cache", type=Path, metavar="DIR", help="Triton's cache (a temporary one)")
    add("--commit", metavar="HASH", help="of a checkout that came without git")
    add("--dry-run", action="store_true", help="print the commands")
    return parser.parse_args(arguments)


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no stage {unknown[0]!r}: there are {', '.join(NAMES)}")
    return names


def _words(text: str) -> str:
    try:
        shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
    return text


def _deadline(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds") from error
    if not 0 < value <= LONGEST:
        raise argparse.ArgumentTypeError(f"{value:g} s: at most {LONGEST:g}, for seven minutes")
    return value


if __name__ == "__main__":
    sys.exit(main())
