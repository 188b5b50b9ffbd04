"""``torch.amp.GradScaler``: an overflow is no step, and nothing is left of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from contract import (
    DEVICE,
    Case,
    FlagOnDevice,
    Pair,
    assert_same_bits,
    assert_same_state,
    assert_unchanged,
    each_case_on_backends,
    each_class,
    each_class_on_backends,
    groups_of,
    snapshot,
)
from torch.amp import GradScaler
from torch.optim import Optimizer

import fusedopt


def _pair(case: Case, **options: Any) -> Pair:
    """Fold loss scaling into the step, as torch does with ``fused=True``."""
    pair = Pair(case, **options)
    pair.ours.param_groups[0]["fused"] = True
    return pair


def _scalers(count: int = 2) -> list[GradScaler]:
    # Grows every other step and shrinks on overflow, so that the scale is never the same long.
    return [
        GradScaler(DEVICE.type, init_scale=64.0, growth_factor=4.0, growth_interval=2)
        for _ in range(count)
    ]


def _spoil(optimizer: Optimizer, value: float, place: int = 0) -> None:
    groups_of(optimizer)[place].grad.view(-1)[0] = value


def _scaled_step(
    pair: Pair, scalers: list[GradScaler], *, spoilt: float | None = None, unscale: bool = False
) -> None:
    """Scale equal gradients, spoil one element, and let each scaler step its optimizer."""
    pair.backward()
    for optimizer, scaler in zip(pair.both, scalers, strict=True):
        for p in groups_of(optimizer):
            p.grad = scaler.scale(p.grad)
        if spoilt is not None:
            _spoil(optimizer, spoilt)
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")
        scaler.update()
    assert scalers[0].get_scale() == scalers[1].get_scale()


@pytest.mark.parametrize("unscale", [False, True], ids=["folded", "unscale_"])
@each_case_on_backends
def test_trajectory_with_overflows(case: Case, backend: str, unscale: bool) -> None:
    """At the first step, in the middle and twice in a row, by inf and by nan."""
    pair, scalers = _pair(case, backend=backend), _scalers()
    overflow = {0: math.inf, 3: math.nan, 4: -math.inf, 7: math.inf}
    for step in range(10):
        _scaled_step(pair, scalers, spoilt=overflow.get(step), unscale=unscale)
        assert_same_state(pair.ours, pair.theirs)
    pair.check()


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
@each_case_on_backends
def test_an_overflow_changes_nothing(case: Case, backend: str, capturable: bool) -> None:
    """Parameters, states, step counts, and whether there are states at all."""
    pair, scalers = _pair(case, backend=backend), _scalers()
    if capturable:
        pair.ours.param_groups[0]["capturable"] = True
    for taken in range(3):
        pair.backward()
        for p in groups_of(pair.ours):
            p.grad = scalers[0].scale(p.grad)
        _spoil(pair.ours, math.inf)
        before = snapshot(pair.ours)
        versions = [p._version for p in groups_of(pair.ours)]
        scalers[0].step(pair.ours)
        scalers[0].update()
        assert_unchanged(pair.ours, before)
        if DEVICE.type == "cpu":  # elsewhere the host does not know of the overflow
            assert [p._version for p in groups_of(pair.ours)] == versions
        if taken == 0:
            assert not pair.ours.state
        _scaled_step(pair, _scalers())


@each_class_on_backends
def test_gradients_stay_scaled_and_are_not_written(case: Case, backend: str) -> None:
    pair, (scaler, _) = _pair(case, backend=backend), _scalers()
    pair.backward()
    for p in groups_of(pair.ours):
        p.grad = scaler.scale(p.grad)
    before = [p.grad.clone() for p in groups_of(pair.ours)]
    scaler.step(pair.ours)
    assert_same_bits([p.grad for p in groups_of(pair.ours)], before)


@each_class_on_backends
def test_plain_steps_and_scaled_ones_in_turn(case: Case, backend: str) -> None:
    """Catches a scale or an overflow flag that outlives its step."""
    pair, scalers = _pair(case, backend=backend), _scalers()
    for kind in ("scaled", "plain", "spoilt", "plain", "plain", "scaled", "plain"):
        if kind == "plain":
            pair.step()
        else:
            _scaled_step(pair, scalers, spoilt=math.inf if kind == "spoilt" else None)
        assert_same_state(pair.ours, pair.theirs)
    pair.check()


@each_class
def test_half_precision_gradients_of_large_scale(case: Case) -> None:
    """Unscaling happens in the compute type: the product with 1/scale is never rounded."""
    shapes = [(40,)]
    pair = _pair(case, shapes=shapes, dtype=torch.float64)
    half = case.ours(
        [torch.nn.Parameter(p.detach().half()) for p in groups_of(pair.ours)],
        **case.options,
        backend="reference",
    )
    for p, q in zip(groups_of(half), groups_of(pair.theirs), strict=True):
        q.data = p.detach().double()
    scale = 2.0**13
    pair.backward()
    for p, q in zip(groups_of(half), groups_of(pair.theirs), strict=True):
        p.grad = (q.grad * scale).half()
        q.grad = p.grad.double() / scale
    half.grad_scale = torch.tensor([scale], device=DEVICE)
    half.found_inf = torch.zeros(1, device=DEVICE)
    half.step()
    pair.theirs.step()
    for p, q in zip(groups_of(half), groups_of(pair.theirs), strict=True):
        torch.testing.assert_close(p.double(), q.detach(), rtol=1e-3, atol=1e-3)


@each_class
def test_scaler_hands_over_its_scale(case: Case) -> None:
    """With ``fused=True``, and where clipping or statistics need the scale; not by default.

    By default others, such as trainers, may unscale and clip by hand.
    """
    assert not case.ours([torch.nn.Parameter(torch.ones(1))])._step_supports_amp_scaling
    clipped = case.ours([torch.nn.Parameter(torch.ones(1))], clip=fusedopt.GlobalNorm(1.0))
    assert clipped._step_supports_amp_scaling
    pair, (scaler, _) = _pair(case), _scalers()
    seen: list[Any] = []
    original = pair.ours.step

    def step(*args: Any, **kwargs: Any) -> Any:
        seen.append((float(pair.ours.grad_scale), float(pair.ours.found_inf)))
        return original(*args, **kwargs)

    pair.ours.step = step
    pair.backward()
    for p in groups_of(pair.ours):
        p.grad = scaler.scale(p.grad)
    scaler.step(pair.ours)
    assert seen == [(64.0, 0.0)]


@each_class_on_backends
def test_found_inf_alone_and_grad_scale_alone(case: Case, backend: str) -> None:
    """After ``unscale_`` the scaler sets ``grad_scale`` to None, and it may be the only one."""
    pair = _pair(case, backend=backend)
    pair.backward()
    before = snapshot(pair.ours)
    pair.ours.grad_scale, pair.ours.found_inf = None, torch.ones(1, device=DEVICE)
    pair.ours.step()
    assert_unchanged(pair.ours, before)
    pair.ours.found_inf = None
    pair.ours.grad_scale = torch.full((), 8.0, device=DEVICE)
    for p in groups_of(pair.ours):
        p.grad = p.grad * 8
    pair.ours.step()
    pair.theirs.step()
    del pair.ours.grad_scale, pair.ours.found_inf
    pair.step()
    pair.check()


@each_class_on_backends
def test_two_optimizers_of_one_scaler(case: Case, backend: str) -> None:
    """Each has its own overflow."""
    first, second = (_pair(case, backend=backend) for _ in range(2))
    scalers = _scalers()
    for step in range(3):
        for pair in (first, second):
            pair.backward()
        for side, scaler in enumerate(scalers):
            for pair in (first, second):
                optimizer = pair.both[side]
                for p in groups_of(optimizer):
                    p.grad = scaler.scale(p.grad)
                if pair is first and step == 1:
                    _spoil(optimizer, math.inf, 3)
            scaler.step(first.both[side])
            scaler.step(second.both[side])
            scaler.update()
    for pair in (first, second):
        pair.check()


@each_case_on_backends
@pytest.mark.parametrize("max_norm", [0.3, 1e6])
def test_with_clipping(case: Case, backend: str, max_norm: float) -> None:
    """Folded in, it is ``unscale_``, ``clip_grad_norm_`` and ``step``: the norm is unscaled."""
    clip = fusedopt.GlobalNorm(max_norm)
    pair = _pair(case, backend=backend, ours_only={"clip": clip})
    scalers = _scalers()
    overflow = {0: math.inf, 3: math.nan}
    for step in range(6):
        pair.backward()
        for optimizer, scaler in zip(pair.both, scalers, strict=True):
            for p in groups_of(optimizer):
                p.grad = scaler.scale(p.grad)
            if step in overflow:
                _spoil(optimizer, overflow[step])
        scalers[1].unscale_(pair.theirs)
        total = torch.nn.utils.clip_grad_norm_(groups_of(pair.theirs), max_norm)
        for optimizer, scaler in zip(pair.both, scalers, strict=True):
            scaler.step(optimizer)
            scaler.update()
        if step not in overflow:
            torch.testing.assert_close(clip.last, total, rtol=1e-5, atol=0)
        assert_same_state(pair.ours, pair.theirs)
    pair.check()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="stands in for a GPU")
@each_case_on_backends
def test_an_overflow_flag_on_the_device(case: Case, backend: str) -> None:
    """The veto is then the kernel's, and step counts advance by 1 - found_inf."""
    pair = _pair(case, backend=backend)
    for step, overflow in enumerate((1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0)):
        pair.backward()
        pair.ours.grad_scale = torch.tensor([2.0]).as_subclass(FlagOnDevice)
        pair.ours.found_inf = torch.tensor([overflow]).as_subclass(FlagOnDevice)
        for p in groups_of(pair.ours):
            p.grad = p.grad * 2
        if overflow:
            _spoil(pair.ours, math.inf)
        else:
            pair.theirs.step()
        pair.ours.step()
        if step == 0:
            assert not pair.ours.state
        assert_same_state(pair.ours, pair.theirs)
    pair.check()
