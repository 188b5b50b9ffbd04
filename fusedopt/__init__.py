"""Fused-kernel optimizers for PyTorch, hand-written in Triton: the whole step in one pass."""

from __future__ import annotations

from .clipping import GlobalNorm
from .kernels.rule import Rule
from .optimizer import FusedOptimizer
from .optimizers import SGD, Adam, AdamW, RMSprop

__version__ = "0.1.0"

__all__ = ["SGD", "Adam", "AdamW", "FusedOptimizer", "GlobalNorm", "RMSprop", "Rule"]
