"""Options edited in ``param_groups`` or a checkpoint: taken, or refused before a change."""

from __future__ import annotations

import copy
import decimal
import fractions
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from contract import (
    DEVICE,
    PLAIN,
    Case,
    Pair,
    assert_same_bits,
    assert_same_state,
    assert_unchanged,
    each_class,
    groups_of,
    new_params,
    set_gradients,
    snapshot,
)
from marks import both_backends
from torch import Tensor
from torch.optim import Optimizer

import fusedopt

host_and_live = pytest.mark.parametrize("capturable", [False, True], ids=["host", "live"])
NAMES = [case.name for case in PLAIN]
HYPER = {"SGD": ("lr", "momentum", "dampening", "weight_decay"),
         "RMSprop": ("lr", "alpha", "eps", "weight_decay", "momentum"),
         "Adam": ("lr", "betas", "eps", "weight_decay")}  # fmt: skip


def _two_groups(name: str, backend: str, steps: int = 2, **options: Any) -> Optimizer:
    groups = [{"params": new_params([(3,)], seed=s)} for s in (1, 2)]
    optimizer = getattr(fusedopt, name)(groups, lr=0.1, backend=backend, **options)
    for seed in range(steps):
        set_gradients(groups_of(optimizer), seed)
        optimizer.step()
    set_gradients(groups_of(optimizer), 9)
    return optimizer


def _assert_refused(
    optimizer: Optimizer, error: type[Exception] | tuple[type[Exception], ...], message: str
) -> None:
    before = snapshot(optimizer)
    for _ in range(2):
        with pytest.raises(error) as raised:
            optimizer.step()
        assert re.search(message, str(raised.value)), raised.value
        assert not str(raised.value).startswith('"'), raised.value
        assert_unchanged(optimizer, before)


# What is no number

