"""SVAG between the steps: closures, schedulers and loss scalers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from contract import (
    DEVICE,
    FlagOnDevice,
    assert_same_bits,
    assert_same_state,
    assert_unchanged,
    groups_of,
    new_params,
    snapshot,
)
from marks import both_backends, numpy_may_warn
from svag_by_hand import Beside, draw, each_name, give, hold, made, on_backends, svag_step
from torch import Tensor
from torch.amp import GradScaler
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR

import fusedopt
from fusedopt import SVAG

# Steps through the optimizer


@on_backends
def test_step_of_the_optimizer_is_the_same(name: str, backend: str) -> None:
    # Catches a mix that svag.step makes and a scaler, which calls the optimizer's, does not.
    ends = []
    for through in ("svag", "optimizer"):
        _, svag = made(name, 2, backend=backend)
        for seed in (1, 3):
            hold(svag, seed)
            assert (svag if through == "svag" else svag.optimizer).step() is None
        ends.append(snapshot(svag.optimizer))
    assert_same_bits(*ends)


def test_step_hooks() -> None:
    # Catches a step that goes past the optimizer's own.
    _, svag = made("SGD", 2)
    calls = []
    svag.optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    svag.optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    hold(svag)
    svag.step()
    assert calls == ["before", "after"]


# Closures


def _closure(
    svag: SVAG, clear: Callable[[], Any], calls: list[int], first_seed: int
) -> Callable[[], float]:
    def closure() -> float:
        clear()
        assert torch.is_grad_enabled()
        seed = first_seed + len(calls)
        calls.append(seed)
        params = groups_of(svag.optimizer)
        give(params, draw(params, seed))
        return float(seed)

    return closure


@both_backends
@pytest.mark.parametrize("clear", ["optimizer", "svag", "by hand"])
def test_closure(clear: str, backend: str) -> None:
    # Catches a closure that is called once or a third time, one whose zero_grad, which every
    # closure has, drops the first gradient, and one that runs without autograd.
    (params, svag), (_, manual) = (made("Adam", 2, backend=backend) for _ in range(2))

    def by_hand() -> None:
        for p in params:
            p.grad = None

    clearing = {"optimizer": svag.optimizer.zero_grad, "svag": svag.zero_grad, "by hand": by_hand}
    for seed in (1, 5):
        calls: list[int] = []
        with torch.no_grad():
            losses = svag.step(_closure(svag, clearing[clear], calls, seed))
        assert losses == (float(seed), float(seed + 1))
        assert calls == [seed, seed + 1]
        hold(manual, seed)
        manual.step()
    assert_same_bits(snapshot(svag.optimizer), snapshot(manual.optimizer))


@pytest.mark.parametrize("failing", [0, 1])
def test_closure_that_raises(failing: int) -> None:
    # Catches a first gradient that is left behind for the next step, after a zero_grad even.
    params, svag = made("Adam", 2)
    calls: list[int] = []
    inner = _closure(svag, svag.optimizer.zero_grad, calls, 1)

    def closure() -> float:
        if len(calls) == failing:
            raise KeyError("no more batches")
        return inner()

    before = snapshot(svag.optimizer)[:3]
    with pytest.raises(KeyError, match="no more batches"):
        svag.step(closure)
    assert_same_bits(snapshot(svag.optimizer)[:3], before)
    svag.zero_grad()
    with pytest.raises(RuntimeError, match=r"hold\(\)"):
        svag.step()
    assert svag.step(_closure(svag, svag.optimizer.zero_grad, [], 7)) == (7.0, 8.0)


# Schedulers


@pytest.mark.parametrize(
    "scheduler",
    [lambda o: LambdaLR(o, lambda epoch: 1 / (1 + epoch)), lambda o: ExponentialLR(o, 0.5)],
    ids=["lambda", "exponential"],
)
@each_name
def test_schedulers(name: str, scheduler: Callable[[Any], Any]) -> None:
    # Catches a rate that is divided again at each step, one that is never read again, and a step
    # that the scheduler does not see (it then warns, and warnings are errors here).
    beside = Beside(name, 2)
    both = scheduler(beside.svag.optimizer), scheduler(beside.theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            beside.step()
            for one in both:
                one.step()
    assert both[0].get_last_lr() == pytest.approx(both[1].get_last_lr(), rel=1e-14)
    beside.check()


# Loss scalers

FILLED = ((3, 5), ())


def _scaler() -> GradScaler:
    return GradScaler(
        DEVICE.type, init_scale=64.0, growth_factor=4.0, backoff_factor=0.25, growth_interval=2
    )


def _spoil(gradients: Sequence[Tensor], value: float) -> None:
    gradients[0].view(-1)[1] = value


@numpy_may_warn
@on_backends
def test_loss_scaler(name: str, backend: str) -> None:
    # Catches one of the two left scaled, an overflow looked for in the last gradient alone, and a
    # state, a step count or a held gradient that a skipped step leaves behind.
    beside, scaler = Beside(name, 2, shapes=FILLED, backend=backend), _scaler()
    overflow = {0: (0, math.inf), 2: (1, math.nan), 3: (0, -math.inf), 4: (0, math.nan)}
    for step in range(7):
        pair = beside.draw()
        scaled = [[scaler.scale(g) for g in gradients] for gradients in pair]
        if step in overflow:
            which, value = overflow[step]
            _spoil(scaled[which], value)
        else:
            beside.oracle(*pair)
        copies = [[g.clone() for g in gradients] for gradients in scaled]
        before, versions = snapshot(beside.ours)[:3], [p._version for p in beside.params]
        give(beside.params, scaled[0])
        beside.svag.hold()
        give(beside.params, scaled[1])
        scaler.step(beside.svag.optimizer)
        scaler.update()
        if step in overflow:
            assert_same_bits(snapshot(beside.ours)[:3], before)
            if DEVICE.type == "cpu":  # elsewhere the host does not know of the overflow
                assert [p._version for p in beside.params] == versions
            assert step > 0 or not beside.ours.state
        assert_same_bits(scaled, copies)
        beside.svag.zero_grad()
        assert_same_state(beside.ours, beside.theirs, rtol=1e-12, atol=1e-13)
    beside.check()


@numpy_may_warn
@pytest.mark.parametrize("which", ["first", "second"])
def test_a_skipped_step_uses_up_both_gradients(which: str) -> None:
    # Catches a loop that clears p.grad itself, as model.zero_grad() does, and that breaks off at
    # its first overflow, with "a first gradient is held already".
    params = new_params(FILLED)
    svag, scaler = SVAG(fusedopt.Adam(params), 2), _scaler()
    first, second = draw(params, 1), draw(params, 2)
    _spoil(first if which == "first" else second, math.inf)
    give(params, first)
    svag.hold()
    give(params, second)
    scaler.scale(torch.ones((), device=DEVICE))
    scaler.step(svag.optimizer)
    scaler.update()
    give(params, draw(params, 3))
    svag.hold()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="stands in for a GPU")
@numpy_may_warn
@on_backends
def test_overflow_on_the_device(name: str, backend: str) -> None:
    # Catches a veto that the scaler's flag decides, which knows of the last gradient alone.
    beside = Beside(name, 2, shapes=FILLED, backend=backend)
    optimizer = beside.svag.optimizer
    for spoilt in ("first", None, "second", "first", None):
        pair = beside.draw()
        first, second = ([g * 8 for g in gradients] for gradients in pair)
        optimizer.grad_scale = torch.tensor([8.0]).as_subclass(FlagOnDevice)
        found = torch.tensor([float(spoilt == "second")])
        optimizer.found_inf = found.as_subclass(FlagOnDevice)
        if spoilt:
            _spoil(first if spoilt == "first" else second, math.inf)
        else:
            beside.oracle(*pair)
        svag_step(beside.svag, first, second)
        for p, q in zip(beside.params, beside.copies, strict=True):
            # 1 / grad_scale is exact for powers of two.
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-13)
    assert_same_state(beside.ours, beside.theirs, rtol=1e-12, atol=1e-13)


@both_backends
def test_loss_scaler_over_many_kinds_of_gradients(backend: str) -> None:
    # Catches a search for overflows that breaks off at an empty gradient, or at a second type.
    types = (torch.float32, torch.bfloat16, torch.float64)
    params = [new_params(((3,),), dtype)[0] for dtype in types]
    params += new_params(((0, 4), ()))
    svag, scaler = SVAG(fusedopt.SGD(params, lr=2.0, backend=backend), 2), _scaler()
    for spoilt in (None, 2, 1):
        start = [p.detach().clone() for p in params]
        first, second = ([scaler.scale(torch.ones_like(p)) for p in params] for _ in range(2))
        if spoilt is not None:
            first[spoilt][1] = math.nan
        give(params, first)
        svag.hold()
        give(params, second)
        scaler.step(svag.optimizer)
        scaler.update()
        svag.zero_grad()
        for p, old in zip(params, start, strict=True):
            expected = old if spoilt is not None else old - 1
            torch.testing.assert_close(p.detach(), expected)


def test_unscaling_one_of_two() -> None:
    # Catches a mix of a gradient that unscale_ has divided and one that it cannot reach.
    params, svag = made("Adam", 2)
    scaler = _scaler()
    scaler.scale(torch.ones((), device=DEVICE))
    hold(svag)
    scaler.unscale_(svag.optimizer)
    before = snapshot(svag.optimizer)
    with pytest.raises(RuntimeError, match="unscale_"):
        scaler.step(svag.optimizer)
    assert_unchanged(svag.optimizer, before)
