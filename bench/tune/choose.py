"""Which configuration is faster than the default by more than the noise."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.harness.clock import quartiles

# In three rounds of four, a candidate takes at most this share of the default's time.
FASTER = 0.99
# How many go into the final.
FINALISTS = 3

Times = Sequence[float]


@dataclass(frozen=True)
class Against:
    """A candidate's time over the default's, of the same rounds: the median and the quartiles."""

    median: float
    quartiles: tuple[float, float]


def against(candidate: Times, default: Times) -> Against:
    """Compare times of the same rounds, of which the slower may have fewer."""
    ratios = [a / b for a, b in zip(candidate, default, strict=False)]
    first, third = quartiles(ratios)
    return Against(statistics.median(ratios), (first, third))


def finalists(times: Mapping[str, Times], default: str, count: int = FINALISTS) -> list[str]:
    """Return the fastest by the median, without the default."""
    others = [name for name in times if name != default]
    return sorted(others, key=lambda name: against(times[name], times[default]).median)[:count]


def winner(times: Mapping[str, Times], default: str) -> str | None:
    """Return the fastest of those that beat the default by more than the noise, or None."""
    found = {name: against(times[name], times[default]) for name in times if name != default}
    faster = [name for name, ratio in found.items() if ratio.quartiles[1] < FASTER]
    return min(faster, key=lambda name: found[name].median, default=None)
