"""Stochastic gradient descent with momentum.

    d = g + l2 p                          coupled weight decay
    b = mu b + (1 - dampening) d          the first step takes b = d
    p = p - lr (d + mu b)                 with nesterov, else p - lr b; without momentum p - lr d

The learning rate can stand elsewhere (``momentum_form``), with d and the step as above:

    v = mu v + lr (1 - dampening) d      "velocity": p = p - v, the first step takes v = lr d
    m = mu m + (1 - mu) d                "ema": p = p - lr m, from m = 0

v is lr b and m is (1 - mu) b as long as lr and mu stay what they are. When lr changes, b and m
follow at once and v does within 1 / (1 - mu) steps. Nesterov momentum adds the newest d once more:
lr d + mu v, and lr ((1 - mu) d + mu m).

Polyak 1964; Nesterov momentum in the form of Sutskever et al., ICML 2013, as ``torch.optim.SGD``
states it; velocity of McAllester, TTIC 31230, "SGD with Momentum"; average of Aitchison, EMAT31530
part 6, equations 21a and 21b.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import torch_ops as T
from ..lang import jit, tl, where
from ..rule import Group, Rule, Scalar

MOMENTUM_FORMS = ("torch", "velocity", "ema")


COEFFICIENTS = ("sign", "coupled_decay", "momentum", "new_weight", "nesterov_weight", "lr")


def coefficients(group: Group, step: Scalar) -> tuple[Scalar, ...]:
    """Return the scalars that ``COEFFICIENTS`` names: weights are those of d in buffer and step.

    The weight in the step is that of Nesterov momentum; the learning rate is 1 where the buffer has
    it inside.
    """
    sign = -1.0 if group["maximize"] else 1.0
    lr, momentum = group["lr"], group["momentum"]
    # A buffer at its first step is zero, so weight 1 makes it the gradient, undampened.
    new_weight, nesterov_weight = 1.0 - group["dampening"] * (step > 1), 1.0
    if group["momentum_form"] == "velocity":
        # Without a buffer lr stays outside. Not a branch: momentum may live on the device.
        has_buffer = 1.0 * (momentum**2 > 0)
        new_weight, nesterov_weight, lr = new_weight * lr, lr, has_buffer + (1.0 - has_buffer) * lr
    elif group["momentum_form"] == "ema":
        new_weight = nesterov_weight = 1.0 - momentum
    return sign, group["weight_decay"], momentum, new_weight, nesterov_weight, lr


@jit
def update(p, inputs, states, coefficients, OPTIONS: tl.constexpr):
    """Update one block; OPTIONS is (momentum, nesterov)."""
    sign, coupled_decay, momentum, new_weight, nesterov_weight, lr = coefficients
    d = inputs[0] * sign
    d = where(coupled_decay != 0.0, d + coupled_decay * p, d)
    if OPTIONS[0]:
        buffer = momentum * states[0] + new_weight * d
        d = nesterov_weight * d + momentum * buffer if OPTIONS[1] else buffer
        return p - lr * d, (buffer,)
    else:
        return p - lr * d, states


def twin(
    p: Tensor,
    inputs: tuple[Tensor, ...],
    states: tuple[Tensor, ...],
    coefficients: tuple[Any, ...],
    options: tuple[bool, ...],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """State the update in PyTorch."""
    sign, coupled_decay, momentum, new_weight, nesterov_weight, lr = coefficients
    has_momentum, nesterov = options
    d = T.add_if(T.scale(inputs[0], sign), p, coupled_decay)
    if has_momentum:
        buffer = T.add_(T.scale_(states[0], momentum), d, new_weight)
        # A copy: where the weight is 1, d may be the gradient itself.
        d = T.add_(T.scale_(d.clone(), nesterov_weight), buffer, momentum) if nesterov else buffer
    return T.add_(p, d, -lr), states


_DEFAULTS = {
    "lr": 0.3, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0,
    "nesterov": False, "maximize": False, "momentum_form": "torch",
}  # fmt: skip

SGD = Rule(
    name="SGD",
    update=update,
    twin=twin,
    coefficients=coefficients,
    states=lambda group: ("momentum_buffer",) if group["momentum"] != 0 else (),
    options=lambda group: (group["momentum"] != 0, bool(group["nesterov"])),
    option_names=("momentum", "nesterov"),
    hyper=("lr", "momentum", "dampening", "weight_decay"),
    coefficient_names=COEFFICIENTS,
    counts_steps=False,
    example_groups=(
        _DEFAULTS,
        {**_DEFAULTS, "weight_decay": 0.1, "maximize": True},
        {**_DEFAULTS, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1},
        {**_DEFAULTS, "momentum": 0.9, "nesterov": True},
        {**_DEFAULTS, "momentum": 0.9, "momentum_form": "velocity", "dampening": 0.4},
        {**_DEFAULTS, "momentum": 0.9, "momentum_form": "ema", "nesterov": True},
    ),
)
