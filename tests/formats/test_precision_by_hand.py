"""Each format of each optimizer against the update's formula in float64, step by step.

Bounds are those of the format's bits: half a unit of a float, a unit where it is rounded by chance,
2^-16 of a master of 24 bits, nothing but float32 arithmetic of exact ones, and of codes the two
that lie next to a value. Catches a wrong scale, group, sign or type of a code, a state that
passes through the parameter's type, a rule that sees the rounded instead of the master, an update
formed of what was already rounded, and a step that stores nothing.
"""

from __future__ import annotations

import pytest
import torch
from format_cases import PARAMETERS, RULES, STATE_DTYPES, states_for
from lockstep import Lockstep
from marks import both_backends

# Rows of 150: groups of 128 and of 22.
SHAPE = (2, 150)


def gradients(steps: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Of magnitudes over four decades, as a network's; large, then small."""
    generator = torch.Generator().manual_seed(5)
    size = torch.logspace(-2, 0, SHAPE[1], dtype=torch.float64)
    drawn = [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(steps)]
    return [(size * g * (1.0 if i < 4 else 0.1)).to(dtype) for i, g in enumerate(drawn)]


def run(rule: str, states: str, parameter: str, backend: str, steps: int) -> Lockstep:
    name, hyper = RULES[rule]
    dtype, formats = PARAMETERS[parameter]
    formats = {**formats, "state_dtype": states_for(states, rule)}
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)).to(dtype)
    pair = Lockstep(name, start, formats, hyper, backend=backend)
    for g in gradients(steps, dtype):
        pair.step(g)
    return pair


def states_of(rule: str, parameter: str, more: int = 0) -> str:
    """One format of the states for each, so that a rule meets all of them over the parameters."""
    place = list(RULES).index(rule) + list(PARAMETERS).index(parameter) + more
    return list(STATE_DTYPES)[place % len(STATE_DTYPES)]


@pytest.mark.parametrize("parameter", PARAMETERS)
@pytest.mark.parametrize("more", range(0, 6, 2))
@pytest.mark.parametrize("rule", RULES)
def test_reference(rule: str, more: int, parameter: str) -> None:
    states = states_of(rule, parameter, more)
    pair = run(rule, states, parameter, "reference", 6)
    # Standing still, or a wrong direction, is a drift of 1 and of 2.
    assert pair.drift() < 0.2


@pytest.mark.parametrize("parameter", PARAMETERS)
@pytest.mark.parametrize("rule", RULES)
def test_kernel(rule: str, parameter: str) -> None:
    run(rule, states_of(rule, parameter, 1), parameter, "triton", 3)


@pytest.mark.parametrize("states", STATE_DTYPES)
@both_backends
def test_every_format_of_states_in_both(states: str, backend: str) -> None:
    run("amsgrad", states, "bf16-remainder", backend, 3)
