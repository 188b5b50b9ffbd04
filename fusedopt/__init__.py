"""Fused-kernel optimizers for PyTorch, hand-written in Triton: the whole step in one pass."""

from __future__ import annotations

from . import scaling
from .accumulation import GradientAccumulator
from .adam_c import AdamC
from .averaging import WeightAverage
from .batch_decoupled import BatchDecoupledAdam, BatchDecoupledRMSprop
from .checkpoint import export_state_dict
from .clipping import GlobalNorm
from .guard import SpikeGuard
from .kernels.rule import Rule
from .lion import Lion
from .optimizer import FusedOptimizer
from .optimizers import SGD, Adam, AdamW, RMSprop
from .release import gradient_release
from .schedule_free import ScheduleFreeAdamW
from .statistics import BackpackSquares, GradSampleSquares, MicroBatchSquares, PerSampleSquares
from .svag import SVAG
from .telemetry import Telemetry

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "SVAG",
    "Adam",
    "AdamC",
    "AdamW",
    "BackpackSquares",
    "BatchDecoupledAdam",
    "BatchDecoupledRMSprop",
    "FusedOptimizer",
    "GlobalNorm",
    "GradSampleSquares",
    "GradientAccumulator",
    "Lion",
    "MicroBatchSquares",
    "PerSampleSquares",
    "RMSprop",
    "Rule",
    "ScheduleFreeAdamW",
    "SpikeGuard",
    "Telemetry",
    "WeightAverage",
    "export_state_dict",
    "gradient_release",
    "scaling",
]
