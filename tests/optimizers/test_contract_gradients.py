"""Gradients that come and go: nothing that a step prepared may outlive what it was made for."""

from __future__ import annotations

import weakref

import pytest
import torch
from contract import (
    ADAM,
    SGD,
    Case,
    Pair,
    assert_same_bits,
    assert_same_state,
    each_case_on_backends,
    each_class,
    each_class_on_backends,
    gradient_like,
    groups_of,
    ids,
    new_params,
    snapshot,
)
from marks import both_backends

import fusedopt


@each_case_on_backends
def test_gradients_that_come_late_and_disappear(case: Case, backend: str) -> None:
    """A parameter without a gradient keeps values, states and step count; the others go on.

    Catches a shared step count, a table row taken from a neighbour, and for SGD a first
    momentum that is dampened, or a later one that is not.
    """
    pair = Pair(case, backend=backend)
    absent = {1: (0, 3), 2: (0, 3), 3: (0,), 4: (0, 1, 2, 3), 6: (2,), 7: (0, 1)}
    for step in range(1, 10):
        pair.backward()
        for optimizer in pair.both:
            for place in absent.get(step, ()):
                groups_of(optimizer)[place].grad = None
        pair.each(lambda o: o.step())
        assert_same_state(pair.ours, pair.theirs)
    pair.check()


@each_case_on_backends
def test_a_step_without_any_gradient_changes_nothing(case: Case, backend: str) -> None:
    pair = Pair(case, backend=backend)
    for _ in range(2):
        pair.each(lambda o: o.zero_grad())
        before = snapshot(pair.ours)
        pair.each(lambda o: o.step())
        assert_same_bits(snapshot(pair.ours), before)
        pair.step()
    pair.check()


@each_class_on_backends
def test_gradients_at_new_and_at_old_addresses(case: Case, backend: str) -> None:
    """Catches addresses of gradients kept from an earlier step."""
    pair = Pair(case, backend=backend)
    kept = [[p.grad for p in groups_of(o)] for o in pair.both]
    for step in range(6):
        pair.backward()
        if step == 2:
            kept = [[p.grad for p in groups_of(o)] for o in pair.both]
        if step in (3, 5):  # the same tensors as before, holding new values
            for optimizer, tensors in zip(pair.both, kept, strict=True):
                for p, tensor in zip(groups_of(optimizer), tensors, strict=True):
                    tensor.copy_(p.grad)
                    p.grad = tensor
        pair.each(lambda o: o.step())
        assert_same_state(pair.ours, pair.theirs)


@each_class_on_backends
def test_gradients_of_changing_layout(case: Case, backend: str) -> None:
    """Contiguous, transposed, expanded, and a view at an odd address, in turn."""
    shape = (8, 6)

    def lay_out(value: torch.Tensor, kind: int) -> torch.Tensor:
        if kind == 1:
            return value.t().contiguous().t()
        if kind == 2:
            return value[:1].expand(shape)
        if kind == 3:
            buffer = torch.zeros(value.numel() + 1, dtype=value.dtype, device=value.device)
            buffer[1:] = value.flatten()
            return buffer[1:].view(shape)
        return value

    pair = Pair(case, shapes=[shape], backend=backend)
    for kind in (0, 1, 0, 2, 3, 2, 1, 3, 0):
        pair.backward()
        for optimizer in pair.both:
            (p,) = groups_of(optimizer)
            p.grad = lay_out(p.grad, kind)
        pair.each(lambda o: o.step())
        assert_same_state(pair.ours, pair.theirs)
    pair.check()


@both_backends
@pytest.mark.parametrize("case", [SGD, ADAM], ids=ids)
def test_a_gradient_replaced_by_its_lazy_conjugate(case: Case, backend: str) -> None:
    """``conj()`` is a flag on a view: same address, same strides, other values."""
    pair = Pair(case, shapes=[(5,)], dtype=torch.complex64, backend=backend)
    for step in range(4):
        if step % 2 == 0:
            pair.backward()
        else:
            for optimizer in pair.both:
                (p,) = groups_of(optimizer)
                p.grad = p.grad.conj()
        pair.each(lambda o: o.step())
        assert_same_state(pair.ours, pair.theirs)


@each_class_on_backends
def test_gradients_are_never_written(case: Case, backend: str) -> None:
    pair = Pair(case, backend=backend, ours_only={"clip": fusedopt.GlobalNorm(0.1)})
    for _ in range(2):
        pair.backward()
        before = [p.grad.clone() for p in groups_of(pair.ours)]
        pair.ours.step()
        assert_same_bits([p.grad for p in groups_of(pair.ours)], before)


@each_class_on_backends
def test_dropped_gradients_are_freed(case: Case, backend: str) -> None:
    """Catches a plan that holds the last gradients, so that peak memory is theirs more."""
    (p,) = new_params([(2000,)])
    optimizer = case.ours([p], **case.options, backend=backend)
    for seed in range(3):
        p.grad = gradient_like(p, seed)
        last = weakref.ref(p.grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert last() is None, f"gradient of step {seed} is still held"


@each_class
def test_zero_grad_both_ways(case: Case) -> None:
    pair = Pair(case)
    for to_none in (True, False):
        pair.step()
        pair.each(lambda o, to_none=to_none: o.zero_grad(set_to_none=to_none))
        gradients = [p.grad for p in groups_of(pair.ours)]
        assert all(g is None if to_none else bool((g == 0).all()) for g in gradients)
        pair.each(lambda o: o.step())  # gradients of zero still decay, average and move
    pair.check()


@each_class
def test_gradients_with_a_history_of_their_own(case: Case) -> None:
    """``backward(create_graph=True)`` leaves gradients that require gradients."""
    (p,), (q,) = new_params([(4,)]), new_params([(4,)])
    ours = case.ours([p], **case.options, backend="reference")
    theirs = case.theirs([q], **case.options, foreach=False)
    for optimizer in (ours, theirs):
        for _ in range(2):
            (x,) = groups_of(optimizer)
            (x.grad,) = torch.autograd.grad((x**3).sum(), [x], create_graph=True)
            optimizer.step()
    assert_same_state(ours, theirs)
    assert p.requires_grad and p.is_leaf
