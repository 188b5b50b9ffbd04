"""One case, rule and mix of types: every contender compared with float64, then timed in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.harness import clock
from bench.harness.contenders import FAILED, MEASURED, SKIPPED, UNFIT, Mismatch, first_line

from . import OURS, correctness
from .codecs import CODECS
from .contenders import CONTENDERS
from .launches import launches
from .models import Case
from .protocol import TimedStep, Unsupported
from .rules import RULES
from .workload import Workload

# Where random numbers take longer than a step, timed steps see the same ones.
REDRAWN_ON_CPU = 2**20

RowT = dict[str, Any]


@dataclass(frozen=True)
class Key:
    """Who is timed, and with what in front of the step."""

    contender: str
    clip: bool = False
    scaler: bool = False


@dataclass(frozen=True)
class Group:
    """What shares tensors and is timed in turn."""

    case: Case
    rule: str
    types: str
    keys: tuple[Key, ...]

    def rows(self) -> list[RowT]:
        """Return a row for each contender, with nothing measured."""
        facts = {"case": self.case.name, "tensors": len(self.case.shapes)}
        facts |= {"parameters": self.case.parameters, "rule": self.rule, "types": self.types}
        nothing = ("device_ms", "host_ms", "launches", "copies", "bytes_per_parameter", "gbps")
        nothing += ("percent_of_copy", "extra_peak_bytes", "error", "ratio_to_ours")
        nothing += ("ratio_quartiles",)
        return [
            {**facts, **vars(key), "status": None, "reason": None, **dict.fromkeys(nothing)}
            for key in self.keys
        ]


def measure(group: Group, settings: dict[str, Any], copy_gbps: float | None) -> list[RowT]:
    """Return the group's rows.

    Args:
        group: what to measure.
        settings: "device", "rounds" and "seconds".
        copy_gbps: of the copy that was measured last.
    """
    device = torch.device(settings["device"])
    rows = group.rows()
    if "torch-compiled" in {key.contender for key in group.keys}:
        # Otherwise what was compiled for other groups counts against this one's limit.
        torch._dynamo.reset()
    try:
        _measure(group, rows, device, settings, copy_gbps)
    except torch.OutOfMemoryError as error:
        _mark(rows, UNFIT, first_line(error))
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        _mark(rows, UNFIT, first_line(error))
    except Mismatch as error:
        _mark(rows, FAILED, str(error))
    clock.release()
    return rows


def _mark(rows: Sequence[RowT], status: str, reason: str) -> None:
    for row in rows:
        if row["status"] in (None, MEASURED):
            row["status"], row["reason"] = status, reason


def _measure(
    group: Group,
    rows: list[RowT],
    device: torch.device,
    settings: dict[str, Any],
    copy_gbps: float | None,
) -> None:
    # Before any memory is counted.
    watch = clock.Clock(device)
    workload = Workload(group.case, CODECS[group.types], RULES[group.rule], device)
    admitted: dict[Key, TimedStep] = {}
    for clip in (False, True):
        pairs = [pair for pair in zip(group.keys, rows, strict=True) if pair[0].clip == clip]
        if pairs:
            expected = correctness.expect(workload, clip)
        for key, row in pairs:
            timed = _admit(key, row, workload, expected)
            if timed is not None:
                admitted[key] = timed
            clock.release()
    by_key = dict(zip(group.keys, rows, strict=True))
    _time(workload, admitted, by_key, watch, settings)
    for key in admitted:
        _derive(by_key[key], key, workload, copy_gbps)


def _admit(
    key: Key, row: RowT, workload: Workload, expected: correctness.Expected
) -> TimedStep | None:
    """Return what to time, if it is what it says it is; otherwise note why not."""
    scale = correctness.SCALE if key.scaler else None
    contender = CONTENDERS[key.contender]
    codec = workload.codec
    bound = codec.bound_of(key.contender == OURS, key.clip, workload.device)
    try:
        timed = contender.make(workload, key.clip, scale)
        error = correctness.check(workload, expected, timed.step, bound, scale or 1.0)
    except Mismatch as mismatch:
        row |= {"status": FAILED, "reason": str(mismatch)}
        row["error"] = None if mismatch.error is None else mismatch.error.facts()
    except Unsupported as reason:
        row |= {"status": SKIPPED, "reason": str(reason)}
    except torch.OutOfMemoryError as full:
        row |= {"status": UNFIT, "reason": first_line(full)}
    except Exception as broken:  # whatever another library raises at its first step
        status = FAILED if key.contender == OURS else SKIPPED
        row |= {"status": status, "reason": f"at its first steps: {first_line(broken)}"}
    else:
        row |= {"status": MEASURED, "error": error.facts()}
        if timed.scaler is not None:
            # So that gradients keep their size however often they are unscaled in place.
            timed.scaler.update(1.0)
        return timed
    return None


def _time(
    workload: Workload,
    admitted: dict[Key, TimedStep],
    rows: dict[Key, RowT],
    watch: clock.Clock,
    settings: dict[str, Any],
) -> None:
    """Fill in times, launches and memory of what has passed."""
    device = workload.device
    workload.restart()
    workload.new_gradients(1, 1.0)
    for key, timed in list(admitted.items()):
        try:
            timed.step()
            rows[key]["extra_peak_bytes"] = clock.peak_bytes(timed.step, device)
            rows[key] |= launches(timed.step, device)
        except torch.OutOfMemoryError as full:
            rows[key] |= {"status": UNFIT, "reason": first_line(full)}
            del admitted[key]
    clock.release()
    redraw = device.type != "cpu" or workload.case.parameters <= REDRAWN_ON_CPU
    times = clock.in_turn(
        {key: timed.step for key, timed in admitted.items()},
        watch,
        settings["rounds"],
        settings["seconds"],
        before=_redraw(workload) if redraw else lambda: None,
    )
    for key, measured in times.items():
        summary = clock.summary(measured)
        rows[key]["device_ms"] = clock.percentiles(summary["milliseconds"])
        rows[key]["host_ms"] = summary["host_median"]
        rows[key]["_summary"] = summary
    for key in times:
        ours = rows.get(Key(OURS, key.clip, key.scaler), {}).get("_summary")
        if ours is not None:
            found = clock.ratio(rows[key]["_summary"], ours)
            rows[key]["ratio_to_ours"] = found["ratio"]
            rows[key]["ratio_quartiles"] = found["ratio_quartiles"]
    for key in times:
        del rows[key]["_summary"]


def _redraw(workload: Workload) -> Callable[[], None]:
    seeds = iter(range(10, 1_000_000))
    return lambda: workload.new_gradients(next(seeds), 1.0)


def _derive(row: RowT, key: Key, workload: Workload, copy_gbps: float | None) -> None:
    """Fill in what follows from the time."""
    count = CONTENDERS[key.contender].bytes_per_parameter(workload, key.clip, key.scaler)
    row["bytes_per_parameter"] = count
    if row["device_ms"] is not None:
        row["gbps"] = count * workload.case.parameters / (1e6 * row["device_ms"]["median"])
        if copy_gbps:
            row["percent_of_copy"] = 100 * row["gbps"] / copy_gbps
