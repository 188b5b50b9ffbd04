"""Kernel and reference to the last bit, random bits included, by a rule of exact arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dyadic import DYADIC_LOOPS, Dyadic
from format_cases import PARAMETERS, STATE_DTYPES, assert_same_bits_of, bits_of, params_of
from formats_by_hand import is_code
from lockstep import Lockstep
from marks import both_backends
from torch import Tensor

import fusedopt

SHAPES = ((2, 150), (129,), (), (0, 3))


def give(optimizers: list[Any], step: int, scale: float = 1.0) -> None:
    """Gradients of two bits, some of them 0."""
    generator = torch.Generator().manual_seed(step)
    for params in zip(*map(params_of, optimizers), strict=True):
        g = torch.randint(-3, 4, params[0].shape, generator=generator) * 2.0 ** -(step % 4) * scale
        for p in params:
            p.grad = g.to(p.dtype)


@pytest.mark.parametrize("parameter", PARAMETERS)
@pytest.mark.parametrize("states", ["int8", "fp8"])
def test_kernel_and_reference_are_equal_to_the_bit(states: str, parameter: str) -> None:
    # Catches random bits, thresholds or ties that one of the two has otherwise: another seed,
    # number, index or step, a carry, a scale of another group.
    dtype, formats = PARAMETERS[parameter]
    formats = {**formats, "state_dtype": STATE_DTYPES[states], "rounding_seed": -(1 << 63) + 5}
    start = [torch.randn(s, generator=torch.Generator().manual_seed(1)).to(dtype) for s in SHAPES]
    pair = [
        Dyadic([torch.nn.Parameter(x.clone()) for x in start], backend=backend, **formats)
        for backend in ("reference", "triton")
    ]
    for step in range(3):
        give(pair, step)
        for optimizer in pair:
            optimizer.step()
        assert_same_bits_of(*pair)
    moved = [not torch.equal(p, x) for p, x in zip(params_of(pair[0]), start, strict=True)]
    assert moved == [True, True, True, False]
    for p in params_of(pair[0]):
        assert is_code(pair[0].state[p]["mean"]) and is_code(pair[0].state[p]["size"])


@pytest.mark.parametrize("parameter", PARAMETERS)
@both_backends
def test_a_users_own_rule(parameter: str, backend: str) -> None:
    dtype, formats = PARAMETERS[parameter]
    start = torch.randn(2, 150).to(dtype)
    formats = {**formats, "state_dtype": {"size": "int8", "mean": torch.float32}}
    pair = Lockstep("Dyadic", start, formats, {"lr": 0.125}, DYADIC_LOOPS, Dyadic, backend=backend)
    for step in range(3):
        pair.step(torch.randn(2, 150, generator=torch.Generator().manual_seed(step)).to(dtype))
    assert pair.state["size"].dtype == torch.uint8


def ends(backend: str, **options: Any) -> list[Tensor]:
    """Two parameters after each of three equal steps, from 1 to a quarter of a unit below."""
    params = [torch.nn.Parameter(torch.empty(200).bfloat16()) for _ in range(2)]
    optimizer = fusedopt.SGD(params, lr=1.0, backend=backend, rounding="stochastic", **options)
    found = []
    for _ in range(3):
        for p in params:
            # Memory of its own, for which all is prepared anew: what counts is in the state.
            p.data = torch.ones(200).bfloat16()
            p.grad = torch.full_like(p, 2.0**-10)
        optimizer.step()
        found += [p.detach().clone() for p in params]
    return found


@both_backends
def test_bits_are_of_seed_parameter_and_step(backend: str) -> None:
    # Catches bits that do not depend on one of these, or on anything else.
    first, again, other = ends(backend), ends(backend), ends(backend, rounding_seed=1)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    assert len({tuple(x.tolist()) for x in (*first, *other)}) == 12
    assert all(len(x.unique()) == 2 for x in first)


@both_backends
def test_who_has_no_gradient_has_a_number(backend: str) -> None:
    # Catches numbers among those that take part, which change whenever others do not.
    found = []
    for gradients in ((1, 1), (0, 1)):
        params = [torch.nn.Parameter(torch.ones(200).bfloat16()) for _ in range(2)]
        optimizer = Dyadic(params, backend=backend, rounding="stochastic", state_dtype="int8")
        for p, there in zip(params, gradients, strict=True):
            p.grad = torch.full_like(p, 2.0**-8) if there else None
        optimizer.step()
        found.append(optimizer)
    assert_same_bits_of(bits_of(found[0])[1:], bits_of(found[1])[1:])
    assert (params_of(found[1])[0] == 1).all()


@both_backends
def test_a_seed_of_64_bits_beside_a_step_on_the_device(backend: str) -> None:
    # Catches a seed that is multiplied beyond what can be added to a tensor.
    kept = []
    for capturable in (False, True):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 300).bfloat16())
        p.grad = torch.linspace(1, 2, 300).bfloat16()
        optimizer = fusedopt.AdamW(
            [p], state_dtype="int8", rounding="stochastic", rounding_seed=-(1 << 63) + 12345,
            capturable=capturable, backend=backend,
        )  # fmt: skip
        optimizer.step()
        kept.append((p.detach(), *(optimizer.state[p][n] for n in ("exp_avg", "exp_avg_sq"))))
    for host, device in zip(*kept, strict=True):
        assert torch.equal(host, device)