BAD: dict[str, Any] = {
    "text": "x", "text of a number": "0.1", "None": None, "list": [0.1], "complex": 1j,
    "two": torch.tensor([0.1, 0.2]), "none": torch.zeros(0), "meta": torch.zeros((), device="meta"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize(("name", "key"), [(n, k) for n, keys in HYPER.items() for k in keys])
@pytest.mark.parametrize(
    ("backend", "capturable"), [("reference", False), ("triton", False), ("reference", True)]
)
def test_an_option_that_is_no_number_is_named(
    name: str, key: str, kind: str, backend: str, capturable: bool
) -> None:
    # Catches an error out of the arithmetic that says neither which option nor of which group.
    if (key, kind) == ("betas", "two"):
        pytest.skip("these are two numbers")
    optimizer = _two_groups(name, backend, capturable=capturable)
    good = optimizer.param_groups[1][key]
    optimizer.param_groups[1][key] = BAD[kind]
    with torch.no_grad():
        message = rf"param_groups\[1\]\['{key}'\] must be"
        before = _bits(optimizer)
        for _ in range(2):
            with pytest.raises((TypeError, ValueError), match=message):
                optimizer.step()
            assert_same_bits(_bits(optimizer), before)
    optimizer.param_groups[1][key] = good
    optimizer.step()
    assert not torch.equal(groups_of(optimizer)[0], before[0][0])


def _bits(optimizer: Optimizer) -> list[Any]:
    return [part for place, part in enumerate(snapshot(optimizer)) if place != 2]


@pytest.mark.parametrize("steps", [0, 2], ids=["first", "later"])
@pytest.mark.parametrize(
    "betas", [(0.9,), (0.9, 0.99, 0.999), (0.9, "x"), (None, 0.9), [], torch.ones(3)], ids=str
)
@host_and_live
@both_backends
def test_betas_that_are_not_two_numbers(
    backend: str, capturable: bool, betas: Any, steps: int
) -> None:
    # At the first step, too, where states would be made.
    optimizer = _two_groups("Adam", backend, steps, capturable=capturable)
    optimizer.param_groups[0]["betas"] = betas
    before = _bits(optimizer)
    with pytest.raises((TypeError, ValueError), match=r"param_groups\[0\]\['betas'\] must be 2"):
        optimizer.step()
    assert_same_bits(_bits(optimizer), before)
    assert len(optimizer.state) == (2 if steps else 0)


# Numbers without meaning

MEANINGLESS: list[tuple[str, dict[str, Any]]] = [
    ("Adam", {"betas": (0.9, 1.1)}),
    ("Adam", {"betas": (1.0, 0.9)}),
    ("Adam", {"lr": 10**400}),
    ("RMSprop", {"bias_correction": True, "alpha": 1.5}),
]


@pytest.mark.parametrize(("name", "edit"), MEANINGLESS, ids=str)
@both_backends
def test_a_number_that_has_no_step_is_named(name: str, edit: dict[str, Any], backend: str) -> None:
    # Catches complex numbers and divisions by zero that name nothing.
    optimizer = _two_groups(name, backend)
    optimizer.param_groups[1].update(edit)
    key = "alpha" if "alpha" in edit else next(iter(edit))
    _assert_refused(optimizer, ValueError, rf"(param_groups\[1\].*{key}|^{key} must)")


@pytest.mark.parametrize("count", [-5.0, -1.0])
@both_backends
def test_a_count_below_zero_is_named(backend: str, count: float) -> None:
    optimizer = _two_groups("Adam", backend)
    optimizer.state[groups_of(optimizer)[1]]["step"] = torch.tensor(count)
    _assert_refused(optimizer, ValueError, r"param_groups\[1\]\['params'\]\[0\].*'step' is -\d")


@pytest.mark.parametrize(
    ("name", "key"),
    [(n, k) for n in HYPER for k in HYPER[n]]
    + [("Adam", "betas"), ("Adam", "eps"), ("RMSprop", "eps")],
)
@both_backends
def test_a_number_beyond_float32_is_refused_by_both(name: str, key: str, backend: str) -> None:
    # Catches states that one backend had updated when torch's kernel refused, and the other's inf.
    if key in ("betas", "alpha"):
        pytest.skip("refused as decays")
    optimizer = _two_groups(name, backend)
    optimizer.param_groups[1][key] = 1e300
    _assert_refused(optimizer, ValueError, rf"param_groups\[1\].*{key}=1e\+300.*float32")


@each_class
@both_backends
def test_a_number_beyond_float32_is_taken_in_float64(case: Case, backend: str) -> None:
    pair = Pair(case, shapes=[(3,), (2,)], dtype=torch.float64, backend=backend)
    pair.each(lambda o: o.param_groups[0].update(lr=1e40))
    pair.step(1)
    assert_same_state(pair.ours, pair.theirs, rtol=1e-9)


# Of elements that are masked out, the interpreter multiplies zeros by it.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@each_class
@both_backends
def test_an_infinite_learning_rate_is_torchs(case: Case, backend: str) -> None:
    # Catches a refusal of what torch takes: the parameters are infinite, or nan, at once.
    pair = Pair(case, shapes=[(3,)], backend=backend)
    pair.step(1)
    pair.each(lambda o: o.param_groups[0].update(lr=float("inf")))
    pair.step(1)
    mine, other = (groups_of(o)[0].detach() for o in pair.both)
    assert_same_bits(mine, other)
    assert not mine.isfinite().any()


# Numbers of other kinds

KINDS: dict[str, Callable[[float], Any]] = {
    "Fraction": fractions.Fraction, "Decimal": decimal.Decimal, "float64": np.float64,
    "int64": lambda x: np.int64(1), "tensor": lambda x: torch.tensor(x, dtype=torch.float64),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@host_and_live
@each_class
@both_backends
def test_numbers_of_any_kind_are_their_float(
    case: Case, backend: str, capturable: bool, kind: str
) -> None:
    # Catches arithmetic in another kind, which mixes with floats in some places and not in others.
    ends = []
    for own in (KINDS[kind], lambda x: float(KINDS[kind](x))):
        optimizer = _two_groups(case.name, backend, capturable=capturable)
        for key in HYPER.get(case.name, HYPER["Adam"]):
            if key != "betas":
                value = 0.5 if key in ("alpha", "momentum") else 0.125
                optimizer.param_groups[0][key] = own(value)
        optimizer.step()
        ends.append(_bits(optimizer)[0])
    assert_same_bits(ends[0], ends[1])


@host_and_live
@both_backends
def test_betas_in_one_tensor(backend: str, capturable: bool) -> None:
    # As torch, which unpacks them.
    pair = Pair(PLAIN[2], shapes=[(3,)], backend=backend, ours_only={"capturable": capturable})
    pair.step(1)
    pair.each(lambda o: o.param_groups[0].update(betas=torch.tensor([0.5, 0.75])))
    pair.step(2)
    assert_same_state(pair.ours, pair.theirs)
    pair.each(lambda o: o.param_groups[0]["betas"].fill_(0.25))
    pair.step(1)
    assert_same_state(pair.ours, pair.theirs)


# Options that are missing

DELETED = [(n, k) for n in HYPER for k in HYPER[n]] + [
    ("SGD", "maximize"), ("SGD", "nesterov"), ("RMSprop", "centered"), ("Adam", "amsgrad"),
    ("Adam", "maximize"), ("AdamW", "decoupled_weight_decay"), ("SGD", "params"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "key"), DELETED)
@pytest.mark.parametrize("steps", [0, 2], ids=["first", "later"])
@both_backends
def test_a_deleted_option_is_named(name: str, key: str, backend: str, steps: int) -> None:
    optimizer = _two_groups(name, backend, steps)
    params = groups_of(optimizer)
    value = optimizer.param_groups[1].pop(key)
    before = copy.deepcopy([params, [optimizer.state.get(p, {}) for p in params]])
    with pytest.raises(KeyError) as raised:
        optimizer.step()
    assert f"param_groups[1] has no {key!r}" in str(raised.value)
    after = [params, [optimizer.state[p] if p in optimizer.state else {} for p in params]]
    assert_same_bits(copy.deepcopy(after), before)
    optimizer.param_groups[1][key] = value
    optimizer.step()


@each_class
@both_backends
def test_a_group_of_torchs_in_the_list(case: Case, backend: str) -> None:
    # Catches options of ours that are looked for in a group that was never ours.
    pair = Pair(case, shapes=[(3,)], backend=backend)
    pair.step(2)
    for optimizer in pair.both:
        group = case.theirs(optimizer.param_groups[0]["params"], **case.options).param_groups[0]
        optimizer.param_groups[0] = group
    pair.step(2)
    assert_same_state(pair.ours, pair.theirs)
    assert set(pair.ours.param_groups[0]) > set(pair.theirs.param_groups[0])


# Parameters of a group

ITERABLES: list[Callable[[list[Tensor]], Any]] = [
    tuple, iter, lambda x: (p for p in x), lambda x: dict.fromkeys(x).keys(), torch.nn.ParameterList
]  # fmt: skip


@pytest.mark.parametrize("kind", range(len(ITERABLES)))
@each_class
@both_backends
def test_parameters_in_anything_that_lists_them(case: Case, backend: str, kind: int) -> None:
    # Catches an iterator that is at its end when the parameters are asked for again.
    pair = Pair(case, shapes=[(3,), (2,)], backend=backend)
    pair.step(1)
    params = groups_of(pair.ours)
    for missing in (False, True):
        pair.ours.param_groups[0]["params"] = ITERABLES[kind](params)
        for _ in range(2):
            pair.seed += 1
            set_gradients(params, pair.seed)
            set_gradients(groups_of(pair.theirs), pair.seed)
            if missing:
                params[0].grad = groups_of(pair.theirs)[0].grad = None
            pair.ours.step()
            pair.theirs.step()
        assert_same_state(pair.ours, pair.theirs)


@pytest.mark.parametrize("value", [None, 3, "x"], ids=str)
@both_backends
def test_a_parameter_that_is_none_is_named(backend: str, value: Any) -> None:
    optimizer = _two_groups("Adam", backend)
    params = optimizer.param_groups[1]["params"]
    optimizer.param_groups[1]["params"] = [*params, value]
    kept = copy.deepcopy(params)
    with pytest.raises(TypeError, match=r"param_groups\[1\]\['params'\]\[1\] is no tensor"):
        optimizer.step()
    assert_same_bits(copy.deepcopy(params), kept)
    optimizer.param_groups[1]["params"] = value
    with pytest.raises(TypeError, match=r"param_groups\[1\]\['params'\]"):
        optimizer.step()


@pytest.mark.parametrize("appended", [False, True], ids=["group", "append"])
@pytest.mark.parametrize("steps", [0, 2], ids=["first", "later"])
@each_class
@both_backends
def test_a_parameter_in_two_groups_is_an_error(
    case: Case, backend: str, steps: int, appended: bool
) -> None:
    # Catches an update by the options of the first group alone; torch updates it by both.
    optimizer = _two_groups(case.name, backend, steps)
    (p,) = optimizer.param_groups[0]["params"]
    if appended:
        optimizer.param_groups[1]["params"].append(p)
        where = r"param_groups\[0\]\['params'\]\[0\] and param_groups\[1\]\['params'\]\[1\]"
    else:
        optimizer.param_groups.append({**optimizer.param_groups[1], "params": [p]})
        where = r"param_groups\[0\]\['params'\]\[0\] and param_groups\[2\]\['params'\]\[0\]"
    _assert_refused(optimizer, ValueError, where)
    optimizer.param_groups[-1]["params"].pop()
    optimizer.step()


# Checkpoints


@pytest.mark.parametrize("kind", [k for k in BAD if k != "two"])
@pytest.mark.parametrize(("name", "key"), [(n, k) for n, keys in HYPER.items() for k in keys])
def test_a_checkpoint_with_an_option_that_is_no_number(name: str, key: str, kind: str) -> None:
    # Catches a checkpoint that is loaded whole, and an error at the next step.
    optimizer = _two_groups(name, "reference")
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][1][key] = BAD[kind]
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError), match=rf"param_groups\[1\]\['{key}'\] of the che"):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


