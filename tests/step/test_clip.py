"""``clip=GlobalNorm``: ``clip_grad_norm_`` and the plain step in one, gradients untouched."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from contract import (
    ADAM,
    ADAMW,
    DEVICE,
    RMSPROP,
    SGD,
    Case,
    Pair,
    assert_same_bits,
    assert_same_state,
    assert_unchanged,
    each_case_on_backends,
    each_class,
    each_class_on_backends,
    groups_of,
    new_params,
    set_gradients,
    snapshot,
)
from marks import both_backends, numpy_may_warn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from fusedopt import GlobalNorm

each_norm = pytest.mark.parametrize("norm_type", [2.0, math.inf], ids=["two", "inf"])


def _pair(case: Case, clip: GlobalNorm, **options: Any) -> Pair:
    return Pair(case, ours_only={"clip": clip}, **options)


def _clipped_step(pair: Pair, clip: GlobalNorm, scale: float = 1.0) -> torch.Tensor:
    """Step ours, and torch after ``clip_grad_norm_``; return torch's norm."""
    pair.backward(scale)
    return _clipped_step_with(pair, clip)


def _clipped_step_with(pair: Pair, clip: GlobalNorm) -> torch.Tensor:
    pair.ours.step()
    # torch raises for the maximum over an empty gradient.
    params = [p for p in groups_of(pair.theirs) if p.numel() > 0]
    total = clip_grad_norm_(params, clip.max_norm, clip.norm_type, foreach=False)
    pair.theirs.step()
    return total


# Against torch


@each_norm
@each_case_on_backends
def test_trajectory(case: Case, backend: str, norm_type: float) -> None:
    """Bounds that bite and that do not, over two groups."""
    clip = GlobalNorm(0.5, norm_type=norm_type)
    pair = _pair(case, clip, backend=backend, groups=({}, {"lr": 0.05}))
    for max_norm in (0.5, 0.5, 1e4, 0.5):
        clip.max_norm = max_norm
        total = _clipped_step(pair, clip)
        assert clip.last.shape == ()
        assert (total > max_norm) == (max_norm == 0.5)
        torch.testing.assert_close(clip.last, total.to(torch.float32), rtol=1e-6, atol=0)
    pair.check()


@each_norm
@both_backends
def test_small_norms_show_the_constant_in_the_denominator(backend: str, norm_type: float) -> None:
    """factor = max_norm / (norm + 1e-6): at a norm of 1e-5 its absence is a tenth."""
    clip = GlobalNorm(1e-6, norm_type=norm_type)
    pair = _pair(SGD, clip, backend=backend, shapes=[(7,)], lr=1e4, weight_decay=0, momentum=0)
    total = _clipped_step(pair, clip, 1e-5 / 3)
    assert 1e-6 < total < 2e-5
    pair.check()


@both_backends
@pytest.mark.parametrize("ratio", [0.99, 1.0, 1.01])
def test_norms_close_to_the_bound(backend: str, ratio: float) -> None:
    """Catches a factor above one: gradients below the bound are not blown up to it."""
    (g,) = new_params([(9,)], seed=4)
    clip = GlobalNorm(g.norm().item() / ratio)
    pair = _pair(SGD, clip, backend=backend, shapes=[(9,)])
    for p in (*groups_of(pair.ours), *groups_of(pair.theirs)):
        p.grad = g.detach().clone()
    _clipped_step_with(pair, clip)
    assert_same_state(pair.ours, pair.theirs)
    assert_same_bits(groups_of(pair.ours)[0].grad, g.detach())


@numpy_may_warn
@each_norm
@both_backends
@pytest.mark.parametrize("scale", [1e30, 1e15, 1e-15, 1e-20, 1e-25])
def test_huge_and_tiny_gradients(backend: str, norm_type: float, scale: float) -> None:
    clip = GlobalNorm(0.5, norm_type=norm_type)
    pair = _pair(SGD, clip, backend=backend, lr=0.1 if scale > 1 else 0.1 / scale)
    for _ in range(2):
        total = _clipped_step(pair, clip, scale)
        # Squares below float32's range are zero to torch; ours may see them.
        torch.testing.assert_close(clip.last, total, rtol=1e-5, atol=1e-24)
    pair.check()


