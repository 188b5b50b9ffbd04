"""Per-sample moments of gradients, from wherever they come."""

from __future__ import annotations

from .backpack import BackpackSquares
from .base import NoiseScale, Statistics
from .grad_sample import GradSampleSquares
from .micro_batch import MicroBatchSquares
from .per_sample import LayerOperations, PerSampleSquares, register_layer

__all__ = [
    "BackpackSquares",
    "GradSampleSquares",
    "LayerOperations",
    "MicroBatchSquares",
    "NoiseScale",
    "PerSampleSquares",
    "Statistics",
    "register_layer",
]
