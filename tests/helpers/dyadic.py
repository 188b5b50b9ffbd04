"""A user's own rule whose arithmetic is exact where its values have few bits.

All factors are powers of two and each sum has one rounding, contracted or not, so that kernel and
reference have to agree to the last bit, whatever they are compiled to.
"""

from __future__ import annotations

from typing import Any

import torch
from variants_by_hand import LOOPS, Loop

from fusedopt import FusedOptimizer, Rule
from fusedopt.kernels.lang import jit, tl, where


def _coefficients(group, step):
    return (group["lr"],)


@jit
def _update(p, inputs, states, coefficients, OPTIONS: tl.constexpr):
    (lr,) = coefficients
    g = inputs[0]
    mean = 0.5 * states[0] + 0.5 * g
    size = 0.5 * states[1] + 0.5 * where(g < 0, 0.0 - g, g)
    p = p - 0.0625 * p
    return p - lr * mean - 0.125 * lr * size, (mean, size)


def _twin(p, inputs, states, coefficients, options):
    lr, g = coefficients[0], inputs[0]
    mean = 0.5 * states[0] + 0.5 * g
    size = 0.5 * states[1] + 0.5 * g.abs()
    p = p - 0.0625 * p
    return p - lr * mean - 0.125 * lr * size, (mean, size)


DYADIC = Rule(
    name="Dyadic",
    update=_update,
    twin=_twin,
    coefficients=_coefficients,
    coefficient_names=("lr",),
    states=lambda group: ("mean", "size"),
    hyper=("lr",),
    counts_steps=False,
    nonnegative=("size",),
    example_groups=({"lr": 0.125},),
)


class Dyadic(FusedOptimizer):
    rule = DYADIC

    def __init__(self, params: Any, lr: float = 0.125, **common: Any) -> None:
        super().__init__(params, {"lr": lr}, **common)


class DyadicLoop(Loop):
    """The formula in float64."""

    def update(self, g: torch.Tensor, square: Any) -> None:
        lr, zero = self.options["lr"], torch.zeros_like(self.p)
        mean = (self.state.get("mean", zero) + g) / 2
        size = (self.state.get("size", zero) + g.abs()) / 2
        self.state.update(mean=mean, size=size)
        self.p = self.p * 15 / 16 - lr * (mean + size / 8)


DYADIC_LOOPS = {**LOOPS, "Dyadic": DyadicLoop}
