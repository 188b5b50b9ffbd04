"""Per-sample moments of gradients, from wherever they come."""

from __future__ import annotations

from .backpack import BackpackSquares
from .base import NoiseScale, Statistics
from .grad_sample import GradSampleSquares
from .micro_batch import MicroBatchSquares
from .per_sample import PerSampleSquares

__all__ = [
    "BackpackSquares",
    "GradSampleSquares",
    "MicroBatchSquares",
    "NoiseScale",
    "PerSampleSquares",
    "Statistics",
]
