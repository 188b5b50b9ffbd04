"""Squares of samples' gradients, made beside the gradients of a model's parameters."""

from __future__ import annotations

from .squares import PerSampleSquares

__all__ = ["PerSampleSquares"]
