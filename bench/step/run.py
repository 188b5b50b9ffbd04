"""A whole run: its parts one after the other, kept as they come in."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from bench.harness import clock, tables
from bench.harness.contenders import first_line
from bench.harness.output import File
from bench.harness.places import RESULTS, SCRATCH

from . import OURS, PARTS, children, figures, first_step, sets, training
from . import result as results
from .external import LIBRARIES
from .measure import Group, measure
from .report import report

QUICK = "tiny tensors, which show that the benchmark works and nothing else"
NO_GPU = (
    "no GPU: the reference backend and torch on a processor, whose caches move more than memory"
    " does, and no figure of a GPU"
)
SIZES = {"quick": 2**16, "cpu": 2**28, "core": 2**31, "full": 2**31}
# Seconds of the other parts on a GPU, about.
SECONDS = {"host": 20.0, "sharded": 60.0, "first-step": 50.0, "per-sample": 240.0, "training": 20.0}


def run(options: argparse.Namespace) -> int:
    """Measure, print and write.

    Args:
        options: of ``python -m fusedopt bench``.

    Returns:
        0; or 1 where a step of ours is wrong or a part has failed.
    """
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = "quick" if options.quick else "cpu" if device == "cpu" else options.set
    settings = _settings(options, device, chosen)
    note = QUICK if options.quick else NO_GPU if device == "cpu" else ""
    result = results.new(settings, device, not options.quick, note)
    small = options.quick or device == "cpu"
    folder = options.out or (SCRATCH if small else RESULTS)
    console = Console(stderr=True)
    try:
        file = results.file(Path(folder), result)
    except OSError as error:
        console.print(f"bench: --out {folder}: {error.strerror}", markup=False, soft_wrap=True)
        return 2
    if device == "cpu":
        console.print(f"No measurement of a GPU: {note}.", soft_wrap=True)
        if options.quick:
            # What is stepped here is too small to share out among threads.
            torch.set_num_threads(1)
    _missing(result, settings)
    if settings["parts"] == ["step"] and not _groups(result, settings):
        what = ", ".join(
            f"{entry['contender']} is {entry['reason']}" for entry in result["missing"]
        )
        console.print(f"bench: nothing is left to time: {what or 'no row is like that'}")
        return 2
    _run(result, settings, file, console)
    figures.write(result, file)
    if options.json:
        sys.stdout.write(file.json.read_text(encoding="utf-8"))
    else:
        report(result, Console())
        Console().print(f"Wrote {file.json} and its pictures beside it", soft_wrap=True)
    return 1 if result["failed"] else 0


def _settings(options: argparse.Namespace, device: str, chosen: str) -> dict[str, Any]:
    if options.parts:
        parts = [part for part in PARTS if part in options.parts]
    else:
        parts = {
            "quick": [part for part in PARTS if part != "per-sample"],
            "cpu": ["step", "host"],
            "core": [part for part in PARTS if part not in ("sharded", "per-sample")],
            "full": list(PARTS),
        }[chosen]
    some = options.parts, options.case, options.rule, options.types, options.contender
    return {
        "parts": parts,
        "set": chosen,
        "partial": any(some) or options.clip is not None or options.scaler is not None,
        "device": device,
        "rounds": 2 if options.quick else 5 if device == "cpu" else 25,
        "seconds": options.seconds or (0.01 if options.quick else 1.0 if device == "cpu" else 0.4),
        "cases": options.case,
        "rules": options.rule,
        "types": options.types,
        "contenders": options.contender,
        "clip": options.clip,
        "scaler": options.scaler,
    }


def _missing(result: dict[str, Any], settings: dict[str, Any]) -> None:
    """Note which of the contenders that are asked for cannot run."""
    if "per-sample" in settings["parts"]:
        from bench.per_sample.contenders import missing

        result["missing"] += missing()
    if not {"step", "first-step"} & set(settings["parts"]):
        return
    for name, library in LIBRARIES.items():
        if settings["contenders"] and name not in settings["contenders"]:
            continue
        reason = library.reason_missing()
        if reason is not None:
            result["missing"].append({"contender": name, "reason": reason})


def _run(result: dict[str, Any], settings: dict[str, Any], file: File, console: Console) -> None:
    """Run the parts; whatever a part raises is noted, and the next one runs."""
    groups = _groups(result, settings) if "step" in settings["parts"] else []
    if settings["device"] == "cuda":
        seconds = sets.estimate(groups, settings["rounds"], settings["seconds"])
        seconds += sum(SECONDS.get(part, 0.0) for part in settings["parts"])
        console.print(f"About {seconds / 60:.0f} minutes on an H100.", soft_wrap=True)
    with tables.progress(console) as progress:
        steps = {
            "step": partial(_step, groups),
            "host": _host,
            "sharded": _sharded,
            "first-step": _first_step,
            "per-sample": _per_sample,
            "training": _training,
        }
        for part in settings["parts"]:
            try:
                for _ in steps[part](result, settings, progress):
                    file.keep(result)
            except Exception as error:  # the other parts can still be taken
                result["failed"].append(f"{part}: {first_line(error)}")
            file.keep(result)


def _groups(result: dict[str, Any], settings: dict[str, Any]) -> list[Group]:
    filters = sets.Filters(
        *(settings[name] for name in ("cases", "rules", "types", "contenders", "clip", "scaler"))
    )
    missing = [entry["contender"] for entry in result["missing"]]
    return sets.groups(settings["set"], filters, missing)


def _step(
    groups: Sequence[Group], result: dict[str, Any], settings: dict[str, Any], progress: Progress
) -> Iterator[None]:
    device = torch.device(settings["device"])
    task = progress.add_task("copy", total=sum(len(group.keys) for group in groups))
    size = SIZES[settings["set"]]
    if device.type == "cuda":
        size = min(size, torch.cuda.get_device_properties(device).total_memory // 8)
    copy = clock.Copy(device, size)
    speeds: list[float] = []
    by_case: dict[str, float] = {}
    for group in groups:
        name = group.case.name
        progress.update(task, description=f"{name} {group.rule} {group.types}")
        if not progress.console.is_terminal:
            # A log has no bar.
            progress.console.print(f"{name} {group.rule} {group.types}")
        if name not in by_case:
            # Again before each case, so that a clock that drifts shows.
            speeds += copy.gbps(clock.Clock(device), rounds=10)
            by_case[name] = clock.percentiles(speeds[-10:])["median"]
            whole = clock.percentiles(speeds)
            result["copy"] = {"gbps": whole, "bytes": size, "by_case": by_case}
            clock.release()
        rows = measure(group, settings, by_case[name])
        result["rows"] += rows
        wrong = [row for row in rows if row["contender"] == OURS and row["status"] == "failed"]
        for row in wrong:
            what = f"{name} {group.rule} {group.types}{' clip' if row['clip'] else ''}"
            result["failed"].append(f"{what}: {row['reason']}")
        progress.advance(task, len(group.keys))
        yield


def _host(result: dict[str, Any], settings: dict[str, Any], progress: Progress) -> Iterator[None]:
    task = progress.add_task("host time of step()", total=1)
    result["host"] = children.host(
        settings["set"] == "quick", settings["rules"], settings["contenders"]
    )
    progress.advance(task)
    yield


def _sharded(
    result: dict[str, Any], settings: dict[str, Any], progress: Progress
) -> Iterator[None]:
    task = progress.add_task("host time over sharded parameters", total=1)
    result["sharded"] = children.sharded(settings["set"] == "quick")
    wrong = [row for row in result["sharded"] if row["contender"] == OURS and row["reason"]]
    result["failed"] += [f"sharded, {row['placement']}: {row['reason']}" for row in wrong]
    progress.advance(task)
    yield


def _first_step(
    result: dict[str, Any], settings: dict[str, Any], progress: Progress
) -> Iterator[None]:
    device, quick = settings["device"], settings["set"] == "quick"
    cases = first_step.CPU if device == "cpu" else first_step.CORE
    task = progress.add_task("first step of a process", total=len(cases))
    for row in children.first_steps(device, quick, settings["contenders"]):
        result["first_step"].append(row)
        if row["reason"] is not None and row["contender"] == OURS:
            result["failed"].append(f"first step: {row['reason']}")
        progress.advance(task)
        yield


def _per_sample(
    result: dict[str, Any], settings: dict[str, Any], progress: Progress
) -> Iterator[None]:
    from bench.per_sample import __main__ as per_sample

    if settings["device"] == "cpu" and settings["set"] != "quick":
        raise RuntimeError("per-sample squares are measured on a GPU alone; --quick checks them")
    arguments = ["--quick"] if settings["set"] == "quick" else []
    for so_far in per_sample.collect(arguments, settings["device"], progress):
        result["per_sample"] = so_far
        yield
    result["failed"] += [f"per-sample: {text}" for text in result["per_sample"]["failed"]]


def _training(
    result: dict[str, Any], settings: dict[str, Any], progress: Progress
) -> Iterator[None]:
    quick = settings["set"] == "quick"
    if settings["device"] == "cpu" and not quick:
        raise RuntimeError("training is measured on a GPU alone; --quick checks it")
    task = progress.add_task("training steps", total=3)
    advance: Callable[[], None] = partial(progress.advance, task)
    size, batch = (training.TINY, 3) if quick else (training.SIZE, 16)
    rounds = {"rounds": 2 if quick else 15, "seconds": 4.0}
    result["training"] = training.measure(size, batch, {**settings, **rounds}, advance)
    yield
