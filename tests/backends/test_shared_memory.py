"""Tensors that lie over each other, and what a launch claims about where its tensors lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from guarded import Guarded
from tolerances import TRAJECTORY, assert_close_ulps, assert_equal
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt.backends import triton as triton_backend

CLASSES: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "RMSprop": {"lr": 0.03, "alpha": 0.9, "centered": True, "momentum": 0.9},
    "Adam": {"lr": 0.1, "betas": (0.6, 0.9), "amsgrad": True},
    "AdamW": {"lr": 0.1, "betas": (0.6, 0.9), "weight_decay": 0.3},
}

# Parameters over one storage of 2100 elements: the whole, a part, views that interleave, a view
# in another order, and one apart from the others.
VIEWS: dict[str, Sequence[Callable[[Tensor], Tensor]]] = {
    "twice_the_same": [lambda x: x, lambda x: x],
    "overlapping_parts": [lambda x: x[:1200], lambda x: x[1000:2000], lambda x: x[1990:]],
    "nested": [lambda x: x[500:600], lambda x: x, lambda x: x[550:580], lambda x: x[:7]],
    "interleaved": [lambda x: x[0::2], lambda x: x[1::2]],
    "another_order": [lambda x: x.view(30, 70), lambda x: x.view(30, 70).t(), lambda x: x[::3]],
    "apart_and_together": [lambda x: x[:100], lambda x: x[2000:], lambda x: x[50:2050]],
}


@pytest.mark.parametrize("groups", ["one_group", "two_groups"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("views", VIEWS)
def test_parameters_over_one_storage(
    views: str, backend: str, groups: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Torch updates them one after the other, so the later sees what the earlier wrote. Values are
    # multiples of 1/4 and factors powers of two: nothing is rounded, and all must be equal.
    _watch_launches(monkeypatch)
    start = _quarters(torch.empty(2100, device=device))
    gradients = [_quarters(view(start)) for view in VIEWS[views]]
    ends, buffers = [], []
    for module, extra in ((torch.optim, {"foreach": False}), (fusedopt, {"backend": backend})):
        storage = start.clone()
        params = [Parameter(view(storage)) for view in VIEWS[views]]
        split: Any = params
        if groups == "two_groups":
            split = [{"params": params[:1]}, {"params": params[1:], "lr": 0.125}]
        # Decay makes an update depend on the parameter's own value.
        arguments = {"lr": 0.25, "momentum": 0.5, "weight_decay": 0.5}
        optimizer = module.SGD(split, **arguments, **extra)
        for _ in range(2):
            for p, g in zip(params, gradients, strict=True):
                p.grad = g.clone()
            optimizer.step()
        ends.append(storage)
        buffers.append([optimizer.state[p]["momentum_buffer"] for p in params])
    assert_equal(ends[1], ends[0], start, "storage")
    for i, (theirs, ours) in enumerate(zip(*buffers, strict=True)):
        assert_equal(ours, theirs, torch.zeros_like(theirs), f"buffer {i}")


def _quarters(like: Tensor) -> Tensor:
    return torch.randint_like(like, -20, 21) / 4


def _watch_launches(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Assert of every update launch that its tensors lie apart and are as aligned as it claims.

    Programs of one launch run at the same time on a GPU, but one by one in the interpreter, which
    therefore gives the right result even where they write to the same memory.
    """
    claims: list[bool] = []
    launch = triton_backend.launch

    def checked(kernel: Any, *arguments: Any, **meta: Any) -> None:
        if "RULE" in meta:
            table = next(a for a in arguments if isinstance(a, Tensor)).tolist()
            claims.append(meta["ALIGNED"])
            _assert_alignment(table, meta["ALIGNED"])
            _assert_apart(table, [t.primitive_bitwidth // 8 for t in meta["DTYPES"]])
        launch(kernel, *arguments, **meta)

    monkeypatch.setattr(triton_backend, "launch", checked)
    return claims


def _assert_alignment(table: Sequence[Sequence[int]], aligned: bool) -> None:
    addresses = [address for row in table[2:] for address in row]
    assert not aligned or all(address % 16 == 0 for address in addresses)


def _assert_apart(table: Sequence[Sequence[int]], sizes: Sequence[int]) -> None:
    numels, operands = table[0], table[2:]
    ranges = []
    for position, (addresses, size) in enumerate(zip(operands, sizes, strict=True)):
        if position != 1:  # the gradient is only read
            ranges += [(a, a + n * size) for a, n in zip(addresses, numels, strict=True)]
    ranges.sort()
    for (_, stop), (start, _) in zip(ranges, ranges[1:], strict=False):
        assert stop <= start, "two tensors of one launch overlap"


def test_alignment_is_claimed_only_where_it_holds(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A wrong hint is invisible in the interpreter and a fault on a GPU. A step whose gradients
    # move from an aligned place to another keeps its plan, and may not keep a wrong claim.
    claims = _watch_launches(monkeypatch)
    guards = [Guarded(torch.randn(40, device=device), shift=s) for s in (0, 0, 1, 0)]
    params = [Parameter(guard.view) for guard in guards]
    optimizer = fusedopt.SGD(params, lr=0.1, backend="triton")
    for shifts in ((0, 0, 0, 0), (0, 1, 0, 0), (0, 0, 0, 2), (4, 0, 0, 0), (0, 0, 0, 0)):
        for p, shift in zip(params, shifts, strict=True):
            p.grad = Guarded(torch.ones_like(p), shift=shift).view
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for i, (p, old) in enumerate(zip(params, before, strict=True)):
            expected = old - 0.1
            assert_close_ulps(p, expected, old, TRAJECTORY[torch.float32], f"parameter {i}")
    assert set(claims) == {False, True}


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", CLASSES)
def test_gradient_that_is_the_parameter(name: str, backend: str, device: torch.device) -> None:
    # The gradient of p^2 / 2. Catches a statement that reads the gradient after it has begun to
    # write the parameter.
    start = torch.randn(1500, device=device)
    ends = []
    for module, extra in ((torch.optim, {"foreach": False}), (fusedopt, {"backend": backend})):
        p = Parameter(start.clone())
        p.grad = p.detach()
        getattr(module, name)([p], **CLASSES[name], **extra).step()
        ends.append(p.detach())
    assert_close_ulps(ends[1], ends[0], start, TRAJECTORY[start.dtype], "parameter")
