"""Squares of samples' gradients, made beside the gradients of a model's parameters."""

from __future__ import annotations

from .known import LayerOperations, register_layer
from .squares import PerSampleSquares

__all__ = ["LayerOperations", "PerSampleSquares", "register_layer"]