def _without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda saved: {k: v for k, v in saved.items() if k != key}


FORMS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no groups": (_without("param_groups"), "has no 'param_groups'"),
    "no state": (_without("state"), "has no 'state'"),
    "a list of states": (lambda saved: {**saved, "state": [1]}, "'state' .*no dictionary"),
    "groups in a dict": (lambda saved: {**saved, "param_groups": {}}, "'param_groups' .*no list"),
    "a group of numbers": (lambda saved: {**saved, "param_groups": [1, 2]}, r"param_groups\[0\]"),
    "a state in a list": (lambda saved: {**saved, "state": {0: [1]}}, "state is no dictionary"),
    "a list": (lambda saved: [saved], "must be a dictionary"),
    "nothing": (lambda saved: None, "must be a dictionary"),
}


@pytest.mark.parametrize("form", FORMS)
@each_class
def test_what_is_no_checkpoint_is_refused(case: Case, form: str) -> None:
    optimizer = _two_groups(case.name, "reference")
    before = snapshot(optimizer)
    spoil, message = FORMS[form]
    with pytest.raises((KeyError, TypeError, ValueError), match=message):
        optimizer.load_state_dict(spoil(copy.deepcopy(optimizer.state_dict())))
    assert_unchanged(optimizer, before)


# Under capture


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the step before needs no graph here")
def test_a_pushed_option_that_is_no_number_is_named() -> None:
    optimizer = _two_groups("Adam", "reference", capturable=True)
    optimizer.param_groups[1]["eps"] = "1e-8"
    with pytest.raises(TypeError, match=r"param_groups\[1\]\['eps'\] must be a number"):
        optimizer.push_hyperparameters()  # type: ignore[attr-defined]
