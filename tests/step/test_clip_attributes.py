"""Clipping that is changed between steps: what the constructor refuses, an assignment does."""

from __future__ import annotations

import copy
import fractions
import math
import pickle
from typing import Any

import pytest
import torch
from contract import assert_unchanged, snapshot

import fusedopt
from fusedopt import GlobalNorm

REFUSED: list[tuple[str, Any, type[Exception]]] = [
    *(("max_norm", value, ValueError) for value in (0, -1.0, math.nan, -math.inf, 10**400)),
    *(("max_norm", value, TypeError) for value in ("1", b"1", None, True, [1.0], 1j)),
    ("max_norm", torch.tensor(1.0), TypeError),
    *(("norm_type", value, ValueError) for value in (1, 0, 3.0, math.nan, -math.inf, True)),
    *(("norm_type", value, TypeError) for value in (None, "two", [2], torch.ones(2))),
]


def _arguments(name: str, value: Any) -> dict[str, Any]:
    return {"max_norm": 0.5, name: value}


def _made(clip: Any) -> torch.optim.Optimizer:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.full_like(p, 2.0)
    return fusedopt.SGD([p], lr=1.0, clip=clip)


@pytest.mark.parametrize(
    ("name", "value", "error"), REFUSED, ids=[f"{n}-{str(v)[:20]}" for n, v, _ in REFUSED]
)
def test_an_assignment_is_checked_as_the_constructor_does(
    name: str, value: Any, error: type[Exception]
) -> None:
    # Catches a step uphill, parameters of nan, another norm's bound, and errors that name nothing.
    with pytest.raises(error, match=name):
        GlobalNorm(**_arguments(name, value))
    clip = GlobalNorm(0.5)
    optimizer = _made(clip)
    kept = clip.config()
    with pytest.raises(error, match=name):
        setattr(clip, name, value)
    assert clip.config() == kept
    optimizer.step()
    assert optimizer.param_groups[0]["params"][0].norm() < math.sqrt(3)


@pytest.mark.parametrize("value", [2, 0.25, math.inf, fractions.Fraction(1, 4)])
def test_an_assignment_counts_from_the_next_step_on(value: Any) -> None:
    # Catches a bound that is kept in another place than the one that the step reads.
    clip = GlobalNorm(0.5)
    optimizer = _made(clip)
    optimizer.step()
    p = optimizer.param_groups[0]["params"][0]
    before = p.detach().clone()
    clip.max_norm = value
    assert clip.max_norm == float(value) and type(clip.max_norm) is float
    optimizer.step()
    moved = min(float(value), math.sqrt(12))
    torch.testing.assert_close((p - before).norm().item(), moved, rtol=1e-5, atol=0)


def test_the_other_attributes_count_from_the_next_step_on() -> None:
    clip = GlobalNorm(0.5)
    optimizer = _made(clip)
    optimizer.step()
    clip.norm_type = math.inf
    optimizer.step()
    assert clip.last is not None and clip.last == 2.0
    clip.error_if_nonfinite = True
    optimizer.param_groups[0]["params"][0].grad.fill_(math.inf)
    with pytest.raises(RuntimeError, match="inf"):
        optimizer.step()


@pytest.mark.parametrize("clip", [1.0, GlobalNorm, "1", {"max_norm": 1.0}, False])
def test_a_clip_of_an_optimizer_is_one(clip: Any) -> None:
    # Catches a step and a state_dict that fail later, by names of what is inside.
    kept = GlobalNorm(0.5)
    optimizer = _made(kept)
    before = snapshot(optimizer)
    with pytest.raises(TypeError, match=r"clip must be a fusedopt\.GlobalNorm or None"):
        _made(clip)
    with pytest.raises(TypeError, match=r"clip must be a fusedopt\.GlobalNorm or None"):
        optimizer.clip = clip  # type: ignore[attr-defined]
    assert optimizer.clip is kept  # type: ignore[attr-defined]
    assert_unchanged(optimizer, before)
    optimizer.clip = None  # type: ignore[attr-defined]
    optimizer.step()


@pytest.mark.parametrize(
    "copier", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies_keep_what_was_assigned(copier: Any) -> None:
    clip = GlobalNorm(1.0)
    clip.max_norm, clip.norm_type, clip.error_if_nonfinite = 0.25, math.inf, True
    for other in (copier(clip), copier(_made(clip)).clip):
        assert other.config() == clip.config()
        with pytest.raises(ValueError, match="max_norm"):
            other.max_norm = -1.0


def test_states_of_pickles_made_before() -> None:
    # Catches attributes that such a pickle puts where nothing reads them.
    clip = GlobalNorm.__new__(GlobalNorm)
    old = {"max_norm": 0.25, "norm_type": math.inf, "error_if_nonfinite": True, "last": None}
    clip.__setstate__(dict(old))
    assert clip.config() == GlobalNorm(0.25, norm_type=math.inf, error_if_nonfinite=True).config()
    assert clip.last is None
    optimizer = _made(None)
    state = optimizer.__getstate__()
    assert "clip" in state
    twin = type(optimizer).__new__(type(optimizer))
    twin.__setstate__({**state, "clip": clip})
    assert twin.clip is clip and "clip" not in vars(twin)
