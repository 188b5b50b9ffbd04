"""Pitfalls of per-sample squares, o and p: how kernels add.

The letters are the design note's. A pitfall is a mistake that somebody has made: most of
them give numbers that look right.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from per_sample import backward, gather, mlp, randn, squared_error, to
from torch import nn

import fusedopt
from fusedopt import PerSampleSquares


def _kernel_sources() -> dict[str, str]:
    folder = Path(inspect.getfile(fusedopt.kernels)).parent / "per_sample"
    sources = {path.name: path.read_text() for path in folder.glob("**/*.py")}
    assert len(sources) > 1
    return sources


def _code(source: str) -> str:
    """Without comments and docstrings: they may name what is avoided."""
    return re.sub(r"#.*|\"\"\"(.|\n)*?\"\"\"", "", source)


@pytest.mark.parametrize("word", ["autotune", "atomic_"])
def test_pitfall_o_no_autotune_that_accumulates(word: str) -> None:
    """A tuner runs a kernel once a configuration: what adds in place would add each time."""
    for name, source in _kernel_sources().items():
        assert word not in _code(source), f"{name} uses {word}"


def test_pitfall_o_first_call_of_each_shape() -> None:
    """The first call of a shape gives what the second gives, bit for bit."""
    for width in (3, 11, 18):
        model, x = to(torch.float32, nn.Linear(width, width + 1), randn(2, 3, width))
        statistics = gather(model, x, backend="triton")
        first = [statistics.mean_square(p).clone() for p in model.parameters()]
        statistics.reset()
        model.zero_grad()
        backward(model, [(x,)], squared_error())
        for p, q in zip(model.parameters(), first, strict=True):
            assert torch.equal(statistics.mean_square(p), q)


def test_pitfall_p_no_spinning_and_equal_bits() -> None:
    """Partial sums are added in a fixed order by a later kernel, never waited for."""
    for name, source in _kernel_sources().items():
        code = _code(source)
        for word in ("atomic_cas", "atomic_xchg", "debug_barrier"):
            assert word not in code, f"{name} uses {word}"
    bits = []
    for _ in range(3):
        (model,) = to(torch.float32, mlp())
        x = randn(9, 4, dtype=torch.float32)
        statistics = PerSampleSquares(model, backend="triton")
        backward(model, [(x,)], squared_error())
        bits.append([(statistics.mean_square(p), p.grad) for p in model.parameters()])
    for other in bits[1:]:
        for (q, g), (q2, g2) in zip(bits[0], other, strict=True):
            assert torch.equal(q, q2) and torch.equal(g, g2)
