"""Adam and RMSprop whose second moment does not depend on the batch size.

    g = mean over samples of g_i             q = mean over samples of g_i^2
    u = (1 - w) g^2 + w q                    w = (N - b) / (b (N - 1))

and then the algorithm of ``adam.py`` or ``rmsprop.py`` with u in the place of g^2. With N samples
and a virtual batch of b, u is the mean over all subsets of b samples of the square of the subset's
mean gradient: b = N is the ordinary algorithm (bit for bit: the second term is left out), b = 1 the
mean of per-sample squares of McAllester (TTIC 31230, "Decoupled Adam"), and between them it is the
expectation of Wang and Aitchison's micro-batch Adam, arXiv 2402.18824, algorithm 1.

The inputs are g, and the sum over samples of the squares of their contributions g_i / N to it,
which is q / N; w and N come with each step: ``fusedopt.statistics.Statistics.factors``.

Where q is measured at every n-th step alone, u is of the last q, and of the step's own w and g. The
input then is q itself, in the unit of g^2, and its degree in the gradient is 0.

Decay never enters q, which would then depend on it. Coupled decay (RMSprop) is part of g alone: its
direction, and its square, which at b = N makes this the ordinary algorithm.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import torch_ops as T
from ..lang import jit, lerp, tl, where
from ..rule import Group, Rule, Scalar
from . import adam, rmsprop
from .adam import apply_moments as apply_to_adam
from .cautious import NAME as CAUTIOUS
from .rmsprop import apply_moments as apply_to_rmsprop

FACTORS = ("mean_weight", "square_weight")
# Weights of the new moments in the average, 1 - beta times those of the batch.
ADAM_COEFFICIENTS = (
    "sign", "shrink", "one_minus_beta1", "beta2", "mean_weight", "square_weight", "root_bias",
    "eps", "step_size",
)  # fmt: skip
RMSPROP_COEFFICIENTS = ("mean_weight", "square_weight", *rmsprop.COEFFICIENTS)


@jit
def second_moment(average, beta, d, squares, mean_weight, square_weight):
    """Average the squared mean gradient and the squares of the samples."""
    average = beta * average + mean_weight * d * d
    # Not a product with zero: what is left out may be infinite.
    return where(square_weight != 0.0, average + square_weight * squares, average)


def second_moment_twin(
    average: Tensor, beta: Any, d: Tensor, squares: Tensor, mean_weight: Any, square_weight: Any
) -> Tensor:
    """Average the squared mean gradient and the squares of the samples."""
    return T.add_if(T.addcmul_(T.scale_(average, beta), d, d, mean_weight), squares, square_weight)


def adam_coefficients(group: Group, step: Scalar) -> tuple[Scalar, ...]:
    """Adam's, with the weights of both moments in the place of 1 - beta2, and no coupled decay."""
    own = dict(zip(adam.COEFFICIENTS, adam.coefficients(group, step), strict=True))
    one_minus_beta2 = own["one_minus_beta2"]
    own["mean_weight"] = one_minus_beta2 * group["mean_weight"]
    own["square_weight"] = one_minus_beta2 * group["square_weight"]
    return tuple(own[name] for name in ADAM_COEFFICIENTS)


@jit
def adam_update(p, inputs, states, coefficients, OPTIONS: tl.constexpr):
    """Update one block; OPTIONS is (amsgrad, cautious)."""
    sign, shrink, one_minus_beta1, beta2 = coefficients[:4]
    mean_weight, square_weight, root_bias, eps, step_size = coefficients[4:]
    d = inputs[0] * sign
    exp_avg = lerp(states[0], d, one_minus_beta1)
    exp_avg_sq = second_moment(states[1], beta2, d, inputs[1], mean_weight, square_weight)
    scalars = (shrink, root_bias, eps, step_size)
    return apply_to_adam(p, exp_avg, exp_avg_sq, states, scalars, OPTIONS)


