"""Marks that tests of several parts carry."""

from __future__ import annotations

import pytest

BACKENDS = ("reference", "triton")

both_backends = pytest.mark.parametrize("backend", BACKENDS)
each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum"])
# The interpreter computes with numpy, which reports what an overflow or a nan is part of here.
numpy_may_warn = pytest.mark.filterwarnings("ignore:(invalid value|overflow) enc:RuntimeWarning")
