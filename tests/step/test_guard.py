"""``guard=SpikeGuard``: what it decides, and that a step left out leaves no trace."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from marks import both_backends, numpy_may_warn
from spikes import Spikes, norm_of, spiky
from torch import Tensor

import fusedopt
from fusedopt import GlobalNorm, SpikeGuard
from fusedopt.backends import triton as launching

SHAPES = [(5,), (3, 2)]
SETTING = (2.5, 8, 3)
# Counts on the host, where the decision is read, and on the device, where nobody does.
each_place = pytest.mark.parametrize("live", [False, True], ids=["host", "device"])
CLIPS = (None, (0.5, 2.0), (math.inf, math.inf))
RUNS = [("reference", live, clip) for live in (False, True) for clip in CLIPS]
RUNS += [("triton", False, CLIPS[0]), ("triton", True, CLIPS[1]), ("triton", True, CLIPS[2])]
# The twin takes a norm of each tensor; the kernels round sums of squares in float32.
ROUNDING = 1e-4


def make(cls: Any = fusedopt.AdamW, guard: Any = SETTING, **options: Any) -> tuple[list, Any]:
    drawn = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(shape, generator=drawn)) for shape in SHAPES]
    if guard is not None:
        options["guard"] = SpikeGuard(*guard)
    return params, cls(params, lr=0.1, **options)


def step(params: list, optimizer: Any, gradients: list[Tensor], scale: float = 1.0) -> None:
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = gradient.to(p.dtype) * scale
    optimizer.step()


def contents(params: list, optimizer: Any) -> list[Tensor]:
    """Copies of everything that a step may change."""
    states = [optimizer.state[p] for p in params if p in optimizer.state]
    found = [x for state in states for x in state.values() if isinstance(x, Tensor)]
    return [x.detach().clone() for x in (*params, *found)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def check_guard(guard: SpikeGuard, oracle: Spikes) -> None:
    assert guard.skipped.dtype == torch.int64 and guard.skipped.shape == ()
    assert guard.skipped.item() == oracle.skipped
    found = guard.last_zscore
    assert found.shape == ()
    wanted = torch.tensor(oracle.zscore, dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=ROUNDING, atol=ROUNDING, equal_nan=True)


@numpy_may_warn
@pytest.mark.parametrize(("backend", "live", "clip"), RUNS)
def test_a_run_against_a_loop_in_python(backend: str, live: bool, clip: Any) -> None:
    """Every decision, count and z-score, and the bits of a run that never saw the steps left out.

    Catches a window that takes in what was skipped, has an end at the wrong place or is not a ring,
    a deviation of n, a decision too early, a small norm for a spike, and any trace of a step.
    """
    options: dict[str, Any] = {"backend": backend, "capturable": live}
    clips = [None if clip is None else GlobalNorm(clip[0], norm_type=clip[1]) for _ in range(2)]
    params, ours = make(clip=clips[0], **options)
    # The same norm is taken, so that both clip by the same bits.
    others, plain = make(clip=clips[1], guard=None, **options)
    oracle = Spikes(*SETTING)
    for number, gradients in enumerate(spiky(SHAPES, 34)):
        taken = oracle.takes(norm_of(gradients, 2.0 if clip is None else clip[1]))
        before = contents(params, ours)
        step(params, ours, gradients)
        if taken:
            step(others, plain, gradients)
        else:
            assert same(before, contents(params, ours)), number
        assert same(contents(params, ours), contents(others, plain)), number
        check_guard(ours.guard, oracle)
    assert oracle.skipped > 8 and len(oracle.norms) > 2 * SETTING[1]


@numpy_may_warn
@each_place
@pytest.mark.parametrize("cls", [fusedopt.SGD, fusedopt.RMSprop, fusedopt.Adam])
def test_rules_with_and_without_counts(cls: Any, live: bool) -> None:
    """Catches a first step left out that makes a momentum buffer old, and one that is then zero."""
    options = {"momentum": 0.9} if cls is not fusedopt.Adam else {}
    options |= {"dampening": 0.5} if cls is fusedopt.SGD else {}
    params, ours = make(cls, backend="triton", capturable=live, **options)
    others, plain = make(cls, None, backend="triton", capturable=live, **options)
    oracle = Spikes(*SETTING)
    for gradients in spiky(SHAPES, 24):
        step(params, ours, gradients)
        if oracle.takes(norm_of(gradients)):
            step(others, plain, gradients)
    assert ours.guard.skipped.item() == oracle.skipped > 3
    assert same(contents(params, ours), contents(others, plain))


@numpy_may_warn
@both_backends
def test_a_first_step_left_out_creates_nothing(backend: str) -> None:
    params, ours = make(backend=backend, capturable=True)
    step(params, ours, [torch.full(shape, math.inf) for shape in SHAPES])
    assert not ours.state and ours.guard.skipped == 1


@both_backends
def test_equal_norms_decide_nothing(backend: str) -> None:
    """No deviation to measure by: catches a division by zero, which would skip for good."""
    params = [torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2)]
    # A window that is no power of 2, of norms whose sums are rounded.
    ours = fusedopt.SGD(params, lr=0.1, guard=SpikeGuard(2.0, 7, 3), backend=backend)
    for value in (0.1, 0.7, 1 / 3):
        ours.guard.restart()
        gradients = [torch.full_like(p.detach(), value) for p in params]
        for _ in range(8):
            step(params, ours, gradients)
            assert ours.guard.last_zscore.isnan()
    step(params, ours, [3 * g for g in gradients])
    assert ours.guard.skipped == 0 and ours.guard.last_zscore.isnan()
    # One that differs is a deviation.
    step(params, ours, [1e4 * g for g in gradients])
    assert ours.guard.skipped == 1


@both_backends
def test_taken_away_after_a_step_left_out(backend: str) -> None:
    """Catches a flag that stays on the device, so that nothing is ever updated again."""
    # The same plan goes on, as clip asks for the norm.
    params, ours = make(backend=backend, capturable=True, clip=GlobalNorm(1.0))
    for scale in (1.0, 1.1, 0.9, 50.0):
        step(params, ours, [torch.full(shape, scale) for shape in SHAPES])
    assert ours.guard.skipped == 1
    ours.guard, before = None, params[0].detach().clone()
    step(params, ours, [torch.ones(shape) for shape in SHAPES])
    assert not torch.equal(before, params[0]) and ours.state[params[0]]["step"] == 4


@both_backends
def test_steps_of_zeros_are_taken_and_not_noted(backend: str) -> None:
    """Catches norms of zero in the window, which make every step after them a spike, or a step
    without effect on counts."""
    params, ours = make(backend=backend)
    run = list(spiky(SHAPES, 18))
    for gradients in run[9:16]:
        step(params, ours, gradients)
    before = ours.guard.state()
    for _ in range(4):
        step(params, ours, [torch.zeros(shape) for shape in SHAPES])
    after = ours.guard.state()
    assert all(torch.equal(torch.as_tensor(before[n]), torch.as_tensor(after[n])) for n in before)
    assert ours.state[params[0]]["step"] == 11


def test_restart_begins_a_new_window() -> None:
    params, ours = make()
    for scale in (1.0, 1.1, 0.9, 1.2, 40.0):
        step(params, ours, [torch.full(shape, scale) for shape in SHAPES])
    assert ours.guard.skipped == 1
    ours.guard.restart()
    for scale in (40.0, 41.0, 42.0, 43.0):
        step(params, ours, [torch.full(shape, scale) for shape in SHAPES])
    assert ours.guard.skipped == 1
    # Of the new norms alone: (43 - 41) / 1.
    torch.testing.assert_close(ours.guard.last_zscore.item(), 2.0, rtol=1e-5, atol=0)


def test_another_batch_size_restarts() -> None:
    params, ours = make()
    for scale in (1.0, 1.1, 0.9, 1.2):
        step(params, ours, [torch.full(shape, scale) for shape in SHAPES])
    fusedopt.scaling.rescale_(ours, 64, 1, "sqrt")
    step(params, ours, [torch.full(shape, 8.0) for shape in SHAPES])
    assert ours.guard.skipped == 0


def test_groups_on_host_and_device_decide_alike() -> None:
    """Two device groups: catches counts on the host that go on."""
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    groups = [{"params": params[:1], "capturable": True}, {"params": params[1:]}]
    ours = fusedopt.AdamW(groups, lr=0.1, guard=SpikeGuard(*SETTING), backend="triton")
    for number, scale in enumerate((1.0, 1.1, 0.9, 1.2, 50.0)):
        before = contents(params, ours)
        step(params, ours, [torch.full((4,), scale)] * 2)
        assert same(before, contents(params, ours)) == (number == 4)


@each_place
def test_loss_scaling(live: bool) -> None:
    """The norm is that of unscaled gradients; an overflow is skipped and not counted."""
    params, ours = make(backend="triton", capturable=live)
    oracle = Spikes(*SETTING)
    for number, gradients in enumerate(spiky(SHAPES, 24)):
        if not all(g.isfinite().all() for g in gradients):
            continue
        scale = 2.0 ** (number % 5)
        ours.grad_scale, ours.found_inf = torch.tensor(scale), torch.tensor(0.0)
        before = contents(params, ours)
        taken = oracle.takes(norm_of(gradients))
        step(params, ours, gradients, scale)
        assert same(before, contents(params, ours)) == (not taken), number
        check_guard(ours.guard, oracle)
    assert oracle.skipped > 0
    ours.found_inf, before = torch.tensor(2.0), contents(params, ours)
    step(params, ours, [torch.full(shape, 1e4) for shape in SHAPES])
    assert same(before, contents(params, ours))
    check_guard(ours.guard, oracle)


class FlagOnDevice(Tensor):
    """An overflow flag that says it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


