"""What SVAG refuses, and that a refusal changes nothing."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from contract import (
    assert_same_bits,
    assert_unchanged,
    groups_of,
    new_params,
    set_gradients,
    snapshot,
)
from svag_by_hand import (
    NAMES,
    OPTIONS,
    Beside,
    draw,
    each_name,
    give,
    hold,
    made,
    on_backends,
    plain,
    stepped,
    svag_step,
)

import fusedopt
from fusedopt import SVAG
from fusedopt.examples.signum import Signum

# What is refused

REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("SGD", {"momentum": 0.9, "momentum_form": "ema"}),
    ("SGD", {"momentum": 0.9, "momentum_form": "velocity"}),
    ("RMSprop", {"momentum": 0.5}),
    ("RMSprop", {"centered": True}),
    ("RMSprop", {"denominator": "variance"}),
    *((name, {"amsgrad": True}) for name in ("Adam", "AdamW")),
    *((name, {"bias_correction": "running_mean"}) for name in ("Adam", "AdamW")),
]


def _two_groups(name: str, second: dict[str, Any], **options: Any) -> Any:
    params = new_params(((3,), (4,)))
    groups = [{"params": params[:1]}, {"params": params[1:], **second}]
    return stepped(name, groups, **options)


def _still_plain(optimizer: Any, before: list[Any]) -> None:
    """Nothing has changed, and the optimizer steps as if SVAG had not been there."""
    assert_unchanged(optimizer, before)
    set_gradients(groups_of(optimizer), 5)
    optimizer.step()
    assert any(not torch.equal(p, q) for p, q in zip(groups_of(optimizer), before[0], strict=True))


@pytest.mark.parametrize(("name", "option"), REFUSED, ids=str)
def test_refused_options(name: str, option: dict[str, Any]) -> None:
    # Catches a check of the first group alone, and one after the first group has been rescaled.
    optimizer = _two_groups(name, option)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=next(iter(option))):
        SVAG(optimizer, 2)
    _still_plain(optimizer, before)


@each_name
def test_clipping_is_refused(name: str) -> None:
    # Catches a mix that is clipped by the norm of one of its gradients.
    optimizer = _two_groups(name, {}, clip=fusedopt.GlobalNorm(1.0))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="clip"):
        SVAG(optimizer, 2)
    _still_plain(optimizer, before)


@each_name
@pytest.mark.parametrize("ell", [0.999, 0.5, 0, -2, math.nan, math.inf, -math.inf])
def test_refused_ell(name: str, ell: float) -> None:
    # Catches the root of a negative number, learning rates of nan or 0, and larger steps.
    optimizer = _two_groups(name, {})
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="ell"):
        SVAG(optimizer, ell)
    _still_plain(optimizer, before)


@pytest.mark.parametrize("ell", ["2", None, [2], 2j, True, torch.tensor(2.0)], ids=str)
def test_ell_is_a_number(ell: Any) -> None:
    # Catches a half-rescaled optimizer.
    optimizer = _two_groups("Adam", {})
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError)):
        SVAG(optimizer, ell)
    _still_plain(optimizer, before)


@pytest.mark.parametrize(("name", "option"), [("Adam", None), ("AdamW", None), ("RMSprop", True)])
def test_other_corrections_are_accepted(name: str, option: Any) -> None:
    # Catches a refusal of every form but the default; rescaling does not depend on it.
    optimizer = plain(name, bias_correction=option)
    SVAG(optimizer, 2)
    assert optimizer.param_groups[0]["bias_correction"] is option
    assert optimizer.param_groups[0]["lr"] == OPTIONS[name]["lr"] / 2


def _others() -> list[Any]:
    params = new_params(((2,),))
    squares = fusedopt.GradSampleSquares
    return [
        *(getattr(torch.optim, name)(params, **OPTIONS[name]) for name in NAMES),
        fusedopt.BatchDecoupledAdam(params, statistics=squares()),
        fusedopt.BatchDecoupledRMSprop(params, statistics=squares()),
        fusedopt.Lion(params),
        Signum(params),
        SVAG(plain("SGD", params), 2),
        None,
    ]


@pytest.mark.parametrize("place", range(9))
def test_other_optimizers(place: int) -> None:
    # Catches hyper-parameters rescaled of what cannot mix gradients.
    other = _others()[place]
    before = snapshot(other) if isinstance(other, torch.optim.Optimizer) else []
    with pytest.raises(TypeError, match="fusedopt"):
        SVAG(other, 2)
    if before:
        assert_unchanged(other, before)


@each_name
def test_twice(name: str) -> None:
    # Catches a second rescaling: of two SVAGs only one would be fed.
    optimizer = _two_groups(name, {})
    first = SVAG(optimizer, 2)
    before = snapshot(optimizer)
    with pytest.raises(TypeError, match="SVAG"):
        SVAG(optimizer, 3)
    assert_unchanged(optimizer, before)
    params = groups_of(optimizer)
    svag_step(first, draw(params, 1), draw(params, 2))


# The order of the calls


@pytest.mark.parametrize("through", ["svag", "optimizer"])
@pytest.mark.parametrize("after", [0, 1])
def test_step_without_hold(after: int, through: str) -> None:
    # Catches a plain step at the rate of small ones, and a held gradient that is used twice.
    params, svag = made("Adam", 2)
    if after:
        hold(svag)
        svag.step()
    give(params, draw(params, 5))
    before = snapshot(svag.optimizer)
    with pytest.raises(RuntimeError, match=r"hold\(\)"):
        (svag if through == "svag" else svag.optimizer).step()
    assert_unchanged(svag.optimizer, before)


def test_hold_twice() -> None:
    # Catches a first gradient that is replaced, or added to, in silence.
    beside = Beside("Adam", 2)
    first, second = beside.draw()
    give(beside.params, first)
    beside.svag.hold()
    give(beside.params, second)
    with pytest.raises(RuntimeError, match=r"step\(\) or zero_grad\(\)"):
        beside.svag.hold()
    assert [p.grad is g for p, g in zip(beside.params, second, strict=True)] == [True] * 4
    beside.svag.step()
    beside.oracle(first, second)
    beside.check()


def test_hold_without_gradients() -> None:
    # Catches a pair that is never made: a step that skips every parameter, and says nothing.
    params, svag = made("Adam", 2)
    with pytest.raises(RuntimeError, match="backward"):
        svag.hold()
    hold(svag)
    svag.step()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("through", ["svag", "optimizer"])
def test_zero_grad_drops_what_is_held(through: str, set_to_none: bool) -> None:
    # Catches gradients that outlive zero_grad, by which a loop discards a batch.
    params, svag = made("SGD", 2)
    first = hold(svag)
    (svag if through == "svag" else svag.optimizer).zero_grad(set_to_none=set_to_none)
    for p in params:
        assert p.grad is None if set_to_none else not p.grad.any()
    assert_same_bits(first, draw(params, 1))
    with pytest.raises(RuntimeError, match=r"hold\(\)"):
        svag.step()
    hold(svag, 5)
    svag.step()


def test_zero_grad_clears_by_default_as_torch_does() -> None:
    # Catches another default.
    params, svag = made("SGD", 2)
    hold(svag)
    svag.zero_grad()
    assert [p.grad for p in params] == [None] * len(params)


# One gradient only, and sparse ones


@pytest.mark.parametrize("missing", ["first", "second"])
@pytest.mark.parametrize("steps", [0, 2])
@on_backends
def test_one_gradient_only(name: str, missing: str, steps: int, backend: str) -> None:
    # Catches a step from one gradient at a rate that is for two, and one made in part.
    named = [(f"layer.{i}", p) for i, p in enumerate(new_params(((2,), (3,), (4,))))]
    params = [p for _, p in named]
    svag = SVAG(getattr(fusedopt, name)(named, **OPTIONS[name], backend=backend), 2)
    for seed in range(steps):
        svag_step(svag, draw(params, seed), draw(params, seed + 10))
    first, second = draw(params, 21), draw(params, 22)
    (first if missing == "first" else second)[1] = None
    there = "second" if missing == "first" else "first"
    give(params, first)
    svag.hold()
    give(params, second)
    before, versions = snapshot(svag.optimizer), [p._version for p in params]
    for step in (svag.step, svag.optimizer.step):
        with pytest.raises(RuntimeError, match=rf"layer\.1.* the {there} of"):
            step()
        assert_unchanged(svag.optimizer, before)
        assert [p._version for p in params] == versions
        if steps == 0:
            assert not svag.optimizer.state


def test_the_advice_of_that_error() -> None:
    # Catches an error after which the held gradients are lost: zeros are a gradient.
    beside = Beside("Adam", 2, shapes=((2,), (3,)))
    first, second = beside.draw()
    give(beside.params, first)
    beside.svag.hold()
    give(beside.params, [second[0], None])
    with pytest.raises(RuntimeError, match="zero"):
        beside.svag.step()
    beside.params[1].grad = torch.zeros_like(beside.params[1])
    beside.svag.step()
    beside.oracle(first, [second[0], torch.zeros_like(second[1])])
    beside.check()


@pytest.mark.parametrize("which", ["first", "second"])
def test_sparse_gradient(which: str) -> None:
    # Catches a check of the last gradient alone.
    params, svag = made("SGD", 2)
    before = snapshot(svag.optimizer)[0]
    first, second = draw(params, 1), draw(params, 2)
    place = first if which == "first" else second
    place[0] = place[0].to_sparse()
    with pytest.raises(RuntimeError, match="sparse") as raised:
        svag_step(svag, first, second)
    assert ("held" in str(raised.value)) == (which == "first")
    assert_same_bits(snapshot(svag.optimizer)[0], before)


def test_what_comes_after_the_constructor() -> None:
    # Catches an option that the constructor refuses and a step takes, and a group that is not
    # rescaled beside others that are.
    param = new_params([(3,)])[0]
    optimizer = fusedopt.Adam([param])
    svag = SVAG(optimizer, 2)

    def step() -> None:
        svag.zero_grad()
        for _ in range(2):
            if param.grad is not None:
                svag.hold()
            param.grad = torch.ones_like(param)
        svag.step()

    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad"):
        step()
    optimizer.param_groups[0]["amsgrad"] = False
    optimizer.clip = fusedopt.GlobalNorm(1.0)
    with pytest.raises(ValueError, match="clip"):
        step()
    optimizer.clip = None
    optimizer.add_param_group({"params": new_params([(2,)])})
    with pytest.raises(ValueError, match="group"):
        step()
    assert not optimizer.state


def test_copies_are_refused() -> None:
    # Catches a copy that steps with a plain optimizer at the rescaled lr.
    svag = SVAG(fusedopt.Adam(new_params([(3,)])), 2)
    for copying in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="state_dict"):
            copying(svag)


def test_states_of_something_else() -> None:
    # Catches a bare KeyError, and a gradient held across a load.
    params = new_params([(3,)])
    svag = SVAG(fusedopt.Adam(params), 2)
    with pytest.raises(ValueError, match=r"svag\.optimizer"):
        svag.load_state_dict(svag.optimizer.state_dict())
    params[0].grad = torch.ones_like(params[0])
    svag.hold()
    svag.load_state_dict(svag.state_dict())
    params[0].grad = torch.ones_like(params[0])
    svag.hold()


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ({"ell": 2}, ValueError),
        ({"ell": 2, "optimizer": None}, ValueError),
        ({"ell": 2, "optimizer": {"state": {}}}, ValueError),
        (None, TypeError),
        ([], TypeError),
    ],
    ids=str,
)
def test_states_that_are_not_whole(state: Any, error: type[Exception]) -> None:
    # Catches a bare KeyError, and a held gradient that such a load lets go of.
    params, svag = made("Adam", 2)
    hold(svag)
    before = snapshot(svag.optimizer)
    with pytest.raises(error, match="state") as raised:
        svag.load_state_dict(state)
    assert not isinstance(raised.value, KeyError)
    assert_unchanged(svag.optimizer, before)
    svag.step()


@pytest.mark.parametrize("name", ["ell", "optimizer", "weights", "steps_per_step"])
def test_what_is_rescaled_for_is_fixed(name: str) -> None:
    # Catches an assignment that half of the class goes by: a mix for one ell, a state of another.
    _, svag = made("Adam", 2)
    kept = getattr(svag, name)
    with pytest.raises(AttributeError, match=rf"{name}"):
        setattr(svag, name, kept)
    assert getattr(svag, name) is kept


def test_an_svag_is_no_optimizer() -> None:
    # Catches words that do not say what a scaler takes, and an attribute that is there after all.
    params = new_params([(3,)])
    svag = SVAG(fusedopt.Adam(params), 2)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    params[0].grad = torch.ones_like(params[0])
    for call in (scaler.step, scaler.unscale_):
        with pytest.raises(TypeError, match=r"param_groups.*svag\.optimizer"):
            call(svag)
    assert not hasattr(svag, "param_groups") and not hasattr(svag, "state")


def test_wrapped_twice() -> None:
    # Catches hyper-parameters that are rescaled twice, and words that blame the class.
    svag = SVAG(fusedopt.Adam(new_params([(3,)])), 2)
    with pytest.raises(TypeError, match="already"):
        SVAG(svag.optimizer, 2)


def test_states_loaded_past_it() -> None:
    # Catches hyper-parameters of the plain optimizer beside gradients mixed for another noise.
    params = new_params([(3,)])
    optimizer = fusedopt.Adam(params)
    saved = copy.deepcopy(optimizer.state_dict())
    svag = SVAG(optimizer, 4)
    svag.optimizer.load_state_dict(saved)
    give(params, draw(params, 1))
    svag.hold()
    give(params, draw(params, 2))
    with pytest.raises(ValueError, match="ell"):
        svag.step()
    assert not optimizer.state


def test_rescaled_twice() -> None:
    # Catches a copy, whose hyper-parameters are rescaled, that is wrapped again.
    svag = SVAG(fusedopt.Adam(new_params([(3,)])), 2)
    with pytest.raises(ValueError, match="already"):
        SVAG(copy.deepcopy(svag.optimizer), 2)