@numpy_may_warn
@each_norm
@both_backends
@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_not_finite(
    backend: str, norm_type: float, value: float, place: int
) -> None:
    """As torch: nan makes all parameters nan, inf makes its own element nan and the rest zero."""
    clip = GlobalNorm(0.5, norm_type=norm_type)
    pair = _pair(SGD, clip, backend=backend)
    pair.backward()
    for optimizer in pair.both:
        groups_of(optimizer)[place].grad.view(-1)[-1] = value
    total = _clipped_step_with(pair, clip)
    torch.testing.assert_close(clip.last, total, equal_nan=True)
    ours, theirs = (groups_of(o) for o in pair.both)
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=3e-5, atol=3e-6)


@each_norm
@both_backends
def test_norm_over_mixed_types(backend: str, norm_type: float) -> None:
    """Each gradient in its own precision, and the factor in the compute type of its parameter.

    torch rounds the norm of a half precision tensor to that type, so the oracle is the norm of
    the same gradients in float64, and one update in float64.
    """
    types = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    params = [
        new_params([(1030,), (3, 4)], t, seed)[i] for seed, t in enumerate(types) for i in (0, 1)
    ]
    clip = GlobalNorm(0.5, norm_type=norm_type)
    ours = SGD.ours(params, lr=3.0, clip=clip, backend=backend)
    wide = [torch.nn.Parameter(p.detach().double()) for p in params]
    theirs = SGD.theirs(wide, lr=3.0, foreach=False)
    for seed in range(1, 3):
        set_gradients(params, seed)
        for p, q in zip(params, wide, strict=True):
            q.data, q.grad = p.detach().double(), p.grad.double()
        ours.step()
        total = clip_grad_norm_(wide, 0.5, norm_type)
        theirs.step()
        torch.testing.assert_close(clip.last.double(), total, rtol=1e-6, atol=0)
        for p, q in zip(params, wide, strict=True):
            unit = max(torch.finfo(p.dtype).eps, 1e-12)
            torch.testing.assert_close(p.double(), q.detach(), rtol=2 * unit, atol=2 * unit)


@both_backends
def test_float64_parameters_see_the_factor_in_full(backend: str) -> None:
    clip = GlobalNorm(0.5)
    pair = _pair(ADAM, clip, backend=backend, dtype=torch.float64)
    for _ in range(3):
        _clipped_step(pair, clip)
    pair.check(1e-13, 1e-13)


@each_norm
@both_backends
def test_gradients_of_other_layouts(backend: str, norm_type: float) -> None:
    """Transposed, with holes, expanded, at an odd address, empty, scalar, complex apart."""
    clip = GlobalNorm(0.5, norm_type=norm_type)
    pair = _pair(ADAMW, clip, backend=backend, shapes=[(8, 6)] * 4 + [(0, 3), ()])
    for _ in range(3):
        pair.backward()
        for optimizer in pair.both:
            p, q, r, s, *_ = groups_of(optimizer)
            p.grad = p.grad.t().contiguous().t()
            q.grad = torch.stack((q.grad, q.grad), dim=-1)[..., 0]
            s.grad = torch.cat((s.grad.new_full((1,), 1e6), s.grad.flatten()))[1:].view(8, 6)
        pair.ours.param_groups[0]["params"][2].grad = r.grad[:1].expand(8, 6)
        pair.theirs.param_groups[0]["params"][2].grad = r.grad[:1].repeat(8, 1)
        total = _clipped_step_with(pair, clip)
        torch.testing.assert_close(clip.last, total, rtol=1e-6, atol=0)
    pair.check()