@both_backends
def test_an_overflow_that_only_the_device_knows_of(backend: str) -> None:
    """Catches one that is counted, taken in, or overruled by a norm that is fine."""
    params, ours = make(backend=backend)
    for scale in (1.0, 1.1, 0.9, 1.2):
        step(params, ours, [torch.full(shape, scale) for shape in SHAPES])
    ours.scaler_on_device = True
    before, state = contents(params, ours), ours.guard.state()
    for flag, scale in ((1.0, 1.0), (8.0, 1e3)):
        ours.grad_scale = torch.tensor(1.0)
        ours.found_inf = torch.tensor([flag]).as_subclass(FlagOnDevice)
        step(params, ours, [torch.full(shape, scale) for shape in SHAPES])
        assert same(before, contents(params, ours))
    after = ours.guard.state()
    assert all(torch.equal(torch.as_tensor(state[n]), torch.as_tensor(after[n])) for n in state)
    # And the next is a step as any other.
    ours.grad_scale = ours.found_inf = None
    step(params, ours, [torch.full(shape, 1.0) for shape in SHAPES])
    assert not same(before, contents(params, ours))


def test_accumulated_gradients_have_one_norm() -> None:
    """The sum of micro-batches decides, no single one."""
    params = [torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in SHAPES]
    ours = fusedopt.AdamW(params, lr=0.1, guard=SpikeGuard(*SETTING))
    accumulator = fusedopt.GradientAccumulator(params)
    for parts in ((1.0, 0.1), (1.2, -0.2), (0.9, 0.0), (1.0, 0.2), (60.0, -59.0), (30.0, 30.0)):
        for part in parts:
            with accumulator.micro_batch():
                sum(p.sum() * part for p in params).backward()
        ours.step()
        ours.zero_grad()
    assert ours.guard.skipped == 1 and ours.state[params[0]]["step"] == 5


