"""dion's AdamW and Lion groups updated by fusedopt: under its calls, and under dion where it is."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from dion_calls import Muon
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt.examples.dion_scalars import FusedScalars


def _eager(function: Any = None, **_: Any) -> Any:
    return function or _eager


@pytest.fixture(params=["its calls", "dion"])
def theirs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "its calls":
        return Muon
    # Its formulas are compiled where they are defined, which takes a compiler, and a minute.
    monkeypatch.setattr(torch, "compile", _eager)
    return pytest.importorskip("dion").Muon


def _made(cls: Any, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, list[Any]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 4), (9, 4), (5,), (6, 4), (3,)]
    params = [Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    groups = [
        {"params": params[:1]},
        {"params": params[1:3], "algorithm": "adamw", "lr": 0.03, "weight_decay": 0.2},
        {"params": params[3:4], "algorithm": "lion", "lr": 0.02, "weight_decay": 0.1},
        {"params": params[4:], "algorithm": "adamw", "lr": 0.05, "beta1": 0.5, "weight_decay": 0.0},
    ]
    return cls(groups, lr=0.02, **options), params


def _train(optimizer: Any, params: list[Any], steps: range, lr: float | None = None) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        # One without a gradient, at one step.
        params[2].grad = None if step == 1 else params[2].grad
        if lr is not None:
            optimizer.param_groups[1]["lr"] = lr / (step + 1)
            optimizer.param_groups[1]["weight_decay"] = 0.5 * step
            optimizer.param_groups[2]["beta1"] = 0.9 - 0.1 * step
        optimizer.step()


def _fused(theirs: Any, **more: Any) -> Any:
    return type("Fused", (FusedScalars, theirs), {"scalar_options": more})


def _everything(optimizer: Any, params: list[Any]) -> list[Tensor]:
    states = [x for p in params for _, x in sorted(optimizer.state[p].items())]
    return [x.detach().clone() for x in [*params, *states] if isinstance(x, Tensor)]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_same_steps_in_the_same_states(theirs: Any, backend: str) -> None:
    # Catches betas, eps or decay of another group, a step count that stands still or is counted
    # twice, lr as it was at construction, and states that a checkpoint of dion's would lack.
    found = []
    for cls in (theirs, _fused(theirs, backend=backend)):
        optimizer, params = _made(cls)
        _train(optimizer, params, range(4), lr=0.1)
        assert [float(optimizer.state[p]["step_dev"]) for p in params[1:3]] == [4.0, 3.0]
        found.append(_everything(optimizer, params))
    torch.testing.assert_close(found[1], found[0], rtol=2e-6, atol=1e-6)


def test_checkpoints_are_dions(theirs: Any) -> None:
    # Catches states that go on in tensors which a checkpoint has replaced.
    cls = _fused(theirs)
    optimizer, params = _made(cls)
    _train(optimizer, params, range(2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other, others = _made(cls)
    _train(other, others, range(7, 9))
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    other.load_state_dict(torch.load(file, weights_only=True))
    plain, plains = _made(theirs)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for p, q in zip(plains, params, strict=True):
            p.copy_(q)
    for one, own in ((optimizer, params), (other, others), (plain, plains)):
        _train(one, own, range(2, 4))
    torch.testing.assert_close(
        _everything(other, others), _everything(optimizer, params), rtol=0, atol=0
    )
    torch.testing.assert_close(
        _everything(plain, plains), _everything(optimizer, params), rtol=2e-6, atol=1e-6
    )


def test_clipping_and_bfloat16(theirs: Any) -> None:
    # Catches a bound that is not handed on: a first step is g / (|g| + eps), far below 1 where
    # gradients are clipped to a norm far below eps.
    found = []
    for clip in (None, fusedopt.GlobalNorm(1e-4)):
        optimizer, params = _made(_fused(theirs, clip=clip), torch.bfloat16, epsilon=1.0)
        before = params[1].detach().clone()
        _train(optimizer, params, range(1))
        found.append((params[1].detach() - before).abs().max().item())
    assert found[0] > 0.015 and found[1] < 0.5 * found[0]


def test_what_dion_would_not_save_is_refused(theirs: Any) -> None:
    # Catches a master, or codes, that a checkpoint of dion's loses in silence.
    optimizer, params = _made(_fused(theirs, master="remainder"), torch.bfloat16)
    with pytest.raises(ValueError, match="'master', which dion keeps no state for"):
        _train(optimizer, params, range(1))


def test_cautious_decay_is_refused_by_name(theirs: Any) -> None:
    optimizer, params = _made(_fused(theirs), cautious_wd=True)
    with pytest.raises(ValueError, match="cautious_wd is not an option of fusedopt"):
        _train(optimizer, params, range(1))
