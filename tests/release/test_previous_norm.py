"""Clipping by the norm of the backward pass before, against loops in float64 and over ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from clients import batches, loss_of, network, values
from random_shards import same_everywhere
from ranks import in_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fusedopt

LR = 0.5
each_backend = pytest.mark.parametrize("backend", ["reference", "triton"])


def _model() -> nn.Module:
    return network().double()


def _by_hand(max_norms: list[float], order: float, first: float | None) -> list[Any]:
    """Gradient descent: the parameters after each pass, and the norm of its gradients."""
    model, found, last = _model(), [], first
    for max_norm, (x, y) in zip(max_norms, batches(len(max_norms), 4), strict=True):
        model.zero_grad()
        loss_of(model, x.double(), y.double()).backward()
        factor = 1.0 if last is None else min(1.0, max_norm / (last + 1e-6))
        flat = torch.cat([p.grad.flatten() for p in model.parameters()])
        last = float(torch.linalg.vector_norm(flat, order))
        with torch.no_grad():
            for p in model.parameters():
                p -= LR * factor * p.grad
        found.append((values(model), last))
    return found


@each_backend
@pytest.mark.parametrize("order", [2.0, math.inf])
@pytest.mark.parametrize("first", [None, 3.0])
def test_by_hand(backend, order, first) -> None:
    max_norms = [0.1, 0.1, 0.05, 1e3]
    model = _model()
    clip = fusedopt.GlobalNorm(1.0, norm_type=order)
    clip.last = None if first is None else torch.tensor(first)
    optimizer = fusedopt.SGD(model.parameters(), lr=LR, clip=clip, backend=backend)
    fusedopt.gradient_release(model, optimizer, clip="previous")
    expected = _by_hand(max_norms, order, first)
    for max_norm, (x, y), (end, norm) in zip(
        max_norms, batches(len(max_norms), 4), expected, strict=True
    ):
        clip.max_norm = max_norm
        loss_of(model, x.double(), y.double()).backward()
        optimizer.step()
        assert clip.last is not None
        torch.testing.assert_close(float(clip.last), norm, rtol=1e-6, atol=0)
        # The norm is kept in float32.
        torch.testing.assert_close(values(model), end, rtol=1e-6, atol=1e-9)


def test_a_pass_that_failed_leaves_nothing() -> None:
    """Norms of its gradients are not taken for those of the next."""
    model = _model()
    clip = fusedopt.GlobalNorm(0.1)
    optimizer = fusedopt.SGD(model.parameters(), lr=0.0, clip=clip, backend="reference")
    fusedopt.gradient_release(model, optimizer, clip="previous")
    x, y = (t.double() for t in batches(1, 4)[0])

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor) -> Tensor:
            return h.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            raise ArithmeticError("on purpose")

    loss_of(model, x, y).backward()
    norm = float(clip.last)  # type: ignore[arg-type]
    with pytest.raises(ArithmeticError):
        model[3](Failing.apply(model[:3](x))).sum().backward()
    assert float(clip.last) == norm
    loss_of(model, x, y).backward()
    assert float(clip.last) == norm


def test_gradients_that_were_kept_are_not_clipped_by_themselves() -> None:
    model = network()
    clip = fusedopt.GlobalNorm(0.1)
    optimizer = fusedopt.SGD(model.parameters(), lr=LR, clip=clip, backend="reference")
    release = fusedopt.gradient_release(model, optimizer, clip="previous")
    with release.accumulating():
        loss_of(model, *batches(1, 4)[0]).backward()
    before = values(model)
    with pytest.raises(RuntimeError, match="outside of accumulating"):
        optimizer.step()
    assert all(map(torch.equal, values(model), before))


def test_accumulated_gradients_have_one_norm() -> None:
    model, twin = _model(), _model()
    clip = fusedopt.GlobalNorm(0.1)
    optimizer = fusedopt.SGD(model.parameters(), lr=LR, clip=clip, backend="reference")
    release = fusedopt.gradient_release(model, optimizer, clip="previous")
    (x, y), (z, w) = [(a.double(), b.double()) for a, b in batches(2, 4)]
    with release.accumulating():
        loss_of(model, x, y).backward()
    loss_of(model, z, w).backward()
    (loss_of(twin, x, y) + loss_of(twin, z, w)).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in twin.parameters()])
    torch.testing.assert_close(float(clip.last), float(norm), rtol=1e-6, atol=0)


def _sharded(whole: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for layer in (whole[0], whole[3]):
        fully_shard(layer, mesh=mesh)
    fully_shard(whole, mesh=mesh)


def _in_two(rank: int) -> None:
    """FSDP2 calls the hooks of its shards when their gradients are reduced."""
    expected = _by_hand([0.1] * 4, 2.0, None)
    model = _model()
    _sharded(model)
    clip = fusedopt.GlobalNorm(0.1)
    optimizer = fusedopt.SGD(model.parameters(), lr=LR, clip=clip, backend="reference")
    fusedopt.gradient_release(model, optimizer, clip="previous")
    for (x, y), (end, norm) in zip(batches(4, 4), expected, strict=True):
        loss_of(model, x.double().chunk(2)[rank], y.double().chunk(2)[rank]).backward()
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        assert clip.last is not None and same_everywhere(clip.last)
        torch.testing.assert_close(float(clip.last), norm, rtol=1e-6, atol=0)
        full = [p.full_tensor() for p in model.parameters()]
        torch.testing.assert_close(full, end, rtol=1e-6, atol=1e-9)


def test_over_processes(tmp_path: Path) -> None:
    # Catches a norm of a shard alone.
    in_ranks(2, tmp_path, _in_two)


def _with_codecs(rank: int) -> None:
    for options in (
        {"state_dtype": "int8", "rounding": "stochastic"},
        {"master": "remainder8"},
    ):
        ends = []
        for released in (True, False):
            model = network().bfloat16()
            _sharded(model)
            optimizer = fusedopt.AdamW(model.parameters(), backend="reference", **options)
            if released:
                fusedopt.gradient_release(model, optimizer)
            for step, (x, y) in enumerate(batches(6, 4)):
                x, y = (t.bfloat16().chunk(2)[rank] for t in (x, y))
                # Every other step of two passes, reduced by the second alone.
                model.set_requires_gradient_sync(step % 2 == 1)
                loss_of(model, x, y).backward()
                if step % 2:
                    optimizer.step()
                    optimizer.zero_grad()
            ends.append([p.to_local().clone() for p in model.parameters()])
            own = [optimizer.state[p] for p in model.parameters()]
            kept = [x for state in own for k, x in sorted(state.items()) if k != "step"]
            ends.append([x.to_local().clone() for x in kept])
        assert all(map(torch.equal, ends[0], ends[2])) and all(map(torch.equal, ends[1], ends[3]))


def test_shards_have_the_bits_of_a_step(tmp_path: Path) -> None:
    """With their own accumulation, in which hooks are not called before gradients are reduced."""
    in_ranks(2, tmp_path, _with_codecs)