@numpy_may_warn
def test_samples_of_a_step_left_out_are_used_up() -> None:
    """Catches samples of a skipped batch that go with the gradient of the next one."""
    p = torch.nn.Parameter(torch.ones(4))
    ours = fusedopt.BatchDecoupledAdam(
        [p], lr=0.1, statistics=fusedopt.GradSampleSquares(), guard=SpikeGuard(*SETTING)
    )
    for scale in (1.0, 1.1, 0.9, 1e4, math.nan, 1.0):
        p.grad_sample = scale * torch.ones(3, 4)
        p.grad = p.grad_sample.sum(0)
        before = contents([p], ours)
        ours.step()
        assert same(before, contents([p], ours)) == (not 0 < scale < 10)
        p.grad = torch.ones(4)
        with pytest.raises(RuntimeError, match="grad_sample"):
            ours.step()
        ours.zero_grad()
    assert ours.guard.skipped == 2 and ours.state[p]["step"] == 4


@numpy_may_warn
def test_error_if_nonfinite_raises_and_is_counted() -> None:
    clip = GlobalNorm(1.0, error_if_nonfinite=True)
    params, ours = make(clip=clip)
    step(params, ours, [torch.ones(shape) for shape in SHAPES])
    before = contents(params, ours)
    with pytest.raises(RuntimeError, match="nothing was updated"):
        step(params, ours, [torch.full(shape, math.nan) for shape in SHAPES])
    assert same(before, contents(params, ours)) and ours.guard.skipped == 1


# What it costs


def test_no_launch_more_than_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches of ours and operations of torch's, one after the other."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    def note(kernel: Any, programs: int, *rest: Any, **meta: Any) -> None:
        seen.append(f"{kernel.__name__} {programs}")

    monkeypatch.setattr(launching, "launch", note)
    found = []
    for guard in (SETTING, None):
        params, ours = make(guard=guard, clip=GlobalNorm(1.0), backend="triton", capturable=True)
        for _ in range(6):
            for p in params:
                p.grad = torch.randn_like(p)
            seen: list[str] = []
            with Count():
                ours.step()
        # An increment is filled in, or made of the flag, as with a scaler; views are no launch.
        free = ("fill_", "eq.", "view", "select", "slice")
        found.append([x for x in seen if not any(name in x for name in free)])
    guarded = [x.replace("guarded_factor", "clip_factor") for x in found[0]]
    assert "guarded_factor 1" in found[0] and guarded == found[1]


