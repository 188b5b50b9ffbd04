"""``scaling.rescale_`` in the middle of a run of states in few bytes: as of float32 states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from format_cases import params_of
from formats_by_hand import joined, read
from torch import Tensor

import fusedopt
from fusedopt import scaling

RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (fusedopt.AdamW, {}),
    "amsgrad": (fusedopt.AdamW, {"amsgrad": True}),
    "SGD": (fusedopt.SGD, {"momentum": 0.9}),
    "velocity": (fusedopt.SGD, {"momentum": 0.9, "momentum_form": "velocity"}),
    "RMSprop": (fusedopt.RMSprop, {"momentum": 0.5}),
}
FORMATS = {
    "int8": {"state_dtype": "int8"}, "fp8": {"state_dtype": "fp8"},
    "remainder": {"master": "remainder", "state_dtype": torch.float32},
    "kahan": {"rounding": "kahan", "state_dtype": torch.float32},
    "stochastic": {"rounding": "stochastic", "state_dtype": "int8"},
}  # fmt: skip


def started(rule: str, **formats: Any) -> Any:
    cls, hyper = RULES[rule]
    if rule == "amsgrad" and isinstance(formats.get("state_dtype"), str):
        formats["state_dtype"] = {"exp_avg": formats["state_dtype"]}
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n, generator=generator).bfloat16()) for n in (150, 3)]
    # Two formats: an error at the second must not leave the first changed.
    groups = [{"params": params[:1]}, {"params": params[1:], **formats}]
    optimizer = cls(groups, lr=0.1, backend="reference", **hyper)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
        optimizer.step()
    return optimizer


def values(optimizer: Any) -> dict[str, Tensor]:
    p = params_of(optimizer)[1]
    state = optimizer.state[p]
    names = [n for n in state if n.endswith(("avg", "sq", "buffer"))]
    return {"p": joined(p, state), **{name: read(state, name) for name in names}}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("by", ["linear", "sqrt"])
def test_states_follow_the_batch(by: str, rule: str, name: str) -> None:
    # Catches codes that are multiplied, or an error halfway, and a master that is refused.
    optimizer = started(rule, **FORMATS[name])
    before, steps = values(optimizer), optimizer.state[params_of(optimizer)[1]].get("step")
    steps = None if steps is None else float(steps)
    plain = started(rule, state_dtype=torch.float32)
    first = values(plain)
    scaling.rescale_(plain, from_batch=32, to_batch=64, rule=by)
    factors = {key: (value.norm() / first[key].norm()) for key, value in values(plain).items()}
    scaling.rescale_(optimizer, from_batch=32, to_batch=64, rule=by)
    for key, value in values(optimizer).items():
        expected = before[key] * factors[key]
        assert ((value - expected).abs() <= 1e-6 * expected.abs()).all(), key
    if steps is not None and by == "sqrt":
        assert optimizer.state[params_of(optimizer)[1]]["step"] == steps / 2
    for p in params_of(optimizer):
        p.grad = torch.ones_like(p)
    optimizer.step()
