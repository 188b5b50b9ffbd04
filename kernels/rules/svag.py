"""SGD, RMSprop and Adam with the gradient oracle of SVAG.

    g = r1 g1 + r2 g2

and then the algorithm of ``sgd.py``, ``rmsprop.py`` or ``adam.py`` with g for the gradient. g1 and
g2 are gradients of independent batches. r1 + r2 = 1 leaves the mean as it is, r1^2 + r2^2 is what
the noise's covariance is multiplied by: see ``fusedopt.SVAG``.

Li, Malladi and Arora, arXiv 2102.12470 (SGD); Malladi et al., arXiv 2205.10287 (Adam, RMSprop).

The inputs are g2, which is the gradient of the last backward pass, and g1, which was held before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import torch_ops as T
from ..lang import jit, tl, where
from ..rule import Group, Rule, Scalar
from .adam import ADAM
from .adam import update as step_adam
from .rmsprop import RMSPROP
from .rmsprop import update as step_rmsprop
from .sgd import SGD
from .sgd import update as step_sgd

FACTORS = ("last_weight", "held_weight")


@jit
def mix(inputs, coefficients):
    """Form the gradient of which the noise has another size."""
    gradient = coefficients[1] * inputs[1]
    # Not a product with zero: what has no weight may be infinite.
    return where(coefficients[0] != 0.0, gradient + coefficients[0] * inputs[0], gradient)


@jit
def sgd_update(p, inputs, states, coefficients, OPTIONS: tl.constexpr):
    """Update one block; OPTIONS are those of SGD."""
    return step_sgd(p, (mix(inputs, coefficients),), states, coefficients[2:], OPTIONS)


@jit
def rmsprop_update(p, inputs, states, coefficients, OPTIONS: tl.constexpr):
    """Update one block; OPTIONS are those of RMSprop."""
    return step_rmsprop(p, (mix(inputs, coefficients),), states, coefficients[2:], OPTIONS)


@jit
def adam_update(p, inputs, states, coefficients, OPTIONS: tl.constexpr):
    """Update one block; OPTIONS are those of Adam."""
    return step_adam(p, (mix(inputs, coefficients),), states, coefficients[2:], OPTIONS)


def _coefficients(rule: Rule) -> Callable[[Group, Scalar], tuple[Scalar, ...]]:
    """The weights of both gradients, and the rule's own."""

    def coefficients(group: Group, step: Scalar) -> tuple[Scalar, ...]:
        return group["last_weight"], group["held_weight"], *rule.coefficients(group, step)

    return coefficients


def _twin(rule: Rule) -> Callable[..., tuple[Tensor, tuple[Tensor, ...]]]:
    """State the update in PyTorch."""

    def twin(
        p: Tensor,
        inputs: tuple[Tensor, ...],
        states: tuple[Tensor, ...],
        coefficients: tuple[Any, ...],
        options: tuple[bool, ...],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        last, held, *rest = coefficients
        gradient = T.add_if(T.scale(inputs[1], held), inputs[0], last)
        return rule.twin(p, (gradient,), states, tuple(rest), options)

    return twin


# Those of two times the noise, r1 and r2 = (1 +- sqrt(2 * 2^2 - 1)) / 2, and of the noise as it is.
_DOUBLE = {"last_weight": (1 - 7**0.5) / 2, "held_weight": (1 + 7**0.5) / 2}
_SAME = {"last_weight": 0.0, "held_weight": 1.0}


def _rule(rule: Rule, update: Any) -> Rule:
    return Rule(
        name=f"SVAG {rule.name}",
        update=update,
        twin=_twin(rule),
        coefficients=_coefficients(rule),
        states=rule.states,
        options=rule.options,
        option_names=rule.option_names,
        hyper=rule.hyper,
        factors=FACTORS,
        degrees=(1, 1),
        counts_steps=rule.counts_steps,
        coefficient_names=(*FACTORS, *rule.coefficient_names),
        nonnegative=rule.nonnegative,
        differing=rule.differing,
        peaking=rule.peaking,
        example_groups=tuple(
            {**group, **(_SAME if i == 1 else _DOUBLE)}
            for i, group in enumerate(rule.example_groups)
        ),
    )


SVAG_SGD = _rule(SGD, sgd_update)
SVAG_RMSPROP = _rule(RMSPROP, rmsprop_update)
SVAG_ADAM = _rule(ADAM, adam_update)
# By the names of the rules that take one gradient.
PAIRED = {SGD.name: SVAG_SGD, RMSPROP.name: SVAG_RMSPROP, ADAM.name: SVAG_ADAM}
