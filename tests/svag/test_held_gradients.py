"""Whose memory a held gradient is: buffers that are used again, in one process and under DDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from contract import assert_unchanged, new_params, snapshot
from marks import both_backends
from ranks import in_ranks
from svag_by_hand import Beside, draw, give, made
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fusedopt
from fusedopt import SVAG

# One buffer for both gradients


def _copied(buffer: Tensor, second: Tensor) -> Tensor:
    return buffer.copy_(second)


def _through_a_view(buffer: Tensor, second: Tensor) -> Tensor:
    buffer.view(-1).copy_(second.view(-1))
    return second


def _itself(buffer: Tensor, second: Tensor) -> Tensor:
    return buffer


def _seen_otherwise(buffer: Tensor, second: Tensor) -> Tensor:
    return buffer.detach()


def _added_to(buffer: Tensor, second: Tensor) -> Tensor:
    buffer += second
    return second


WAYS = (_copied, _through_a_view, _itself, _seen_otherwise, _added_to)


@pytest.mark.parametrize("through", ["svag", "optimizer"])
@pytest.mark.parametrize("way", WAYS)
@both_backends
def test_a_buffer_used_for_both(way: Any, through: str, backend: str) -> None:
    # Catches a step from r1 g2 + r2 g2, or from a first gradient that is another by then.
    params, svag = made("SGD", 2, backend=backend)
    give(params, draw(params, 1))
    svag.hold()
    give(params, draw(params, 2))
    svag.step()
    svag.zero_grad()
    first, second = draw(params, 3), draw(params, 4)
    give(params, first)
    svag.hold()
    give(params, [*second[:1], way(first[1], second[1]), *second[2:]])
    before = snapshot(svag.optimizer)
    with pytest.raises(RuntimeError, match=r"\[1\] of shape .*after hold\(\).*clone\(\)"):
        (svag if through == "svag" else svag.optimizer).step()
    assert_unchanged(svag.optimizer, before)
    svag.zero_grad()
    give(params, draw(params, 5))
    svag.hold()
    give(params, draw(params, 6))
    svag.step()


def test_the_advice_of_that_error() -> None:
    # Catches a copy that is taken for the buffer that it was made of.
    beside = Beside("Adam", 2)
    buffers, _ = beside.draw()
    for _ in range(2):
        first, second = beside.draw()
        for half, gradients in enumerate((first, second)):
            for p, buffer, g in zip(beside.params, buffers, gradients, strict=True):
                buffer.copy_(g)
                p.grad = buffer if half else buffer.clone()
            if not half:
                beside.svag.hold()
        beside.svag.step()
        beside.svag.zero_grad()
        beside.oracle(first, second)
    beside.check()


@both_backends
def test_parts_of_one_buffer_are_copied(backend: str) -> None:
    # Catches views, which a bucket's owner goes on writing, that are kept as they are: whole
    # buffers of one gradient, parts of one with several, and parts that do not show as views.
    beside = Beside("Adam", 2, shapes=((4,), (4,), (4,)), backend=backend)
    arena = torch.zeros(30, dtype=torch.float64, device=beside.params[0].device)
    hidden = torch.empty_like(arena[:4]).set_(arena.untyped_storage(), 10, (4,))
    alone = torch.zeros_like(arena[:4])
    buffers = [arena[:4], hidden, alone.view(4)]
    for _ in range(3):
        first, second = beside.draw()
        for buffer, g in zip(buffers, first, strict=True):
            buffer.copy_(g)
        give(beside.params, buffers)
        beside.svag.hold()
        for buffer, g in zip(buffers, second, strict=True):
            buffer.copy_(g)
        give(beside.params, buffers)
        beside.svag.step()
        beside.svag.zero_grad()
        beside.oracle(first, second)
    beside.check()


@pytest.mark.parametrize("kind", ["sparse", "empty", "expanded"])
def test_gradients_of_other_kinds_are_held(kind: str) -> None:
    # Catches a look at memory that such a gradient has not: the step judges it, not hold().
    p = new_params([(0,) if kind == "empty" else (3,)])[0]
    svag = SVAG(fusedopt.SGD([p]), 2)
    ones = torch.ones_like(p)
    of_kind = {
        "sparse": ones.to_sparse,
        "empty": ones.clone,
        "expanded": lambda: ones[:1].clone().expand(3),
    }
    p.grad = of_kind[kind]()
    svag.hold()
    p.grad = of_kind[kind]()
    if kind == "sparse":
        with pytest.raises(RuntimeError, match="sparse"):
            svag.step()
    else:
        svag.step()


# Several processes

BUCKETS: list[dict[str, Any]] = [
    {},
    {"gradient_as_bucket_view": True},
    {"gradient_as_bucket_view": True, "static_graph": True},
    {"gradient_as_bucket_view": True, "bucket_cap_mb": 1e-5},
]


def _data(step: int, half: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + half)
    return torch.randn(4, 3, generator=generator, dtype=torch.float64)


def _net(deep: bool) -> nn.Module:
    torch.manual_seed(0)
    if not deep:
        return nn.Linear(3, 2, bias=False).double()
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def _trained(net: nn.Module, rows: slice, closure: bool) -> list[Tensor]:
    """Parameters after four steps, the later ones with the buckets that DDP makes anew."""
    svag = SVAG(fusedopt.SGD(net.parameters(), lr=0.1), 2)
    for step in range(4):
        halves = iter((0, 1))

        def backward() -> Tensor:
            loss = net(_data(step, next(halves))[rows]).square().sum(1).mean()  # noqa: B023
            loss.backward()
            return loss

        if closure:
            svag.step(lambda: (svag.zero_grad(), backward()))  # noqa: B023
        else:
            backward()
            svag.hold()
            backward()
            svag.step()
        svag.zero_grad()
    return [p.detach() for p in net.parameters()]


def _in_buckets(rank: int) -> None:
    rows = slice(2 * rank, 2 * rank + 2)
    for deep in (True, False):
        expected = _trained(_net(deep), slice(None), False)
        for options in BUCKETS:
            for closure in (False, True):
                net = DistributedDataParallel(_net(deep), **options)
                found = _trained(net, rows, closure)
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_two_processes_are_one_of_both_batches(tmp_path: Path) -> None:
    # Catches a first gradient that the second backward's bucket has replaced.
    in_ranks(2, tmp_path, _in_buckets)
