"""Lion (Chen et al., arXiv 2302.06675, algorithm 2), written as a user of fusedopt would."""

from __future__ import annotations

import torch

from fusedopt import FusedOptimizer, Rule
from fusedopt.kernels.lang import jit, tl, where


def coefficients(group, step):
    beta1, beta2 = group["betas"]
    return beta1, 1 - beta1, beta2, 1 - beta2, 1 - group["lr"] * group["weight_decay"], group["lr"]


@jit
def update(p, inputs, states, coefficients, OPTIONS: tl.constexpr):
    beta1, one_minus_beta1, beta2, one_minus_beta2, shrink, lr = coefficients
    c = beta1 * states[0] + one_minus_beta1 * inputs[0]
    sign = where(c > 0, 1.0, where(c < 0, -1.0, 0.0 * c))
    return shrink * p - lr * sign, (beta2 * states[0] + one_minus_beta2 * inputs[0],)


def twin(p, inputs, states, coefficients, options):
    beta1, one_minus_beta1, beta2, one_minus_beta2, shrink, lr = coefficients
    direction = torch.sign(beta1 * states[0] + one_minus_beta1 * inputs[0])
    return shrink * p - lr * direction, (beta2 * states[0] + one_minus_beta2 * inputs[0],)


DEFAULTS = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0}
LION = Rule(
    name="Lion", update=update, twin=twin, coefficients=coefficients, n_coefficients=6,
    states=lambda group: ("exp_avg",), hyper=("lr", "betas", "weight_decay"),
    example_groups=({**DEFAULTS, "lr": 0.1}, {**DEFAULTS, "lr": 0.1, "weight_decay": 0.5}),
)  # fmt: skip


class Lion(FusedOptimizer):
    rule = LION

    def __init__(self, params, **options):
        hyper = {name: options.pop(name, value) for name, value in DEFAULTS.items()}
        super().__init__(params, hyper, **options)
