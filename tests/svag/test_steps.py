"""SVAG's steps against torch's optimizers fed with the mixed gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import DEVICE, SHAPES, assert_same_bits, new_params, snapshot
from marks import both_backends, numpy_may_warn
from svag_by_hand import (
    ELLS,
    EXACT,
    OPTIONS,
    Beside,
    draw,
    each_name,
    each_path,
    give,
    made,
    mix,
    on_backends,
    rescaled,
    svag_step,
)
from tolerances import TRAJECTORY, assert_close_ulps
from torch import Tensor
from torch.nn import Parameter
from variants_by_hand import LOOPS

import fusedopt
from fusedopt import SVAG


def _options(name: str, live: bool) -> dict[str, Any]:
    return {**OPTIONS[name], **({"capturable": True} if live else {})}


# Trajectories


@pytest.mark.parametrize(
    ("ell", "backend"), [*((ell, "reference") for ell in ELLS), (3.5, "triton")]
)
@each_name
def test_trajectory(name: str, ell: float, backend: str) -> None:
    # Catches any slip in the mix, the weights exchanged, or one coefficient not rescaled.
    beside = Beside(name, ell, backend=backend)
    beside.step(4)
    beside.check()


@on_backends
def test_several_groups(name: str, backend: str) -> None:
    # Catches the first group's numbers for all, and the sign of the gradient after the mix.
    groups: list[dict[str, Any]] = [{}, {"lr": 0.05, "weight_decay": 0.0}, {"maximize": True}]
    if name != "SGD":
        groups[1]["eps"] = 0.01
    beside = Beside(name, 2, groups=groups, shapes=((2, 3),), backend=backend)
    beside.step(3)
    beside.check()


@both_backends
@each_path
def test_hyper_parameters_on_the_device(name: str, live: bool, backend: str) -> None:
    # Catches a path that reads its coefficients from tensors, and takes one gradient.
    options = {**_options(name, live), "lr": torch.tensor(0.25, dtype=torch.float64)}
    params = new_params(dtype=torch.float64)
    svag = SVAG(getattr(fusedopt, name)(params, **options, backend=backend), 2)
    expected = rescaled(name, 2, {**OPTIONS[name], "lr": 0.25})
    copies = new_params(dtype=torch.float64)
    oracle = getattr(torch.optim, name)(copies, **expected, foreach=False)
    for seed in (1, 3, 5):
        first, second = draw(params, seed), draw(params, seed + 1)
        svag_step(svag, first, second)
        give(copies, mix(name, 2, first, second))
        oracle.step()
    for p, q, start in zip(params, copies, new_params(dtype=torch.float64), strict=True):
        # Coefficients formed on the device may be float32.
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-5)
        assert p.numel() == 0 or (p.detach() - start).abs().max() > 0.01


@both_backends
@pytest.mark.parametrize(("name", "option"), [("Adam", None), ("AdamW", None), ("RMSprop", True)])
def test_other_corrections(name: str, option: Any, backend: str) -> None:
    # Catches a mix that one variant of the kernel lacks.
    params, svag = made(name, 3.5, bias_correction=option, backend=backend)
    options = {**rescaled(name, 3.5, OPTIONS[name]), "bias_correction": option}
    loops = [LOOPS[name](p, **options) for p in params]
    for seed in (1, 3, 5):
        first, second = draw(params, seed), draw(params, seed + 1)
        svag_step(svag, first, second)
        for loop, g in zip(loops, mix(name, 3.5, first, second), strict=True):
            loop.step(g)
    for p, loop in zip(params, loops, strict=True):
        torch.testing.assert_close(p.detach().cpu(), loop.p, **EXACT)


@both_backends
def test_complex(backend: str) -> None:
    # Catches a mix of half of the elements.
    beside = Beside("Adam", 2, shapes=((2, 3),), dtype=torch.complex128, backend=backend)
    beside.step(3)
    beside.check()


# Parameters and gradients of different types; the loop below rounds to the stored one each step.
TYPES = (
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
)


@on_backends
def test_mixed_types(name: str, backend: str) -> None:
    # Catches a mix that is rounded to the parameter's or to the gradient's type before its use.
    params = [new_params(((17,),), stored, seed=3)[0] for stored, _ in TYPES]
    start = [p.detach().clone() for p in params]
    svag = SVAG(getattr(fusedopt, name)(params, **OPTIONS[name], backend=backend), 2)
    loops = [LOOPS[name](p, **rescaled(name, 2, OPTIONS[name])) for p in params]
    for seed in (1, 3, 5):
        first, second = (
            [draw([p], s, given)[0] for p, (_, given) in zip(params, TYPES, strict=True)]
            for s in (seed, seed + 1)
        )
        svag_step(svag, first, second)
        for loop, g in zip(loops, mix(name, 2, first, second), strict=True):
            loop.step(g)
    for p, loop, old in zip(params, loops, start, strict=True):
        expected = loop.p.to(p.dtype)
        at = f"{p.dtype}"
        largest = loop.largest["p"]
        assert_close_ulps(p.cpu(), expected, old.cpu(), TRAJECTORY[p.dtype], at, scale=largest)


@both_backends
def test_gradients_of_two_types(backend: str) -> None:
    # Catches a held gradient read as if it had the type of the last one.
    params = new_params(((5,), (7,)))
    svag = SVAG(fusedopt.SGD(params, lr=2.0, backend=backend), 2)
    start = [p.detach().clone() for p in params]
    first, second = draw(params, 1, torch.bfloat16), draw(params, 2)
    svag_step(svag, first, second)
    for p, old, g in zip(params, start, mix("SGD", 2, first, second), strict=True):
        torch.testing.assert_close(p.double(), old - g, rtol=1e-6, atol=1e-6)


@both_backends
def test_layouts(backend: str) -> None:
    # Catches a held gradient read in the order of another's strides.
    beside = Beside("SGD", 2, shapes=((3, 5), (3, 5), (3, 5)), backend=backend)
    shapes: list[Callable[[Tensor], Tensor]] = [
        lambda g: g.t().contiguous().t(),
        lambda g: g[:, :1].expand(3, 5),
        lambda g: torch.cat([g, g], 1)[:, ::2],
    ]
    for turn in range(3):
        first, second = beside.draw()
        first = [f(g) for f, g in zip(shapes, first, strict=True)]
        if turn == 1:
            first, second = second, first
        svag_step(beside.svag, first, second)
        beside.oracle(first, second)
    beside.check()


@both_backends
def test_buffers_that_change_places(backend: str) -> None:
    # Catches a prepared launch that goes on with the first held gradient's address.
    beside = Beside("Adam", 2, shapes=((4,), (2, 3)), backend=backend)
    buffers = beside.draw()
    for turn in range(4):
        first, second = buffers if turn % 2 else buffers[::-1]
        for number, g in enumerate([*first, *second]):
            g.copy_(draw([g], 10 * turn + number)[0])
        give(beside.params, first)
        beside.svag.hold()
        give(beside.params, second)
        beside.svag.step()
        beside.oracle([g.clone() for g in first], [g.clone() for g in second])
    beside.check()


@on_backends
def test_parameters_without_gradients_are_skipped(name: str, backend: str) -> None:
    # Catches a decay, a state or a step count of what no batch has reached; it comes in later.
    beside = Beside(name, 2, backend=backend)
    for turn in range(3):
        first, second = beside.draw()
        if turn < 2:
            first[0] = second[0] = None
        svag_step(beside.svag, first, second)
        beside.oracle(first, second)
        if turn == 1:
            assert torch.equal(beside.params[0], beside.start[0])
            assert beside.params[0] not in beside.ours.state
    beside.check()


# One gradient alone


@numpy_may_warn
@both_backends
@each_path
def test_ell_of_one_is_the_first_gradient(name: str, live: bool, backend: str) -> None:
    # Catches 0 * inf, a product or sum that is rounded, and the second gradient in the first's
    # place: every bit has to be that of the optimizer without SVAG.
    runs = []
    for ell in (None, 1):
        params = new_params(((3, 5), (9,)))
        optimizer = getattr(fusedopt, name)(params, **_options(name, live), backend=backend)
        svag = None if ell is None else SVAG(optimizer, ell)
        for seed in (1, 2):
            first, second = draw(params, seed), draw(params, 50 + seed)
            for g in second:
                g.view(-1)[1:5] = torch.tensor([math.inf, -math.inf, math.nan, 1e30])
            if svag is not None:
                svag_step(svag, first, second)
            else:
                give(params, first)
                optimizer.step()
                optimizer.zero_grad()
        for group in optimizer.param_groups:
            group.pop("svag_ell", None)
        runs.append(snapshot(optimizer))
    assert_same_bits(runs[1], runs[0])


@each_name
def test_first_gradient_that_is_not_finite(name: str) -> None:
    # Catches the wrong of the two left out where its weight is 0.
    params, svag = made(name, 1)
    first, second = draw(params, 1), draw(params, 2)
    first[0][0, 0] = math.nan
    svag_step(svag, first, second)
    assert params[0][0, 0].isnan()
    assert params[0].isnan().sum() == 1


@on_backends
def test_gradients_are_not_written(name: str, backend: str) -> None:
    # Catches a mix written into either gradient, where a user reads it, or the next step does.
    params, svag = made(name, 2, backend=backend)
    for seed in (1, 3):
        first, second = draw(params, seed), draw(params, seed + 1)
        give(params, first)
        svag.hold()
        assert [p.grad for p in params] == [None] * len(params)
        give(params, second)
        svag.step()
        for p, g in zip(params, second, strict=True):
            assert p.grad is g
        assert [g._version for g in (*first, *second)] == [0] * 2 * len(params)
        assert_same_bits([first, second], [draw(params, seed), draw(params, seed + 1)])


def test_backward_does_not_reach_the_held_gradient() -> None:
    # Catches a held gradient that the next backward is added to: real backwards, no step by hand.
    start = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, device=DEVICE)
    w = Parameter(start.clone())
    svag = SVAG(fusedopt.SGD([w], lr=0.25), 2)
    expected = start.clone()
    for batch in range(3):
        x, y = draw([w], 2 * batch), draw([w], 2 * batch + 1)
        ((w * x[0]) ** 2).sum().backward()
        svag.hold()
        ((w * y[0]) ** 2).sum().backward()
        svag.step()
        svag.zero_grad()
        (g,) = mix("SGD", 2, [2 * expected * x[0] ** 2], [2 * expected * y[0] ** 2])
        expected = expected - 0.125 * g
    torch.testing.assert_close(w.detach(), expected, **EXACT)


# Launches


class _Launches:
    """Stands in for the launch: counts, and runs nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from fusedopt.backends import triton

        self.count = 0
        monkeypatch.setattr(triton, "launch", self)

    def __call__(self, *arguments: Any, **meta: Any) -> None:
        self.count += 1


