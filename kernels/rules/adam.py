"""Adam and AdamW, with AMSGrad.

    p = (1 - lr wd) p                     decoupled decay (AdamW); or cautious: see ``cautious.py``
    d = g + wd p                          coupled decay (Adam)
    m = m + (1 - beta1)(d - m)
    v = beta2 v + (1 - beta2) d^2
    r = sqrt(v), or with AMSGrad sqrt(v_max) where v_max = max(v_max, v)
    p = p - lr / (1 - beta1^t) * m / (r / sqrt(1 - beta2^t) + eps)

Without bias correction both powers of beta are left out. With ``"running_mean"`` so they are, and
1 - beta becomes 1 / min(t, 1 / (1 - beta)) in both averages: see ``averages.py``.

Kingma and Ba, arXiv 1412.6980, algorithm 1; decoupled decay of Loshchilov and Hutter, arXiv
1711.05101, algorithm 2; AMSGrad of Reddi et al., arXiv 1904.09237, algorithm 2, in torch's form,
which takes the maximum before the bias correction; the running mean of McAllester, TTIC 31230,
"Adam (simplified)".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import torch_ops as T
from ..lang import divide, jit, lerp, maximum, sqrt, tl, where
from ..rule import Group, Rule, Scalar
from .averages import weights
from .cautious import NAME, is_cautious, shrunk, shrunk_twin

COEFFICIENTS = (
    "sign", "coupled_decay", "shrink", "one_minus_beta1", "beta2", "one_minus_beta2", "root_bias",
    "eps", "step_size",
)  # fmt: skip

# Of its states, those that are never below 0.
NONNEGATIVE = ("exp_avg_sq", "max_exp_avg_sq")


def coefficients(group: Group, step: Scalar) -> tuple[Scalar, ...]:
    """Return the scalars that ``COEFFICIENTS`` names."""
    lr, decay = group["lr"], group["weight_decay"]
    beta1, beta2 = group["betas"]
    decoupled = group["decoupled_weight_decay"]
    correction = group["bias_correction"]
    _, one_minus_beta1, sum1 = weights(beta1, step, correction)
    beta2, one_minus_beta2, sum2 = weights(beta2, step, correction)
    return (
        -1.0 if group["maximize"] else 1.0,
        0.0 if decoupled else decay,
        1 - lr * decay if decoupled else 1.0,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        sum2**0.5,
        group["eps"],
        lr / sum1,
    )


@jit
def update(p, inputs, states, coefficients, OPTIONS: tl.constexpr):
    """Update one block; OPTIONS is (amsgrad, cautious)."""
    sign, coupled_decay, shrink, one_minus_beta1, beta2 = coefficients[:5]
    one_minus_beta2, root_bias, eps, step_size = coefficients[5:]
    d = inputs[0] * sign
    d = where(coupled_decay != 0.0, d + coupled_decay * p, d)
    exp_avg = lerp(states[0], d, one_minus_beta1)
    exp_avg_sq = beta2 * states[1] + one_minus_beta2 * d * d
    scalars = (shrink, root_bias, eps, step_size)
    return apply_moments(p, exp_avg, exp_avg_sq, states, scalars, OPTIONS)


@jit
def apply_moments(p, exp_avg, exp_avg_sq, states, scalars, OPTIONS: tl.constexpr):
    """Move the parameter by the new moments."""
    shrink, root_bias, eps, step_size = scalars
    if OPTIONS[0]:
        largest = maximum(states[2], exp_avg_sq)
        new_states = (exp_avg, exp_avg_sq, largest)
    else:
        largest = exp_avg_sq
        new_states = (exp_avg, exp_avg_sq)
    # The first quotient is not divide(): a second one would cost a dozen registers, and with them
    # programs in flight. It is within two units in the last place.
    denominator = sqrt(largest) / root_bias + eps
    if OPTIONS[1]:
        ratio = divide(exp_avg, denominator)
        return shrunk(p, ratio, shrink) - step_size * ratio, new_states
    else:
        return p * shrink - step_size * divide(exp_avg, denominator), new_states


def twin(
    p: Tensor,
    inputs: tuple[Tensor, ...],
    states: tuple[Tensor, ...],
    coefficients: tuple[Any, ...],
    options: tuple[bool, ...],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """State the update in PyTorch."""
    sign, coupled_decay, shrink, one_minus_beta1, beta2 = coefficients[:5]
    one_minus_beta2, root_bias, eps, step_size = coefficients[5:]
    d = T.add_if(T.scale(inputs[0], sign), p, coupled_decay)
    exp_avg = T.lerp_(states[0], d, one_minus_beta1)
    exp_avg_sq = T.addcmul_(T.scale_(states[1], beta2), d, d, one_minus_beta2)
    return apply_moments_twin(
        p, (exp_avg, exp_avg_sq, *states[2:]), (shrink, root_bias, eps, step_size), options
    )


def apply_moments_twin(
    p: Tensor, states: tuple[Tensor, ...], scalars: tuple[Any, ...], options: tuple[bool, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Move the parameter by the new moments."""
    shrink, root_bias, eps, step_size = scalars
    exp_avg, exp_avg_sq = states[:2]
    if options[0]:
        torch.maximum(states[2], exp_avg_sq, out=states[2])
    denominator = T.shift_(T.divide_(states[-1].sqrt(), root_bias), eps)
    if options[1]:
        ratio = exp_avg / denominator
        return T.add_(shrunk_twin(p, ratio, shrink), ratio, -step_size), states
    return T.addcdiv_(T.scale_(p, shrink), exp_avg, denominator, -step_size), states


def states(group: Group) -> tuple[str, ...]:
    """State names in torch's spelling."""
    return ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if group["amsgrad"] else ())


def peaking(group: Group) -> tuple[str, ...]:
    """Return the states whose largest over time is kept."""
    return NONNEGATIVE if group["amsgrad"] else ()


_DEFAULTS = {
    "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.0, "amsgrad": False,
    "maximize": False, "decoupled_weight_decay": False, "bias_correction": "adam",
    NAME: False,
}  # fmt: skip

ADAM = Rule(
    name="Adam",
    update=update,
    twin=twin,
    coefficients=coefficients,
    states=states,
    options=lambda group: (bool(group["amsgrad"]), is_cautious(group)),
    option_names=("amsgrad", "cautious"),
    hyper=("lr", "betas", "eps", "weight_decay"),
    coefficient_names=COEFFICIENTS,
    nonnegative=NONNEGATIVE,
    peaking=peaking,
    example_groups=(
        _DEFAULTS,
        {**_DEFAULTS, "weight_decay": 0.1, "maximize": True},
        {**_DEFAULTS, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {**_DEFAULTS, "amsgrad": True, "betas": (0.3, 0.6)},
        {**_DEFAULTS, "bias_correction": None, "weight_decay": 0.1},
        # Horizons of 1.25 and 2.5 steps, so that a few steps see both sides of them.
        {**_DEFAULTS, "bias_correction": "running_mean", "betas": (0.2, 0.6)},
        {**_DEFAULTS, "weight_decay": 2.0, "decoupled_weight_decay": True, NAME: True},
    ),
)
