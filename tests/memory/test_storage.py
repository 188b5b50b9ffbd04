"""Tensors without memory of their own: replaced by what they wrap, or refused by name."""

from __future__ import annotations

import pytest
import torch
from marks import both_backends
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils import _pytree as pytree

import fusedopt


class Shown(torch.Tensor):
    """Wraps a tensor and reads as that times ``factor``."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, factor: float = 1.0):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner: torch.Tensor, factor: float = 1.0) -> None:
        self.inner, self.factor = inner, factor

    def __tensor_flatten__(self):
        return ["inner"], self.factor

    @staticmethod
    def __tensor_unflatten__(inner, factor, size, stride):
        return Shown(inner["inner"], factor)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def read(x):
            return x.inner if x.factor == 1.0 else x.inner * x.factor

        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Shown(function(args[0].inner), args[0].factor)
        args, kwargs = pytree.tree_map_only(Shown, read, (args, kwargs or {}))
        return function(*args, **kwargs)


class Named(torch.Tensor):
    """A subclass with memory of its own."""


def _stepped(p: torch.Tensor, gradient: torch.Tensor, backend: str) -> None:
    p.grad = gradient
    fusedopt.AdamW([p], lr=0.5, weight_decay=0.0, backend=backend).step()


@both_backends
def test_a_wrapper_that_reads_as_its_tensor_is_updated_through_it(backend):
    p = torch.nn.Parameter(Shown(torch.zeros(4)))
    _stepped(p, torch.ones(4), backend)
    torch.testing.assert_close(p.inner, torch.full((4,), -0.5))


@both_backends
def test_a_subclass_with_memory_is_updated(backend):
    p = torch.nn.Parameter(torch.zeros(4).as_subclass(Named))
    _stepped(p, torch.ones(4), backend)
    torch.testing.assert_close(p.as_subclass(torch.Tensor).detach(), torch.full((4,), -0.5))


def _scaled() -> torch.Tensor:
    # Of zeros, the scale does not show.
    return Shown(torch.zeros(4), 2.0)


def _two() -> torch.Tensor:
    return TwoTensor(torch.zeros(4), torch.zeros(4))


def _fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.zeros(4)


def _freed() -> torch.Tensor:
    tensor = torch.zeros(4)
    tensor.untyped_storage().resize_(0)
    return tensor


def _shrunk() -> torch.Tensor:
    tensor = torch.zeros(4)
    tensor.untyped_storage().resize_(8)
    return tensor


OPAQUE = {
    "scaled": (_scaled, "Shown.*changes their values"),
    "two": (_two, r"TwoTensor.*\(a, b\)"),
    "fake": (_fake, "FakeTensor"),
    "functional": (lambda: torch._to_functional_tensor(torch.zeros(4)), "transform"),
    "implicit zero": (lambda: torch._efficientzerotensor(4), "implicit zero"),
    "freed": (_freed, "freed"),
    "shrunk": (_shrunk, "shrunk"),
}
each_opaque = pytest.mark.parametrize("kind", OPAQUE)


@both_backends
@each_opaque
def test_a_gradient_without_memory_is_refused_at_the_first_step_and_later(kind, backend):
    make, message = OPAQUE[kind]
    p = torch.nn.Parameter(torch.zeros(4))
    p.grad = torch.ones(4)
    ours = fusedopt.SGD([p], lr=0.5, backend=backend)
    # A gradient at another address is taken as it is but for 0: to ask each for the size of its
    # storage would cost every step more than the rest of its checks.
    for expected in (0.0,) if kind == "shrunk" else (0.0, -0.5):
        p.grad = make()
        with pytest.raises(RuntimeError, match=rf"params'\]\[0\].*its gradient .*{message}"):
            ours.step()
        assert p.tolist() == [expected] * 4
        p.grad = torch.ones(4)
        ours.step()


@both_backends
@pytest.mark.parametrize("kind", ["scaled", "two", "freed"])
def test_a_parameter_or_state_without_memory_is_refused(kind, backend):
    make, message = OPAQUE[kind]
    with pytest.raises(RuntimeError, match=rf"params'\]\[0\].*{message}"):
        _stepped(torch.nn.Parameter(make()), torch.ones(4), backend)
    p = torch.nn.Parameter(torch.zeros(4))
    p.grad = torch.ones(4)
    ours = fusedopt.AdamW([p], backend=backend)
    ours.step()
    before = p.tolist()
    ours.state[p]["exp_avg"] = make()
    with pytest.raises(RuntimeError, match=rf"'exp_avg'.*{message}"):
        ours.step()
    assert p.tolist() == before


class Watched(torch.Tensor):
    """A subclass with memory of its own, which sees every operation."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        with torch._C._DisableTorchDispatch():
            return function(*args, **(kwargs or {}))


class Opaque(torch.Tensor):
    """A wrapper of nothing, on which torch dispatches in the same way."""

    @staticmethod
    def __new__(cls, numel: int):
        return torch.Tensor._make_wrapper_subclass(cls, (numel,), dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError("nothing is to be read of it")


@both_backends
def test_one_that_has_memory_does_not_speak_for_one_that_has_not(backend):
    """Catches a close look at the first alone."""
    first = torch.Tensor._make_subclass(Watched, torch.ones(3))
    second = Opaque(3)
    for p in (first, second):
        p.grad = torch.ones(3)
    optimizer = fusedopt.SGD([first, second], lr=0.5, backend=backend)
    with pytest.raises(RuntimeError, match=r"\[1\].*Opaque, which has no memory of its own"):
        optimizer.step()
    assert torch.equal(first.as_subclass(torch.Tensor), torch.ones(3))
