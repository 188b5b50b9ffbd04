"""Second moments in float16, which has nothing below 6e-8: what is above zero stays there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from marks import both_backends

import fusedopt

FLOAT16 = torch.float16
TINY = 2.0**-24


def stepped(backend: str, *gradients: float, **options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = fusedopt.AdamW([p], lr=1e-3, weight_decay=0.0, backend=backend, **options)
    for g in gradients:
        p.grad = torch.tensor([g, 0.0, 1.0])
        optimizer.step()
    return p.detach(), optimizer.state[p]


@both_backends
@pytest.mark.parametrize("types", [FLOAT16, {"exp_avg_sq": FLOAT16}], ids=["both", "one"])
def test_no_step_of_thousands(backend: str, types: Any) -> None:
    # Catches a v of 1e-11 that becomes 0: eps was the denominator, and the next update 2800 times
    # too long.
    p, state = stepped(backend, 1e-4, 0.0, state_dtype=types)
    exact, _ = stepped(backend, 1e-4, 0.0)
    assert state["exp_avg_sq"].dtype == FLOAT16
    assert state["exp_avg_sq"][0] == TINY and state["exp_avg_sq"][1] == 0
    assert (p.abs() <= exact.abs() * 1.001).all()
    # What is large enough is as near as the type is.
    torch.testing.assert_close(p[2], exact[2], rtol=2e-3, atol=0)


def test_what_is_not_finite_stays_so() -> None:
    # Catches a maximum that takes a nan for the smallest number.
    _, state = stepped("reference", torch.nan, state_dtype=FLOAT16)
    assert state["exp_avg_sq"].isnan().tolist() == [True, False, False]


def test_states_that_are_converted() -> None:
    # Catches a checkpoint whose small v is flushed on the way in.
    p = torch.nn.Parameter(torch.ones(2))
    source = torch.optim.AdamW([p])
    p.grad = torch.tensor([1e-4, 0.0])
    source.step()
    kept = fusedopt.AdamW([p], state_dtype=FLOAT16)
    kept.load_state_dict(source.state_dict())
    assert kept.state[p]["exp_avg_sq"].tolist() == [TINY, 0.0]


def test_torchs_own_is_torchs() -> None:
    # Catches a floor where nobody asked for a type: there, states are torch's to the bit.
    runs = []
    for cls in (torch.optim.AdamW, fusedopt.AdamW):
        p = torch.nn.Parameter(torch.zeros(1, dtype=FLOAT16))
        optimizer = cls([p])
        p.grad = torch.full((1,), 1e-4, dtype=FLOAT16)
        optimizer.step()
        runs.append(optimizer.state[p]["exp_avg_sq"].item())
    assert runs == [0.0, 0.0]
