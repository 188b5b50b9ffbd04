"""Lion: the sign of an average of gradients.

    p = (1 - lr wd) p - lr sign(beta1 m + (1 - beta1) g)
    m = beta2 m + (1 - beta2) g

Chen et al., arXiv 2302.06675, algorithm 2. The step is as long in each element, so that lr is to be
three to ten times smaller than AdamW's, and the decay larger by as much (section 5 there).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import torch_ops as T
from ..lang import jit, lerp, tl, where
from ..rule import Group, Rule, Scalar


def coefficients(group: Group, step: Scalar) -> tuple[Scalar, ...]:
    """Return the scalars that ``LION`` names."""
    beta1, beta2 = group["betas"]
    return 1 - beta1, 1 - beta2, 1 - group["lr"] * group["weight_decay"], group["lr"]


@jit
def update(p, inputs, states, coefficients, OPTIONS: tl.constexpr):
    """Update one block; there are no options."""
    one_minus_beta1, one_minus_beta2, shrink, lr = coefficients
    c = lerp(states[0], inputs[0], one_minus_beta1)
    # torch.sign of a nan is 0: the parameter would stand still from then on, in silence.
    sign = where(c > 0, 1.0, where(c < 0, -1.0, c))
    return p * shrink - lr * sign, (lerp(states[0], inputs[0], one_minus_beta2),)


def twin(
    p: Tensor, inputs: tuple[Tensor, ...], states: tuple[Tensor, ...], coefficients: Any, _: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """State the update in PyTorch."""
    one_minus_beta1, one_minus_beta2, shrink, lr = coefficients
    c = T.lerp_(states[0].clone(), inputs[0], one_minus_beta1)
    sign = torch.where(c.isnan(), c, torch.sign(c))
    return T.add_(T.scale_(p, shrink), sign, -lr), (T.lerp_(states[0], inputs[0], one_minus_beta2),)


_DEFAULTS = {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.0}

LION = Rule(
    name="Lion", update=update, twin=twin, coefficients=coefficients,
    coefficient_names=("one_minus_beta1", "one_minus_beta2", "shrink", "lr"),
    states=lambda group: ("exp_avg",), hyper=("lr", "betas", "weight_decay"), counts_steps=False,
    example_groups=(_DEFAULTS, {**_DEFAULTS, "weight_decay": 0.5, "betas": (0.3, 0.6)}),
)  # fmt: skip