def test_the_host_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts on the device: of a steady step, spike or not, no value comes to the host."""
    params, ours = make(backend="triton", capturable=True)
    for gradients in list(spiky(SHAPES, 16))[9:]:
        step(params, ours, gradients)
    skipped = ours.guard.skipped.item()

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("the host reads a value")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu"):
        monkeypatch.setattr(Tensor, name, read)
    step(params, ours, [torch.ones(shape) for shape in SHAPES])
    step(params, ours, [torch.full(shape, 1e3) for shape in SHAPES])
    monkeypatch.undo()
    assert ours.guard.skipped.item() == skipped + 1


# What is refused


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "zscore must be positive and finite, got 0"),
        ((-1.0,), ValueError, "zscore must be positive"),
        ((math.inf,), ValueError, "zscore must be positive and finite"),
        ((math.nan,), ValueError, "zscore must be positive"),
        ((10**400,), ValueError, "too large"),
        (("6",), TypeError, "zscore must be a number, got '6'"),
        ((True,), TypeError, "zscore must be a number"),
        ((None,), TypeError, "zscore must be a number"),
        ((torch.tensor(6.0),), TypeError, "zscore must be a number"),
        ((6.0, 1, 1), ValueError, "window must be at least 2, got 1"),
        ((6.0, 8.0), TypeError, r"window must be an int, got 8\.0"),
        ((6.0, 8, True), TypeError, "min_steps must be an int"),
        ((6.0, 8, 1), ValueError, "min_steps must be from 2 to window, which is 8, got 1"),
        ((6.0, 8, 9), ValueError, "min_steps must be from 2 to window, which is 8, got 9"),
        ((6.0, 63), ValueError, "min_steps must be from 2 to window, which is 63, got 64"),
    ],
)
def test_arguments(arguments: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        SpikeGuard(*arguments)


def test_what_is_no_guard() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match=r"fusedopt\.SpikeGuard or None, got 6\.0"):
        fusedopt.AdamW([p], guard=6.0)
    ours = fusedopt.AdamW([p], guard=SpikeGuard())
    with pytest.raises(ValueError, match="guard is one for all groups"):
        ours.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "guard": SpikeGuard()})


def test_what_has_no_norm_of_all_gradients() -> None:
    model = torch.nn.Linear(2, 2)
    ours = fusedopt.AdamW(model.parameters(), guard=SpikeGuard())
    with pytest.raises(ValueError, match=r"guard=SpikeGuard decides.*pass guard=None"):
        fusedopt.gradient_release(model, ours)
    with pytest.raises(ValueError, match=r"does not cover steps left out.*guard=None"):
        fusedopt.SVAG(ours, 2)


def test_a_guard_is_one_optimizers() -> None:
    """Two would mix their norms. Catches an owner that is forgotten, or kept when it has let go."""
    guard, others = SpikeGuard(*SETTING), [torch.nn.Parameter(torch.ones(2))]
    message = "^guard is one optimizer's: make a SpikeGuard for each$"
    # One that is not made owns nothing, though it is there.
    kept = object.__new__(fusedopt.SGD)
    with pytest.raises(ValueError, match="state_dtype"):
        kept.__init__(others, lr=0.1, state_dtype="int3", guard=guard)  # type: ignore[misc]
    assert kept._guard is guard
    one = fusedopt.AdamW(others, guard=guard)
    one.guard = guard
    other = fusedopt.SGD(others, lr=0.1)
    with pytest.raises(ValueError, match=message):
        fusedopt.SGD(others, lr=0.1, guard=guard)
    with pytest.raises(ValueError, match=message):
        other.guard = guard
    assert other.guard is None
    # Copies are others, and what is loaded is a guard of its own.
    copied = copy.deepcopy(one)
    assert copied.guard is not guard and copied.guard.other_owner(one) is copied
    other.guard = copy.deepcopy(guard)
    fusedopt.AdamW(others).load_state_dict(one.state_dict())
    # Let go of, or its owner gone, it is free.
    other.guard = one.guard = None
    other.guard = guard
    guard, owner = SpikeGuard(*SETTING), fusedopt.AdamW(others)
    owner.guard = guard
    del owner
    one.guard = guard
