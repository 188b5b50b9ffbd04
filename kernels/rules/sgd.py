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

With cautious weight decay the decay is decoupled, so that the direction is known before it, d = g,
and the step takes the parameter from where ``cautious.py`` leaves it.

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
from .cautious import NAME, is_cautious, shrunk, shrunk_twin

MOMENTUM_FORMS = ("torch", "velocity", "ema")


COEFFICIENTS = ("sign", "decay", "momentum", "new_weight", "nesterov_weight", "lr")


def coefficients(group: Group, step: Scalar) -> tuple[Scalar, ...]:
    """Return the scalars that ``COEFFICIENTS`` names: weights are those of d in buffer and step.

    The decay is that of the gradient, or where it is cautious, of the parameter. The weight in the
    step is that of Nesterov momentum; the learning rate is 1 where the buffer has
    it inside.
    """
    sign = -1.0 if group["maximize"] else 1.0
    lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
    if is_cautious(group):
        decay = decay * lr
    # A buffer at its first step is zero, so weight 1 makes it the gradient, undampened.
    new_weight, nesterov_weight = 1.0 - group["dampening"] * (step > 1), 1.0
    if group["momentum_form"] == "velocity":
        # Without a buffer lr stays outside. Not a branch: momentum may live on the device.
        has_buffer = 1.0 * (momentum**2 > 0)
        new_weight, nesterov_weight, lr = new_weight * lr, lr, has_buffer + (1.0 - has_buffer) * lr
    elif group["momentum_form"] == "ema":
        new_weight = nesterov_weight = 1.0 - momentum
    return sign, decay, momentum, new_weight, nesterov_weight, lr


@jit
def update(p, inputs, states, coefficients, OPTIONS: tl.constexpr):
    """Update one block; OPTIONS is (momentum, nesterov, cautious)."""
    sign, decay, momentum, new_weight, nesterov_weight, lr = coefficients
    d = inputs[0] * sign
    if not OPTIONS[2]:
        d = where(decay != 0.0, d + decay * p, d)
    if OPTIONS[0]:
        buffer = momentum * states[0] + new_weight * d
        d = nesterov_weight * d + momentum * buffer if OPTIONS[1] else buffer
        states = (buffer,)
    if OPTIONS[2]:
        p = shrunk(p, d, 1.0 - decay)
    return p - lr * d, states


def twin(
    p: Tensor,
    inputs: tuple[Tensor, ...],
    states: tuple[Tensor, ...],
    coefficients: tuple[Any, ...],
    options: tuple[bool, ...],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """State the update in PyTorch."""
    sign, decay, momentum, new_weight, nesterov_weight, lr = coefficients
    has_momentum, nesterov, cautious = options
    d = T.scale(inputs[0], sign)
    if not cautious:
        d = T.add_if(d, p, decay)
    if has_momentum:
        buffer = T.add_(T.scale_(states[0], momentum), d, new_weight)
        # A copy: where the weight is 1, d may be the gradient itself.
        d = T.add_(T.scale_(d.clone(), nesterov_weight), buffer, momentum) if nesterov else buffer
    return T.add_(shrunk_twin(p, d, 1 - decay) if cautious else p, d, -lr), states


_DEFAULTS = {
    "lr": 0.3, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0,
    "nesterov": False, "maximize": False, "momentum_form": "torch", NAME: False,
}  # fmt: skip

SGD = Rule(
    name="SGD",
    update=update,
    twin=twin,
    coefficients=coefficients,
    states=lambda group: ("momentum_buffer",) if group["momentum"] != 0 else (),
    options=lambda group: (group["momentum"] != 0, bool(group["nesterov"]), is_cautious(group)),
    option_names=("momentum", "nesterov", "cautious"),
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
        {**_DEFAULTS, "momentum": 0.9, "weight_decay": 0.7, NAME: True},
    ),
)