def adam_twin(
    p: Tensor,
    inputs: tuple[Tensor, ...],
    states: tuple[Tensor, ...],
    coefficients: tuple[Any, ...],
    options: tuple[bool, ...],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """State the update in PyTorch."""
    sign, shrink, one_minus_beta1, beta2 = coefficients[:4]
    mean_weight, square_weight, root_bias, eps, step_size = coefficients[4:]
    d = T.scale(inputs[0], sign)
    exp_avg = T.lerp_(states[0], d, one_minus_beta1)
    exp_avg_sq = second_moment_twin(states[1], beta2, d, inputs[1], mean_weight, square_weight)
    scalars = (shrink, root_bias, eps, step_size)
    return adam.apply_moments_twin(p, (exp_avg, exp_avg_sq, *states[2:]), scalars, options)


def rmsprop_coefficients(group: Group, step: Scalar) -> tuple[Scalar, ...]:
    """The weights of both moments, and RMSprop's."""
    own = rmsprop.coefficients(group, step)
    new = own[rmsprop.COEFFICIENTS.index("one_minus_alpha")]
    return new * group["mean_weight"], new * group["square_weight"], *own


@jit
def rmsprop_update(p, inputs, states, coefficients, OPTIONS: tl.constexpr):
    """Update one block; OPTIONS is (centered, momentum, variance)."""
    mean_weight, square_weight, sign, coupled_decay, alpha, one_minus_alpha = coefficients[:6]
    eps, gain, momentum, lr, gained_lr = coefficients[6:]
    d = inputs[0] * sign
    d = where(coupled_decay != 0.0, d + coupled_decay * p, d)
    square_avg = second_moment(states[0], alpha, d, inputs[1], mean_weight, square_weight)
    scalars = (one_minus_alpha, eps, gain, momentum, lr, gained_lr)
    return apply_to_rmsprop(p, d, square_avg, states, scalars, OPTIONS)


def rmsprop_twin(
    p: Tensor,
    inputs: tuple[Tensor, ...],
    states: tuple[Tensor, ...],
    coefficients: tuple[Any, ...],
    options: tuple[bool, ...],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """State the update in PyTorch."""
    mean_weight, square_weight, sign, coupled_decay, alpha, one_minus_alpha = coefficients[:6]
    eps, gain, momentum, lr, gained_lr = coefficients[6:]
    d = T.add_if(T.scale(inputs[0], sign), p, coupled_decay)
    square_avg = second_moment_twin(states[0], alpha, d, inputs[1], mean_weight, square_weight)
    new_states = (square_avg, *states[1:])
    scalars = (one_minus_alpha, eps, gain, momentum, lr, gained_lr)
    return rmsprop.apply_moments_twin(p, d, new_states, scalars, options)


# Factors of a batch of 4 samples: a virtual batch of 2, of 1, and of all 4.
_PAIRS = {"mean_weight": 2 / 3, "square_weight": 4 / 3}
_SINGLE = {"mean_weight": 0.0, "square_weight": 4.0}
_WHOLE = {"mean_weight": 1.0, "square_weight": 0.0}

_ADAM = {
    "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1, "amsgrad": False,
    "maximize": False, "decoupled_weight_decay": True, "bias_correction": "adam",
    CAUTIOUS: False,
}  # fmt: skip

_RMSPROP = {
    "lr": 0.03, "alpha": 0.9, "eps": 1e-6, "weight_decay": 0.0, "momentum": 0.0,
    "centered": False, "maximize": False, "bias_correction": False, "denominator": "std",
}  # fmt: skip

BATCH_DECOUPLED_ADAM = Rule(
    name="BatchDecoupledAdam",
    update=adam_update,
    twin=adam_twin,
    coefficients=adam_coefficients,
    states=adam.ADAM.states,
    options=adam.ADAM.options,
    option_names=adam.ADAM.option_names,
    hyper=adam.ADAM.hyper,
    factors=FACTORS,
    degrees=(1, 2),
    coefficient_names=ADAM_COEFFICIENTS,
    nonnegative=adam.NONNEGATIVE,
    peaking=adam.peaking,
    example_groups=(
        {**_ADAM, **_PAIRS},
        {**_ADAM, **_SINGLE, "maximize": True},
        {**_ADAM, **_WHOLE, "weight_decay": 0.0},
        {**_ADAM, **_PAIRS, "amsgrad": True, "betas": (0.3, 0.6)},
        {**_ADAM, **_PAIRS, "bias_correction": "running_mean", "betas": (0.2, 0.6)},
        {**_ADAM, **_PAIRS, "weight_decay": 2.0, CAUTIOUS: True},
    ),
)

BATCH_DECOUPLED_RMSPROP = Rule(
    name="BatchDecoupledRMSprop",
    update=rmsprop_update,
    twin=rmsprop_twin,
    coefficients=rmsprop_coefficients,
    states=rmsprop.RMSPROP.states,
    options=rmsprop.RMSPROP.options,
    option_names=rmsprop.RMSPROP.option_names,
    hyper=rmsprop.RMSPROP.hyper,
    factors=FACTORS,
    degrees=(1, 2),
    coefficient_names=RMSPROP_COEFFICIENTS,
    nonnegative=rmsprop.NONNEGATIVE,
    differing=rmsprop.differing,
    example_groups=(
        {**_RMSPROP, **_PAIRS},
        {**_RMSPROP, **_SINGLE, "centered": True, "weight_decay": 0.1},
        {**_RMSPROP, **_WHOLE, "momentum": 0.9, "maximize": True},
        {**_RMSPROP, **_PAIRS, "centered": True, "momentum": 0.9},
        {**_RMSPROP, **_PAIRS, "denominator": "variance", "bias_correction": True, "lr": 1.0},
    ),
)
