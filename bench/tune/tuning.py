"""The search: rule out, check, time, choose; and the entry of the table that comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness.clock import Clock, in_turn, release
from fusedopt.kernels import launch_config
from fusedopt.kernels.launch_config import LaunchConfig

from .candidates import Work, candidates, name, names
from .choose import against, finalists, winner
from .trial import Trial, differs

# Elements of each operand: float32 operands of it are many times larger than any cache.
ELEMENTS = 2**28
ROUNDS, FINAL_ROUNDS = 7, 30
# Of one candidate, after which it is not measured again.
SECONDS = 2.0

# From an entry and a candidate: why it will not do.
Unfit = Callable[[Work, LaunchConfig], list[str]]
# From updates by name and a number of rounds: times on the device.
Measure = Callable[[Mapping[str, Callable[[], None]], int], Mapping[str, Sequence[float]]]


def measure_with(clock: Clock) -> Measure:
    """Return what measures updates in turn."""

    def measure(functions: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
        found = in_turn(functions, clock, rounds, SECONDS)
        return {key: [on_device for on_device, _ in times] for key, times in found.items()}

    return measure


def tune(
    entry: Work,
    device: torch.device,
    unfit: Unfit,
    measure: Measure,
    elements: int = ELEMENTS,
    advance: Callable[[str], object] = lambda what: None,
    keep: Callable[[dict[str, Any]], object] = lambda so_far: None,
) -> dict[str, Any]:
    """Find the configuration of one entry.

    Args:
        entry: rule and types.
        device: the GPU.
        unfit: what rules a candidate out before it is run.
        measure: what times updates.
        elements: of each operand.
        advance: called with what is done next.
        keep: given the entry before the final, with ``chosen`` None, in case there is none.

    Returns:
        ``rule``, ``types``, ``default``, ``tried`` (each candidate with why it was ruled out, or
        its ratio to the default's time), and ``chosen``: a configuration, or None for the default.
    """
    default = launch_config.default(aligned=True)
    tried: dict[str, Any] = {}
    fit = [default]
    for candidate in candidates(entry.key):
        advance(f"{entry.rule.name} {entry.key} {name(candidate)}")
        complaints = unfit(entry, candidate)
        if not complaints:
            # It is run for the first time here.
            difference = differs(entry, candidate, device)
            complaints = [difference] if difference else []
        if complaints:
            tried[name(candidate)] = {"ruled_out": "; ".join(complaints)}
        else:
            fit.append(candidate)
    advance(f"{entry.rule.name} {entry.key}, times")
    trial = Trial(entry, [elements], device)
    known = names(fit)
    times = measure({key: trial.update(one) for key, one in known.items()}, ROUNDS)
    for key in known:
        tried[key] = _ratio(times, key, name(default))
    keep(_entry(entry, elements, tried, None))
    final = [name(default), *finalists(times, name(default))]
    times = measure({key: trial.update(known[key]) for key in final}, FINAL_ROUNDS)
    for key in final:
        tried[key] = {**_ratio(times, key, name(default)), "final": True}
    best = winner(times, name(default))
    del trial
    release()
    found = None if best is None else {"name": best, **vars(known[best])}
    return _entry(entry, elements, tried, found)


def _entry(
    entry: Work, elements: int, tried: Mapping[str, Any], found: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {
        "rule": entry.rule.name,
        "types": entry.key,
        "elements": elements,
        "default": name(launch_config.default(aligned=True)),
        "tried": dict(tried),
        "chosen": None if found is None else {**found, "ratio": tried[found["name"]]["ratio"]},
    }


def _ratio(times: Mapping[str, Sequence[float]], key: str, default: str) -> dict[str, Any]:
    found = against(times[key], times[default])
    return {"ratio": found.median, "ratio_quartiles": list(found.quartiles)}


def write(
    path: Path, results: Sequence[Mapping[str, Any]], architecture: str, origin: Mapping[str, Any]
) -> int:
    """Bring a table up to date: where the default is best, there is no entry.

    Args:
        path: of the table; entries of what was not tuned now stay.
        results: of ``tune``.
        architecture: that they were taken on.
        origin: what else an entry says: device, versions, commit.

    Returns:
        The number of entries that come from the results.
    """
    tuned = {(architecture, result["rule"], result["types"]) for result in results}
    entries = [
        entry
        for entry in launch_config.load(path)
        if (entry["architecture"], entry["rule"], entry["types"]) not in tuned
    ]
    found = [
        {
            "architecture": architecture,
            "rule": result["rule"],
            "types": result["types"],
            "block": result["chosen"]["block"],
            "threads": result["chosen"]["threads"],
            "ratio": round(result["chosen"]["ratio"], 4),
            "elements": result["elements"],
            **origin,
        }
        for result in results
        if result["chosen"] is not None
    ]
    launch_config.save(path, [*entries, *found])
    return len(found)
