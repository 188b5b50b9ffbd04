"""Errors: raised before anything has changed, naming the parameter, saying what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import (
    DEVICE,
    PLAIN,
    Case,
    assert_unchanged,
    each_class,
    groups_of,
    new_params,
    set_gradients,
    snapshot,
)
from marks import both_backends
from torch.nn import Parameter
from torch.optim import Optimizer


def _sparse_gradient(p: Parameter) -> None:
    dense = torch.zeros_like(p)
    dense[0] = 1.0
    p.grad = dense.to_sparse()


def _other_shape(p: Parameter) -> None:
    p.grad = torch.ones_like(p)
    p.data = torch.ones(p.shape[0] + 1, *p.shape[1:], device=p.device)


def _reshaped_in_place(p: Parameter) -> None:
    """Same memory, same number of elements: only the shape tells."""
    p.grad = torch.ones_like(p)
    p.data = p.data.view(tuple(reversed(p.shape)))


def _complex_now(p: Parameter) -> None:
    p.grad = torch.ones_like(p)
    p.data = torch.ones(p.shape, dtype=torch.complex64, device=p.device)


def _integers_now(p: Parameter) -> None:
    p.requires_grad_(False)
    p.grad = None
    p.data = torch.ones(p.shape, dtype=torch.int32, device=p.device)
    p.grad = torch.ones_like(p)


def _expanded(p: Parameter) -> None:
    p.data = torch.ones(1, 1, device=p.device).expand(p.shape)
    p.grad = torch.ones(p.shape, device=p.device)


# What makes a parameter unusable, the error, what the message names, what it advises.
PROBLEMS: dict[str, tuple[Callable[[Parameter], None], type[Exception], str, str]] = {
    "sparse gradient": (_sparse_gradient, RuntimeError, "sparse", "dense|SparseAdam"),
    "gradient of another shape": (_other_shape, RuntimeError, "shape", "backward|set"),
    "reshaped in place": (_reshaped_in_place, RuntimeError, "shape", "backward|set"),
    "complex parameter, real gradient": (_complex_now, TypeError, "complex", "both"),
    "integers": (_integers_now, TypeError, "int32", "floating point"),
    "expanded": (_expanded, RuntimeError, "expanded", "clone"),
}


def _optimizer(case: Case, backend: str, named: bool) -> Optimizer:
    """Two groups of two; the problem is put into the second of the second group."""
    groups: list[dict[str, Any]] = []
    for letter, seed in (("a", 1), ("b", 2)):
        params = new_params([(4,), (2, 3)], seed=seed)
        names = [f"block.{letter}{i}.weight" for i in range(2)]
        groups.append({"params": list(zip(names, params, strict=True)) if named else params})
    return case.ours(groups, **case.options, backend=backend)


def _assert_refused(
    optimizer: Optimizer, error: type[Exception], named: bool, fault: str, advice: str
) -> None:
    before = snapshot(optimizer)
    holders = set(map(id, optimizer.state))
    versions = [p._version for p in groups_of(optimizer)]
    with pytest.raises(error) as raised:
        optimizer.step()
    message = str(raised.value)
    if named:
        assert "block.b1.weight" in message
    assert "param_groups[1]['params'][1]" in message
    assert re.search(fault, message), message
    assert re.search(advice, message), message
    assert_unchanged(optimizer, before)
    assert set(map(id, optimizer.state)) == holders
    assert [p._version for p in groups_of(optimizer)] == versions


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("named", [True, False], ids=["named", "nameless"])
@pytest.mark.parametrize("steps", [0, 2])
@both_backends
@each_class
def test_a_refused_step_changes_nothing(
    case: Case, backend: str, steps: int, named: bool, problem: str
) -> None:
    """Before the first step, when states would be made, and after some, with a plan at hand."""
    optimizer = _optimizer(case, backend, named)
    for seed in range(steps):
        set_gradients(groups_of(optimizer), seed)
        optimizer.step()
    set_gradients(groups_of(optimizer), 7)
    spoil, error, fault, advice = PROBLEMS[problem]
    spoil(groups_of(optimizer)[3])
    _assert_refused(optimizer, error, named, fault, advice)
    # Without that gradient the others go on.
    groups_of(optimizer)[3].grad = None
    before = groups_of(optimizer)[0].detach().clone()
    optimizer.step()
    assert not torch.equal(groups_of(optimizer)[0], before)


@pytest.mark.parametrize("key", ["exp_avg", "square_avg", "momentum_buffer"])
@pytest.mark.parametrize("problem", ["shape", "type"])
@both_backends
def test_a_state_that_does_not_fit(key: str, problem: str, backend: str) -> None:
    """Then the parameters ahead of it have no states yet, and must have none after."""
    name = {"exp_avg": "Adam", "square_avg": "RMSprop", "momentum_buffer": "SGD"}[key]
    case = next(c for c in PLAIN if c.name == name)
    optimizer = _optimizer(case, backend, True)
    set_gradients(groups_of(optimizer), 1)
    wrong = torch.zeros(7) if problem == "shape" else torch.zeros(2, 3, dtype=torch.int64)
    optimizer.state[groups_of(optimizer)[3]][key] = wrong.to(DEVICE)
    fault, advice = (key, "shape") if problem == "shape" else (key, "int64")
    _assert_refused(optimizer, RuntimeError, True, fault, advice)


@each_class
def test_a_parameter_without_values(case: Case) -> None:
    p = Parameter(torch.empty(3, device="meta"))
    optimizer = case.ours([("lost", p)], **case.options)
    p.grad = torch.empty(3, device="meta")
    with pytest.raises(RuntimeError, match="'lost'.*meta"):
        optimizer.step()
    assert not optimizer.state
    # Judged at the step, too: until then values may be there.
    kernels = case.ours([p], backend="triton")
    with pytest.raises(RuntimeError, match="meta"):
        kernels.step()


@each_class
def test_a_parameter_without_values_among_others(case: Case) -> None:
    (q,) = new_params([(3,)])
    p = Parameter(torch.empty(3, device="meta"))
    optimizer = case.ours([q, p], **case.options)
    set_gradients([q], 1)
    p.grad = torch.empty(3, device="meta")
    before = q.detach().clone()
    with pytest.raises(RuntimeError, match="meta"):
        optimizer.step()
    assert torch.equal(q, before) and not optimizer.state


@each_class
def test_integer_parameters_without_a_gradient_are_no_error(case: Case) -> None:
    """As in torch: buffers of integers sit in many parameter lists."""
    (q,) = new_params([(3,)])
    p = Parameter(torch.ones(3, dtype=torch.int64, device=DEVICE), requires_grad=False)
    optimizer = case.ours([p, q], **case.options, backend="reference")
    before = q.detach().clone()
    set_gradients([q], 1)
    optimizer.step()
    assert not torch.equal(q, before) and torch.equal(p, torch.ones_like(p))


@each_class
def test_parameters_that_torch_refuses_in_add_param_group(case: Case) -> None:
    optimizer = _optimizer(case, "reference", False)
    first = groups_of(optimizer)[0]
    for bad in ([first], [first * 2], [3.0], {first}):
        with pytest.raises((TypeError, ValueError)):
            optimizer.add_param_group({"params": bad})
        assert len(optimizer.param_groups) == 2
    set_gradients(groups_of(optimizer), 1)
    optimizer.step()
