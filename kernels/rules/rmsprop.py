"""RMSprop, plain and centred, with momentum.

    d = g + l2 p
    s = alpha s + (1 - alpha) d^2
    a = a + (1 - alpha)(d - a)            centred only
    u = s / c, or s - a^2 centred
    r = sqrt(u), or u with the variance for a denominator
    b = mu b + d / (r + eps)              with momentum
    p = p - lr b                          without momentum p - lr d / (r + eps)

c is 1, or with bias correction 1 - alpha^t, the sum of the averages' weights: Aitchison, EMAT31530
part 6, equations 28 to 30, where 29 prints g^2 for the moving average and 30 a plus sign; built is
what they must mean, the average, and descent. It does not go with the centred form: corrected, the
variance of the first gradient alone is zero, and the first step would be lr d / eps.

The variance is form (2) of McAllester, TTIC 31230, "RMSProp is Theoretically Mysterious": the
trajectory does not depend on the parameters' unit, and lr has that of the loss (the notes print its
inverse, but g / s is parameter / loss).

Tieleman and Hinton 2012 (lecture 6.5); centred form of Graves, arXiv 1308.0850, equations 38 to
45, with eps outside the root as ``torch.optim.RMSprop`` has it.

s - a^2 is a variance, but rounding can make it negative for a nearly constant gradient, and then
its root is nan and so is the parameter for good. Here it is cut off at zero: the trajectory is the
same wherever the root exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import torch_ops as T
from ..lang import jit, lerp, sqrt, tl, where
from ..rule import Group, Rule, Scalar
from .averages import weights

DENOMINATORS = ("std", "variance")


COEFFICIENTS = (
    "sign", "coupled_decay", "alpha", "one_minus_alpha", "eps", "gain", "momentum", "lr",
    "gained_lr",
)  # fmt: skip

# Of its states, the one that is never below 0.
NONNEGATIVE = ("square_avg",)


def coefficients(group: Group, step: Scalar) -> tuple[Scalar, ...]:
    """Return the scalars that ``COEFFICIENTS`` names.

    The bias correction divides the denominator. As a gain on the quotient, with eps to match, it
    costs no division, and where nothing stands between quotient and step, in lr, nothing at all.
    """
    sign = -1.0 if group["maximize"] else 1.0
    correction = "adam" if group["bias_correction"] else None
    alpha, one_minus_alpha, total = weights(group["alpha"], step, correction)
    gain = total if group["denominator"] == "variance" else total**0.5
    return (
        sign,
        group["weight_decay"],
        alpha,
        one_minus_alpha,
        group["eps"] * gain,
        gain,
        group["momentum"],
        group["lr"],
        group["lr"] * gain,
    )


@jit
def update(p, inputs, states, coefficients, OPTIONS: tl.constexpr):
    """Update one block; OPTIONS is (centered, momentum, variance)."""
    sign, coupled_decay, alpha, one_minus_alpha, eps, gain, momentum, lr, gained_lr = coefficients
    d = inputs[0] * sign
    d = where(coupled_decay != 0.0, d + coupled_decay * p, d)
    square_avg = alpha * states[0] + one_minus_alpha * d * d
    scalars = (one_minus_alpha, eps, gain, momentum, lr, gained_lr)
    return apply_moments(p, d, square_avg, states, scalars, OPTIONS)


@jit
def apply_moments(p, d, square_avg, states, scalars, OPTIONS: tl.constexpr):
    """Move the parameter by the new second moment."""
    one_minus_alpha, eps, gain, momentum, lr, gained_lr = scalars
    new_states = (square_avg,)
    spread = square_avg
    if OPTIONS[0]:
        grad_avg = lerp(states[1], d, one_minus_alpha)
        new_states = new_states + (grad_avg,)
        spread = square_avg - grad_avg * grad_avg
        spread = where(spread < 0.0, 0.0, spread)
    # The plain quotient, within two units in the last place: a rounded one spills registers where
    # every state is kept and the gradient has another type.
    ratio = d / ((spread if OPTIONS[2] else sqrt(spread)) + eps)
    if OPTIONS[1]:
        buffer = momentum * states[2 if OPTIONS[0] else 1] + gain * ratio
        return p - lr * buffer, new_states + (buffer,)
    else:
        return p - gained_lr * ratio, new_states


def twin(
    p: Tensor,
    inputs: tuple[Tensor, ...],
    states: tuple[Tensor, ...],
    coefficients: tuple[Any, ...],
    options: tuple[bool, ...],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """State the update in PyTorch."""
    sign, coupled_decay, alpha, one_minus_alpha, eps, gain, momentum, lr, gained_lr = coefficients
    d = T.add_if(T.scale(inputs[0], sign), p, coupled_decay)
    square_avg = T.addcmul_(T.scale_(states[0], alpha), d, d, one_minus_alpha)
    scalars = (one_minus_alpha, eps, gain, momentum, lr, gained_lr)
    return apply_moments_twin(p, d, (square_avg, *states[1:]), scalars, options)


def apply_moments_twin(
    p: Tensor,
    d: Tensor,
    states: tuple[Tensor, ...],
    scalars: tuple[Any, ...],
    options: tuple[bool, ...],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Move the parameter by the new second moment."""
    one_minus_alpha, eps, gain, momentum, lr, gained_lr = scalars
    centered, has_momentum, variance = options
    spread = states[0]
    if centered:
        grad_avg = T.lerp_(states[1], d, one_minus_alpha)
        spread = torch.addcmul(spread, grad_avg, grad_avg, value=-1).clamp_(min=0)
    denominator = T.shift_(spread.clone() if variance else spread.sqrt(), eps)
    if not has_momentum:
        return T.addcdiv_(p, d, denominator, -gained_lr), states
    buffer = T.addcdiv_(T.scale_(states[-1], momentum), d, denominator, gain)
    return T.add_(p, buffer, -lr), states


