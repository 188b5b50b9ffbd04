"""Benchmarks run without a GPU too: host time is measured with the launch itself left out."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # So that the Triton backend accepts tensors on the CPU. Nothing here runs the interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")
