"""States and options that a user edits between steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract import (
    ADAM,
    ADAMW,
    RMSPROP,
    SGD,
    Case,
    Pair,
    assert_same_state,
    each_case_on_backends,
    each_class,
    each_class_on_backends,
    groups_of,
    on_backends,
)
from marks import both_backends
from torch.optim import Optimizer

WITH_STEP = (RMSPROP, ADAM, ADAMW)

counting_on_backends = on_backends(WITH_STEP)


def _states(optimizer: Optimizer, place: int = 0) -> dict[str, Any]:
    return optimizer.state[groups_of(optimizer)[place]]


# States


@each_case_on_backends
def test_cleared_state_starts_afresh(case: Case, backend: str) -> None:
    """Of all parameters, of one, and by a new dictionary for one."""
    pair = Pair(case, backend=backend)
    pair.step(2)
    pair.each(lambda o: o.state.clear())
    pair.step(2)
    assert_same_state(pair.ours, pair.theirs)
    pair.each(lambda o: o.state.pop(groups_of(o)[0], None))
    pair.step(2)
    assert_same_state(pair.ours, pair.theirs)
    if pair.ours.state:
        pair.each(lambda o: _states(o).clear())
        pair.step(2)
        assert_same_state(pair.ours, pair.theirs)
        pair.each(lambda o: o.state.__setitem__(groups_of(o)[0], {}))
    pair.step(2)
    pair.check()


@each_case_on_backends
@pytest.mark.parametrize("how", ["replaced", "written", "data"])
def test_edited_states_are_used(case: Case, backend: str, how: str) -> None:
    """Catches addresses of states kept from an earlier step."""
    pair = Pair(case, backend=backend)
    pair.step(2)
    for optimizer in pair.both:
        for p in groups_of(optimizer):
            for key, value in optimizer.state[p].items() if p in optimizer.state else ():
                edited = value.abs() * 0.5 + 0.25
                if key == "step":
                    continue
                if how == "replaced":
                    optimizer.state[p][key] = edited
                elif how == "written":
                    value.copy_(edited)
                else:
                    value.data = edited
    pair.step(3)
    pair.check()


@counting_on_backends
@pytest.mark.parametrize("how", ["fill_", "assign", "share"])
def test_edited_step_counts_are_used(case: Case, backend: str, how: str) -> None:
    """Written in place, assigned, or one tensor assigned to several parameters."""
    pair = Pair(case, backend=backend)
    pair.step(3)
    for optimizer in pair.both:
        shared = torch.tensor(11.0)
        for place in (0, 3):
            if how == "fill_":
                _states(optimizer, place)["step"].fill_(11)
            elif how == "assign":
                _states(optimizer, place)["step"] = torch.tensor(11.0)
            else:
                _states(optimizer, place)["step"] = shared.clone()
    pair.step(3)
    pair.check()
    counts = [_states(pair.ours, place)["step"].item() for place in range(4)]
    assert counts == [14, 6, 6, 14]


@each_class
def test_states_that_a_user_keeps_beside_ours(case: Case) -> None:
    """An entry of another name, there before the first step, neither stops nor confuses it."""
    pair = Pair(case)
    for p in groups_of(pair.ours):
        pair.ours.state[p]["mine"] = "kept"
    pair.step(3)
    for p, q in zip(groups_of(pair.ours), groups_of(pair.theirs), strict=True):
        assert pair.ours.state[p].pop("mine") == "kept"
        assert set(pair.ours.state[p]) == set(pair.theirs.state[q])
    pair.check()


# Options edited between steps

EDITS: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {"lr": 0.01}, {"momentum": 0.5}, {"weight_decay": 0}, {"dampening": 0.6},
        {"maximize": True}, {"dampening": 0, "nesterov": True}, {"nesterov": False},
    ],
    "RMSprop": [
        {"lr": 0.01}, {"alpha": 0.5}, {"weight_decay": 0}, {"eps": 0.1}, {"maximize": True},
    ],
    "Adam": [
        {"lr": 0.01}, {"betas": (0.2, 0.5)}, {"weight_decay": 0}, {"eps": 0.1},
        {"maximize": True}, {"decoupled_weight_decay": True, "weight_decay": 0.5},
    ],
}  # fmt: skip
EDITS["AdamW"] = EDITS["Adam"]


@each_class_on_backends
@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
def test_edited_options_take_effect(case: Case, backend: str, capturable: bool) -> None:
    """In one group of two, so that the other must not follow."""
    pair = Pair(case, groups=({}, {}), backend=backend, shapes=[(9,), ()])
    if capturable:
        pair.ours.param_groups[0]["capturable"] = True
        pair.ours.param_groups[1]["capturable"] = True
    pair.step(2)
    for edit in EDITS[case.name]:
        pair.each(lambda o, edit=edit: o.param_groups[0].update(edit))
        pair.step(2)
        assert_same_state(pair.ours, pair.theirs)
    pair.check()


@both_backends
def test_sgd_momentum_switched_on_off_and_on(backend: str) -> None:
    """torch: a buffer that was there before is resumed, one that was not is the gradient."""
    pair = Pair(SGD, backend=backend, momentum=0)
    for momentum in (0, 0.9, 0, 0.9):
        pair.each(lambda o, m=momentum: o.param_groups[0].update(momentum=m))
        pair.step(2)
        torch.testing.assert_close(groups_of(pair.ours), groups_of(pair.theirs))
    pair.check()


@both_backends
@pytest.mark.parametrize(
    ("case", "option", "value", "key"),
    [
        (ADAM, "amsgrad", True, "max_exp_avg_sq"),
        (ADAMW, "amsgrad", True, "max_exp_avg_sq"),
        (RMSPROP, "momentum", 0.5, "momentum_buffer"),
        (RMSPROP, "centered", True, "grad_avg"),
    ],
    ids=lambda x: x.name if isinstance(x, Case) else str(x),
)
def test_states_switched_on_later_start_at_zero(
    case: Case, option: str, value: Any, key: str, backend: str
) -> None:
    """torch raises KeyError there; given a state of zeros it goes on, and so do we without."""
    pair = Pair(case, backend=backend, shapes=[(5,), (3, 2)])
    pair.step(2)
    pair.each(lambda o: o.param_groups[0].update({option: value}))
    for p in groups_of(pair.theirs):
        pair.theirs.state[p][key] = torch.zeros_like(p)
    pair.step(1 if key == "grad_avg" else 3)
    assert_same_state(pair.ours, pair.theirs)
    pair.each(lambda o: o.param_groups[0].update({option: type(value)(0)}))
    pair.step(2)
    pair.check()


@each_class_on_backends
def test_backend_switched_between_steps(case: Case, backend: str) -> None:
    pair = Pair(case, backend=backend)
    for name in ("reference", "triton", "reference"):
        pair.ours.backend = name
        pair.step(2)
    pair.check()