@each_norm
@both_backends
def test_complex_gradients(backend: str, norm_type: float) -> None:
    clip = GlobalNorm(0.5, norm_type=norm_type)
    pair = _pair(ADAM, clip, backend=backend, shapes=[(7,), (2, 3)], dtype=torch.complex64)
    for _ in range(3):
        _clipped_step(pair, clip)
    if norm_type == 2.0:
        pair.check()


@both_backends
def test_empty_tensors_alone(backend: str) -> None:
    clip = GlobalNorm(0.5)
    (p,) = new_params([(0, 3)])
    optimizer = ADAM.ours([p], clip=clip, backend=backend)
    for _ in range(2):
        set_gradients([p], 1)
        optimizer.step()
    assert clip.last.item() == 0.0
    assert optimizer.state[p]["step"].item() == 2


@each_class_on_backends
def test_norm_is_over_the_gradients_that_there_are(case: Case, backend: str) -> None:
    """Gradients that disappear leave the norm; one of zeros makes it zero."""
    clip = GlobalNorm(0.5)
    pair = _pair(case, clip, backend=backend)
    for absent in ((0, 3), (), (1, 2)):
        pair.backward()
        for optimizer in pair.both:
            for place in absent:
                groups_of(optimizer)[place].grad = None
        total = _clipped_step_with(pair, clip)
        torch.testing.assert_close(clip.last, total, rtol=1e-6, atol=0)
    pair.check()
    _clipped_step(pair, clip, 0.0)
    assert clip.last.item() == 0.0
    assert_same_state(pair.ours, pair.theirs)


