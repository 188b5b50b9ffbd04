"""Signum (Bernstein et al., arXiv 1802.04434), written as a user of fusedopt would."""

from __future__ import annotations

import torch

from fusedopt import FusedOptimizer, Rule
from fusedopt.kernels.lang import jit, tl, where


def coefficients(group, step):
    return group["momentum"], 1 - group["momentum"], group["lr"]


@jit
def update(p, inputs, states, coefficients, OPTIONS: tl.constexpr):
    momentum, one_minus_momentum, lr = coefficients
    m = momentum * states[0] + one_minus_momentum * inputs[0]
    return p - lr * where(m > 0, 1.0, where(m < 0, -1.0, 0.0 * m)), (m,)


def twin(p, inputs, states, coefficients, options):
    momentum, one_minus_momentum, lr = coefficients
    m = momentum * states[0] + one_minus_momentum * inputs[0]
    return p - lr * torch.sign(m), (m,)


DEFAULTS = {"lr": 1e-4, "momentum": 0.9}
SIGNUM = Rule(
    name="Signum", update=update, twin=twin, coefficients=coefficients, n_coefficients=3,
    states=lambda group: ("momentum_buffer",), hyper=("lr", "momentum"),
    example_groups=({**DEFAULTS, "lr": 0.1}, {"lr": 0.1, "momentum": 0.3}),
)  # fmt: skip


class Signum(FusedOptimizer):
    rule = SIGNUM

    def __init__(self, params, **options):
        hyper = {name: options.pop(name, value) for name, value in DEFAULTS.items()}
        super().__init__(params, hyper, **options)
