"""States that lie over other tensors, and states that have lost an entry: refused, by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import (
    DEVICE,
    Case,
    Pair,
    assert_same_state,
    assert_unchanged,
    groups_of,
    set_gradients,
    snapshot,
)
from marks import both_backends
from torch import Tensor
from torch.optim import Optimizer

import fusedopt
from fusedopt.memory.layout import share_memory


def _case(name: str, **options: Any) -> Case:
    return Case(name, getattr(fusedopt, name), getattr(torch.optim, name), options)


STATES = {
    "SGD": ("momentum_buffer", {"momentum": 0.9}),
    "RMSprop": ("square_avg", {"momentum": 0.9, "centered": True}),
    "Adam": ("exp_avg_sq", {"amsgrad": True}),
}


def _stepped(name: str, backend: str, **options: Any) -> tuple[Optimizer, list[Tensor]]:
    params = [torch.nn.Parameter(torch.ones(6, device=DEVICE)) for _ in range(2)]
    optimizer = getattr(fusedopt, name)(params, lr=0.1, backend=backend, **options)
    for seed in range(2):
        set_gradients(params, seed)
        optimizer.step()
    return optimizer, list(params)


def _is_parameter(o: Any, p: Tensor, q: Tensor, key: str) -> str:
    o.state[p][key] = p.data
    return "shares memory with its values"


def _is_other_parameter(o: Any, p: Tensor, q: Tensor, key: str) -> str:
    o.state[p][key] = q.data
    return r"shares memory with the values of parameter .*\['params'\]\[1\]"


def _is_gradient(o: Any, p: Tensor, q: Tensor, key: str) -> str:
    p.grad = o.state[p][key]
    return "shares memory with its gradient"


def _is_other_gradient(o: Any, p: Tensor, q: Tensor, key: str) -> str:
    q.grad = o.state[p][key]
    return r"shares memory with the gradient of parameter .*\['params'\]\[1\]"


def _is_other_state(o: Any, p: Tensor, q: Tensor, key: str) -> str:
    o.state[p][key] = o.state[q][key]
    return rf"shares memory with the state '{key}' of parameter"


def _is_another_key(o: Any, p: Tensor, q: Tensor, key: str) -> str:
    names = [name for name in o.state[p] if name not in (key, "step")]
    if not names:
        pytest.skip("it has one state")
    o.state[p][key] = o.state[p][names[-1]]
    return "shares memory with its state"


def _overlaps(o: Any, p: Tensor, q: Tensor, key: str) -> str:
    wide = torch.zeros(9, device=DEVICE)
    o.state[p][key], o.state[q][key] = wide[:6], wide[3:]
    return rf"shares memory with the state '{key}' of parameter"


ALIASES: list[Callable[[Any, Tensor, Tensor, str], str]] = [
    _is_parameter, _is_other_parameter, _is_gradient, _is_other_gradient, _is_other_state,
    _is_another_key, _overlaps,
]  # fmt: skip


@pytest.mark.parametrize("alias", ALIASES)
@pytest.mark.parametrize("name", STATES)
@both_backends
def test_a_state_over_something_else_is_refused(
    name: str, backend: str, alias: Callable[[Any, Tensor, Tensor, str], str]
) -> None:
    # Catches results that depend on the order in which a backend reads and writes: with a plan at
    # hand, where a gradient only moves.
    key, options = STATES[name]
    optimizer, params = _stepped(name, backend, **options)
    set_gradients(params, 5)
    message = alias(optimizer, *params, key)
    before = snapshot(optimizer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"state '.*{message}"):
            optimizer.step()
        assert_unchanged(optimizer, before)
    for p in params:
        optimizer.state[p] = {k: v.clone() for k, v in optimizer.state[p].items()}
    set_gradients(params, 6)
    optimizer.step()
    assert not torch.equal(params[0], before[0][0])


@both_backends
def test_states_that_interleave_in_one_buffer_are_used(backend: str) -> None:
    # Catches ranges of addresses taken for the memory itself: this worked, and is right.
    pair = Pair(_case("Adam", lr=0.1, betas=(0.6, 0.8)), shapes=[(6,), (2, 3)], backend=backend)
    pair.step(2)
    for p in groups_of(pair.ours):
        state = pair.ours.state[p]
        both = torch.stack([state["exp_avg"], state["exp_avg_sq"]], -1)
        state["exp_avg"], state["exp_avg_sq"] = both.unbind(-1)
    pair.step(2)
    assert_same_state(pair.ours, pair.theirs)


def test_views_share_memory_where_an_element_does() -> None:
    # Catches strides of another unit, an end that is off by one, and holes taken for memory.
    x = torch.zeros(8, 6)
    halves = x.view(torch.bfloat16)
    cases = [
        (x, x[3:4], True),
        (x[:4], x[4:], False),
        (x[:, :3], x[:, 3:], False),
        (x[:, :4], x[:, 3:], True),
        (x[0::2], x[1::2], False),
        (x[0::2], x[2:3, 5:], True),
        (x.t(), x[7], True),
        (x[:, 0], halves[:, 2], False),
        (x[:, 0], halves[:, 1], True),
        (x[:0], x, False),
    ]
    for a, b, expected in cases:
        assert share_memory(a, b) is share_memory(b, a) is expected


# Entries taken away

TAKEN = [("RMSprop", "grad_avg"), ("RMSprop", "momentum_buffer"), ("Adam", "max_exp_avg_sq")]


@pytest.mark.parametrize("way", ["stepped", "loaded", "copied", "another step"])
@pytest.mark.parametrize(("name", "key"), TAKEN)
@both_backends
def test_an_entry_that_was_taken_away_is_missed(
    name: str, key: str, backend: str, way: str
) -> None:
    # Catches a moment that begins at zero beside those of many steps, without a word.
    optimizer, params = _stepped(name, backend, **STATES[name][1])
    if way == "loaded":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif way == "copied":
        optimizer = copy.deepcopy(optimizer)
        params = groups_of(optimizer)
    del optimizer.state[params[0]][key]
    if way == "another step":
        set_gradients(params[1:], 4)
        params[0].grad = None
        optimizer.step()
    set_gradients(params, 5)
    before = snapshot(optimizer)
    for _ in range(2):
        with pytest.raises(KeyError, match=rf"\['params'\]\[0\].*no '{key}'"):
            optimizer.step()
        assert_unchanged(optimizer, before)
    del optimizer.state[params[0]]
    optimizer.step()
    assert optimizer.state[params[0]]["step"].item() == 1


@both_backends
def test_an_option_switched_on_in_a_step_that_fails(backend: str) -> None:
    # Catches a state that the failed step had made, and that the next one misses.
    optimizer, params = _stepped("Adam", backend)
    optimizer.param_groups[0] |= {"amsgrad": True, "lr": 1e300}
    with pytest.raises(ValueError, match="lr"):
        optimizer.step()
    assert "max_exp_avg_sq" not in optimizer.state[params[0]]
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert optimizer.state[params[0]]["step"].item() == 3


@both_backends
def test_an_entry_dropped_while_its_option_is_off(backend: str) -> None:
    # Catches a reminder of what was switched off in between: it may start anew.
    optimizer, params = _stepped("RMSprop", backend, momentum=0.9)
    optimizer.param_groups[0]["momentum"] = 0
    optimizer.step()
    for p in params:
        del optimizer.state[p]["momentum_buffer"]
    optimizer.param_groups[0]["momentum"] = 0.9
    optimizer.step()
    assert "momentum_buffer" in optimizer.state[params[0]]


@both_backends
def test_sgd_starts_a_buffer_anew_as_torch_does(backend: str) -> None:
    pair = Pair(_case("SGD", lr=0.1, momentum=0.9, dampening=0.5), shapes=[(3,)], backend=backend)
    pair.step(2)
    pair.each(lambda o: o.state[groups_of(o)[0]].pop("momentum_buffer"))
    pair.step(2)
    assert_same_state(pair.ours, pair.theirs)


@pytest.mark.parametrize("value", [3, None, [1.0]], ids=str)
@pytest.mark.parametrize("whole", [False, True], ids=["entry", "state"])
@both_backends
def test_a_state_that_is_no_tensor_is_named(backend: str, value: Any, whole: bool) -> None:
    optimizer, params = _stepped("Adam", backend)
    kept = optimizer.state[params[1]]
    before = snapshot(optimizer)
    optimizer.state[params[1]] = value if whole else {**kept, "exp_avg": value}
    what = "no dictionary" if whole else "'exp_avg'"
    with pytest.raises((TypeError, KeyError), match=rf"\['params'\]\[1\].*{what}"):
        optimizer.step()
    optimizer.state[params[1]] = kept
    assert_unchanged(optimizer, before)
