"""How far the results of a rule move where what it reads moves by a rounding.

A kernel and its twin round apart: in another order, and compiled code contracts products and sums.
Nearly everywhere that shows in the last places of what is stored. Not where terms cancel, of which
the last places are all that is left, and not where the update jumps: a sign, or a decay that
depends on one, of a sum that is zero but for its rounding. No bound in ulps holds there. What the
rule itself makes of operands that are a rounding away shows which elements these are, and how far
they may lie apart. Rules state nothing for it, and a rule of one's own need not.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .kernels.rule import Rule

# Epsilons that an operand is moved by. An update takes up to six roundings of half an epsilon, each
# of a term no larger than what it was made of, and a quotient of compiled code is within two units.
# Four of every operand are more than all of it; contraction leaves roundings out, and adds none.
EPSILONS = 4


def reach(
    rule: Rule,
    group: Mapping[str, Any],
    step: int,
    operands: Sequence[Tensor],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Return how far each result moves, elementwise and in float64.

    Every operand is moved up and down, in every combination. A sum moves furthest at one of these
    ends, and has either sign at some of them where its sign is rounding.

    Args:
        rule: whose twin is run.
        group: its hyper-parameters.
        step: the step that the coefficients read.
        operands: parameter, inputs and states before the step, ``[n]`` each, of the type that
            arithmetic is done in.
        dtype: the type that results are stored in.

    Returns:
        For parameter and states, the largest distance of a result from that where nothing moves;
        nan where one is nan.
    """
    shift = EPSILONS * torch.finfo(operands[0].dtype).eps
    # The first is where all stay. What is exactly zero stays, too: its sign is no rounding.
    signs = [(0,) * len(operands), *itertools.product((-1, 1), repeat=len(operands))]
    moved = [
        torch.stack([x * (1 + sign[i] * shift) for sign in signs]) for i, x in enumerate(operands)
    ]
    n = 1 + len(rule.degrees)
    p, inputs, states = moved[0], tuple(moved[1:n]), tuple(moved[n:])
    p, new = rule.twin(p, inputs, states, rule.coefficients(group, step), rule.options(group))
    stored = [value.to(dtype).double() for value in (p, *new)]
    return [(value - value[0]).abs().amax(0) for value in stored]