@each_norm
def test_more_partial_norms_than_one_block_of_the_second_stage(
    norm_type: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusedopt.kernels import norms

    monkeypatch.setattr(norms, "REDUCE_BLOCK", 4)
    clip = GlobalNorm(0.5, norm_type=norm_type)
    pair = _pair(SGD, clip, backend="triton", shapes=[(n,) for n in range(1, 10)])
    for _ in range(2):
        total = _clipped_step(pair, clip)
        torch.testing.assert_close(clip.last, total, rtol=1e-5, atol=0)
    pair.check()


@numpy_may_warn
@each_norm
@pytest.mark.parametrize("spoilt", [None, math.inf, math.nan])
def test_chunks_of_several_pieces(
    norm_type: float, spoilt: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole chunks, chunks that end in any of their pieces, and within one."""
    from fusedopt.kernels import norms

    monkeypatch.setattr(norms, "NORM_PIECE", 4)
    monkeypatch.setattr(norms, "NORM_BLOCK", 16)
    clip = GlobalNorm(0.5, norm_type=norm_type)
    shapes = [(n,) for n in (1, 4, 5, 13, 16, 32, 39)]
    pair = _pair(SGD, clip, backend="triton", shapes=shapes, lr=0.1, weight_decay=0, momentum=0)
    pair.backward()
    # The largest is in a piece behind the first, and what is spoilt in the first of a tensor.
    for optimizer in pair.both:
        gradients = [p.grad for p in groups_of(optimizer)]
        gradients[-1][37] = -9.0
        if spoilt is not None:
            gradients[-2][2] = spoilt
    total = _clipped_step_with(pair, clip)
    torch.testing.assert_close(
        clip.last, total.to(torch.float32), rtol=1e-6, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("tensors", [1, 10_000])
def test_a_billion_parameters_take_the_second_stage_few_turns(tensors: int) -> None:
    """Of as many elements, these are the most partial norms: every chunk but the last is whole."""
    from fusedopt.kernels import norms

    each = 1_000_000_000 // tensors
    partials = tensors * norms.partial_count(each)
    assert norms.reduce_turns(partials) <= 32
    most = 1_000_000_000 // norms.NORM_BLOCK + tensors
    assert partials <= most and norms.reduce_turns(most) <= 32


@both_backends
def test_capturable(backend: str) -> None:
    clip = GlobalNorm(0.5)
    pair = _pair(ADAMW, clip, backend=backend)
    pair.ours.param_groups[0]["capturable"] = True
    for max_norm in (0.5, 0.5, 0.1):
        clip.max_norm = max_norm
        _clipped_step(pair, clip)
    pair.check()


@both_backends
def test_groups_of_which_one_is_capturable(backend: str) -> None:
    """Two step counters and two tables, but one norm."""
    clip = GlobalNorm(0.5)
    pair = _pair(ADAMW, clip, backend=backend, groups=({}, {"lr": 0.05}))
    pair.ours.param_groups[1]["capturable"] = True
    for _ in range(3):
        total = _clipped_step(pair, clip)
        torch.testing.assert_close(clip.last, total, rtol=1e-6, atol=0)
    pair.check()


# Between steps


@each_class_on_backends
def test_the_bound_changed_between_steps(case: Case, backend: str) -> None:
    clip = GlobalNorm(0.5)
    pair = _pair(case, clip, backend=backend)
    for max_norm, norm_type in ((0.5, 2.0), (0.1, 2.0), (math.inf, 2.0), (0.3, math.inf)):
        clip.max_norm, clip.norm_type = max_norm, norm_type
        _clipped_step(pair, clip)
        assert_same_state(pair.ours, pair.theirs)
    pair.check()


@each_class_on_backends
def test_clipping_switched_on_and_off(case: Case, backend: str) -> None:
    """Catches a factor that outlives the clipping."""
    clip = GlobalNorm(0.1)
    pair = _pair(case, clip, backend=backend)
    for on in (True, False, False, True, False):
        pair.ours.clip = clip if on else None
        if on:
            _clipped_step(pair, clip)
        else:
            pair.step()
        assert_same_state(pair.ours, pair.theirs)
    pair.check()


@each_norm
@both_backends
def test_the_norm_has_the_same_bits_in_every_run(backend: str, norm_type: float) -> None:
    seen = set()
    for run in range(4):
        torch.empty(7 * run + 1)  # so that addresses differ between the runs
        clip = GlobalNorm(0.5, norm_type=norm_type)
        optimizer = SGD.ours(new_params(), clip=clip, backend=backend)
        set_gradients(groups_of(optimizer), 3)
        for _ in range(2):
            optimizer.step()
            seen.add(clip.last.item())
    assert len(seen) == 1


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "every second"])
def test_the_norm_of_many_elements_on_a_processor(layout: str) -> None:
    """torch's own float32 norm on a CPU is off by 4e-4 at ten million elements."""
    gradient = torch.randn(4000, 2500)
    if layout == "transposed":
        gradient = gradient.t()
    elif layout == "every second":
        gradient = gradient.new_zeros(4000, 5000)[:, ::2].copy_(gradient)
    expected = gradient.double().norm().item()
    p = torch.nn.Parameter(torch.zeros(gradient.shape))
    p.grad = gradient
    clip = GlobalNorm(1.0)
    SGD.ours([p], lr=1.0, backend="reference", clip=clip).step()
    assert clip.last.item() == pytest.approx(expected, rel=1e-5)
    # Nothing left out and nothing taken twice, in the update either.
    torch.testing.assert_close(p.detach(), -gradient / expected, rtol=1e-5, atol=0.0)


def test_last_is_none_before_and_a_scalar_after() -> None:
    clip = GlobalNorm(0.5)
    assert clip.last is None
    optimizer = SGD.ours(new_params(), clip=clip)
    optimizer.step()  # no gradients, no norm
    set_gradients(groups_of(optimizer), 1)
    optimizer.step()
    assert clip.last.dtype == torch.float32 and clip.last.shape == ()
    assert clip.last.device.type == DEVICE.type


# error_if_nonfinite


def _refuses(optimizer: Optimizer, value: float, place: int) -> None:
    """The step raises and leaves everything, by value and by structure, as it was."""
    set_gradients(groups_of(optimizer), 99)
    groups_of(optimizer)[place].grad.view(-1)[0] = value
    before, saved = snapshot(optimizer), optimizer.state_dict()
    states = [id(optimizer.state.get(p)) for p in groups_of(optimizer)]
    versions = [p._version for p in groups_of(optimizer)]
    with pytest.raises(RuntimeError, match=r"norm .*(nan|inf)"):
        optimizer.step()
    assert_unchanged(optimizer, before)
    assert [id(optimizer.state.get(p)) for p in groups_of(optimizer)] == states
    assert [p._version for p in groups_of(optimizer)] == versions
    after = optimizer.state_dict()
    assert after["state"].keys() == saved["state"].keys()
    assert after["param_groups"] == saved["param_groups"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@each_norm
@each_case_on_backends
def test_error_if_nonfinite(case: Case, backend: str, norm_type: float, value: float) -> None:
    """At the first step, when states are yet to be made, and later."""
    clip = GlobalNorm(0.5, norm_type=norm_type, error_if_nonfinite=True)
    pair = _pair(case, clip, backend=backend, shapes=[(5,), ()])
    _refuses(pair.ours, value, 1)
    for _ in range(2):
        _clipped_step(pair, clip)
        _refuses(pair.ours, value, 0)
    pair.check()


@both_backends
@pytest.mark.parametrize(
    ("case", "option"),
    [(ADAM, {"amsgrad": True}), (RMSPROP, {"momentum": 0.5}), (RMSPROP, {"centered": True})],
    ids=["amsgrad", "momentum", "centered"],
)
def test_error_where_one_state_is_yet_to_be_made(
    case: Case, option: dict[str, Any], backend: str
) -> None:
    """Catches taking the averages of many steps back together with the new state."""
    clip = GlobalNorm(0.5, error_if_nonfinite=True)
    pair = _pair(case, clip, backend=backend, shapes=[(5,), ()])
    for _ in range(2):
        _clipped_step(pair, clip)
    pair.ours.param_groups[0].update(option)
    _refuses(pair.ours, math.nan, 0)


@both_backends
def test_error_where_one_parameter_is_new(backend: str) -> None:
    clip = GlobalNorm(0.5, error_if_nonfinite=True)
    pair = _pair(ADAM, clip, backend=backend, shapes=[(5,), ()])
    pair.backward()
    for optimizer in pair.both:
        groups_of(optimizer)[1].grad = None
    _clipped_step_with(pair, clip)
    _refuses(pair.ours, math.inf, 0)
    _clipped_step(pair, clip)
    pair.check()


@each_class
def test_a_finite_norm_is_no_error(case: Case) -> None:
    clip = GlobalNorm(0.5, error_if_nonfinite=True)
    pair = _pair(case, clip)
    for _ in range(3):
        _clipped_step(pair, clip)
    pair.check()


# Arguments


@pytest.mark.parametrize("max_norm", [0, 0.0, -1.0, math.nan, -math.inf])
def test_bounds_that_make_no_sense(max_norm: float) -> None:
    with pytest.raises(ValueError, match="max_norm"):
        GlobalNorm(max_norm)


@pytest.mark.parametrize("norm_type", [1, 0, -1.0, 3, math.nan, -math.inf])
def test_norms_that_are_not_there(norm_type: float) -> None:
    with pytest.raises(ValueError, match="norm_type"):
        GlobalNorm(1.0, norm_type=norm_type)


def test_a_tensor_as_bound_is_refused_with_advice() -> None:
    with pytest.raises(TypeError, match="float"):
        GlobalNorm(torch.tensor(1.0))


def test_repr_rebuilds_it() -> None:
    clip = GlobalNorm(0.5, norm_type=math.inf, error_if_nonfinite=True)
    twin = eval(repr(clip), {"GlobalNorm": GlobalNorm, "inf": math.inf})
    assert twin.config() == clip.config()
