"""A step at lr 0 with gradients of 0, as distributed checkpoint makes states: no bit changes."""

from __future__ import annotations

from typing import Any

import patterns
import pytest
import torch
from format_cases import PARAMETERS, raw
from marks import both_backends, numpy_may_warn
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import fusedopt

RULES = {
    "AdamW": {"weight_decay": 0.1}, "Adam": {"amsgrad": True},
    "RMSprop": {"momentum": 0.9}, "SGD": {"momentum": 0.9},
}  # fmt: skip


def stepped(p: Tensor, rule: str, lr: Any, formats: dict[str, Any], backend: str) -> Tensor:
    parameter = torch.nn.Parameter(p.clone())
    # AMSGrad refuses codes for what it keeps the largest of.
    types = {"exp_avg": "int8"} if "amsgrad" in RULES[rule] else "int8"
    optimizer = getattr(fusedopt, rule)(
        [parameter], lr=lr, backend=backend, state_dtype=types, **RULES[rule], **formats
    )
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("parameter", PARAMETERS)
def test_every_value_of_16_bits(parameter: str, rule: str) -> None:
    # Catches -0 that becomes 0, subnormal numbers that are flushed, the largest values, whose
    # master has no room above, and a nan that becomes a number.
    dtype, formats = PARAMETERS[parameter]
    p = patterns.special() if dtype == torch.float32 else patterns.every_narrow(dtype)
    back = stepped(p, rule, 0.0, formats, "reference")
    number = p.isfinite()
    assert torch.equal(raw(back)[number], raw(p)[number])
    assert torch.equal(back.isnan() | back.isinf(), ~number)


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
@pytest.mark.parametrize("parameter", PARAMETERS)
@both_backends
@numpy_may_warn
def test_some_values_in_both(backend: str, parameter: str, lr: Any) -> None:
    dtype, formats = PARAMETERS[parameter]
    tiny, top = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    p = torch.tensor([0.0, -0.0, 1.0, -1.5, tiny, -tiny / 4, top, -top, 0.1], dtype=dtype)
    back = stepped(p, "AdamW", lr, formats, backend)
    assert torch.equal(raw(back), raw(p))


@pytest.mark.parametrize("parameter", [name for name in PARAMETERS if name != "float32"])
def test_the_step_that_makes_states_counts_nothing(parameter: str) -> None:
    # Catches a first step whose bias corrections, random bits and thresholds are the second's.
    dtype, formats = PARAMETERS[parameter]
    model = torch.nn.Linear(40, 5).to(dtype)
    other = torch.nn.Linear(40, 5).to(dtype)
    other.load_state_dict(model.state_dict())
    pair = [
        fusedopt.AdamW(m.parameters(), lr=0.1, state_dtype="int8", backend="reference", **formats)
        for m in (model, other)
    ]
    before = [raw(p).clone() for p in model.parameters()]
    get_optimizer_state_dict(model, pair[0])
    assert all(torch.equal(raw(p), q) for p, q in zip(model.parameters(), before, strict=True))
    for m, optimizer in zip((model, other), pair, strict=True):
        for p in m.parameters():
            p.grad = torch.linspace(-1, 1, p.numel()).reshape(p.shape).to(dtype)
        optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(raw(p), raw(q)) and pair[0].state[p]["step"] == 1
        for name, value in pair[0].state[p].items():
            assert torch.equal(raw(value), raw(pair[1].state[q][name])), name