def states(group: Group) -> tuple[str, ...]:
    """State names in torch's spelling."""
    names: tuple[str, ...] = ("square_avg",)
    if group["centered"]:
        names += ("grad_avg",)
    if group["momentum"] > 0:
        names += ("momentum_buffer",)
    return names


def differing(group: Group) -> tuple[str, ...]:
    """Name the states whose difference the update takes the root of."""
    return ("square_avg", "grad_avg") if group["centered"] else ()


_DEFAULTS = {
    "lr": 0.03, "alpha": 0.9, "eps": 1e-6, "weight_decay": 0.0, "momentum": 0.0,
    "centered": False, "maximize": False, "bias_correction": False, "denominator": "std",
}  # fmt: skip

RMSPROP = Rule(
    name="RMSprop",
    update=update,
    twin=twin,
    coefficients=coefficients,
    states=states,
    options=lambda group: (
        bool(group["centered"]),
        group["momentum"] > 0,
        group["denominator"] == "variance",
    ),
    option_names=("centered", "momentum", "variance"),
    hyper=("lr", "alpha", "eps", "weight_decay", "momentum"),
    coefficient_names=COEFFICIENTS,
    nonnegative=NONNEGATIVE,
    differing=differing,
    example_groups=(
        _DEFAULTS,
        {**_DEFAULTS, "centered": True, "weight_decay": 0.1},
        {**_DEFAULTS, "momentum": 0.9, "maximize": True},
        {**_DEFAULTS, "centered": True, "momentum": 0.9},
        {**_DEFAULTS, "bias_correction": True, "weight_decay": 0.1},
        {
            **_DEFAULTS,
            "denominator": "variance",
            "momentum": 0.9,
            "bias_correction": True,
            "lr": 0.3,
        },
        {**_DEFAULTS, "denominator": "variance", "centered": True, "lr": 0.3},
    ),
)
