"""Where things lie in the checkout."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
# Of measurements that are kept, of runs that show no more than that a benchmark works, and what CI
# compares with.
RESULTS, SCRATCH, BASELINES = BENCH / "results", BENCH / "out", BENCH / "baselines"
