"""Schedule-free AdamW: an average of the iterates in the place of a schedule and of momentum.

    y = (1 - beta1) z + beta1 x           where gradients are taken: what the parameter holds
    v = beta2 v + (1 - beta2) g^2
    lr_t = lr min(1, t / W)               a warm-up of W steps
    u = lr_t g / (sqrt(v / (1 - beta2^t)) + eps) + lr_t wd y
    z = z - u
    c = lr_t^2 / (lr_1^2 + ... + lr_t^2)
    x = (1 - c) x + c z                   the average: what is evaluated

Defazio et al., arXiv 2405.15682, algorithm 1. Kept is D = z - x, which starts at 0, and y:

    D' = (1 - c) (D - u),   y' = y - u + beta1 (D - D'),   x = y - (1 - beta1) D

c is worked out from t alone: lr weighs the steps of the warm-up, and cancels where it is constant.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import torch_ops as T
from ..lang import divide, jit, sqrt, tl, where
from ..rule import Group, Rule, Scalar

COEFFICIENTS = (
    "lr", "decay", "beta1", "one_minus_c", "beta2", "one_minus_beta2", "root_bias", "eps",
)  # fmt: skip


def coefficients(group: Group, step: Scalar) -> tuple[Scalar, ...]:
    """Return the scalars that ``COEFFICIENTS`` names."""
    # Not branches: on the path that a CUDA graph captures, these live on the device.
    warmup = group["warmup_steps"] + (1.0 - 1.0 * (group["warmup_steps"] > 0))
    early = 1.0 * (warmup > step)
    factor = early * (step / warmup) + (1.0 - early)
    t = early * step + (1.0 - early) * warmup
    # Of squares of t / W up to t, or to W and as many ones as steps came after.
    total = t * (t + 1) * (2 * t + 1) / (6 * warmup**2) + (1.0 - early) * (step - warmup)
    (beta1, beta2), lr = group["betas"], group["lr"] * factor
    root_bias = (1 - beta2**step) ** 0.5
    decay, c = lr * group["weight_decay"], factor**2 / total
    return lr, decay, beta1, 1 - c, beta2, 1 - beta2, root_bias, group["eps"]


@jit
def update(p, inputs, states, coefficients, OPTIONS: tl.constexpr):
    """Update one block; there are no options."""
    lr, decay, beta1, one_minus_c, beta2, one_minus_beta2, root_bias, eps = coefficients
    exp_avg_sq = beta2 * states[0] + one_minus_beta2 * inputs[0] * inputs[0]
    u = lr * divide(inputs[0], sqrt(exp_avg_sq) / root_bias + eps)
    u = where(decay != 0.0, u + decay * p, u)
    ahead = one_minus_c * (states[1] - u)
    return p - u + beta1 * (states[1] - ahead), (exp_avg_sq, ahead)


def twin(
    p: Tensor, inputs: tuple[Tensor, ...], states: tuple[Tensor, ...], coefficients: Any, _: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """State the update in PyTorch."""
    lr, decay, beta1, one_minus_c, beta2, one_minus_beta2, root_bias, eps = coefficients
    g = inputs[0]
    exp_avg_sq = T.addcmul_(T.scale_(states[0], beta2), g, g, one_minus_beta2)
    denominator = T.shift_(T.divide_(exp_avg_sq.sqrt(), root_bias), eps)
    u = T.add_if(T.scale_(g / denominator, lr), p, decay)
    ahead = T.scale_(states[1] - u, one_minus_c)
    return T.add_(p.sub_(u), states[1] - ahead, beta1), (exp_avg_sq, ahead)


_DEFAULTS = {
    "lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.0, "warmup_steps": 0,
}  # fmt: skip

SCHEDULE_FREE_ADAMW = Rule(
    name="ScheduleFreeAdamW",
    update=update,
    twin=twin,
    coefficients=coefficients,
    states=lambda group: ("exp_avg_sq", "z_minus_x"),
    hyper=("lr", "betas", "eps", "weight_decay", "warmup_steps"),
    coefficient_names=COEFFICIENTS,
    nonnegative=("exp_avg_sq",),
    summing=("z_minus_x",),
    example_groups=(_DEFAULTS, {**_DEFAULTS, "weight_decay": 0.3, "warmup_steps": 2}),
)