@each_path
def test_launches(name: str, live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Catches a mix made before the update, tensor by tensor or in a launch of its own.
    launches = _Launches(monkeypatch)
    for types in ((torch.float32,), (torch.float32, torch.bfloat16)):
        params = [
            Parameter(torch.zeros(SHAPES[i % 4] + (2,), dtype=types[i % len(types)], device=DEVICE))
            for i in range(60)
        ]
        groups = [{"params": params[:20]}, {"params": params[20:], "lr": 0.3}]
        optimizer = getattr(fusedopt, name)(groups, **_options(name, live), backend="triton")
        svag = SVAG(optimizer, 2)
        for seed in (1, 3):
            launches.count = 0
            svag_step(svag, draw(params, seed), draw(params, seed + 1))
            assert launches.count == len(types)


def test_the_gradient_itself_is_held() -> None:
    # Catches a copy of them: what is held is what backward has made. (Nothing sees .data written.)
    params, svag = made("SGD", 2)
    first = draw(params, 1)
    give(params, first)
    svag.hold()
    first[0].data.zero_()
    give(params, [torch.zeros_like(p) for p in params])
    start = params[0].detach().clone()
    svag.step()
    decay = OPTIONS["SGD"]["lr"] / 2 * OPTIONS["SGD"]["weight_decay"]
    torch.testing.assert_close(params[0].detach(), start * (1 - decay), **EXACT)
