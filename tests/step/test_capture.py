"""CUDA graphs: a step reads nothing on the host, allocates nothing, and sees changed numbers.

Without a GPU the launch is stubbed and the host code of a step is watched operation by operation.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import (
    ADAMW,
    CASES,
    DEVICE,
    PLAIN,
    Case,
    FlagOnDevice,
    Pair,
    assert_same_state,
    groups_of,
    ids,
    new_params,
    on_backends,
    set_gradients,
)
from torch import Tensor
from torch.optim import Optimizer
from watching import Calls, watched

import fusedopt

# SGD of torch has no capturable.
COUNTING = [c for c in CASES if "SGD" not in c.name]
on_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="the kernels are interpreted here")
on_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="stands in for a GPU")


# Watching a step


class _Launches:
    """Stands in for the launch: notes what would run."""

    def __init__(self) -> None:
        self.kernels: list[Any] = []

    def __call__(self, kernel: Any, *arguments: Any, **meta: Any) -> None:
        self.kernels.append(kernel)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> _Launches:
    from fusedopt.backends import triton, triton_coefficients

    stub = _Launches()
    for module in (triton, triton_coefficients):
        monkeypatch.setattr(module, "launch", stub)
    return stub


@on_cpu
@pytest.mark.parametrize(
    "touch",
    [
        lambda t: t.item(), lambda t: t.tolist(), lambda t: t.numpy(), lambda t: bool(t > 0),
        lambda t: float(t), lambda t: torch.equal(t, t), lambda t: t + 1, lambda t: t.clone(),
        lambda t: torch.zeros(2), lambda t: torch.tensor(1.0), lambda t: torch.full((), 2.0),
        lambda t: t.double(), lambda t: torch.stack([t]), lambda t: t.cpu(),
    ],
)  # fmt: skip
def test_the_watch_sees(touch: Callable[[Tensor], Any]) -> None:
    """Otherwise the tests below would pass for nothing."""
    t = torch.ones(())
    with watched() as log:
        touch(t)
    assert log


@on_cpu
def test_the_watch_lets_work_in_place_pass() -> None:
    t, out = torch.ones(4), torch.ones(4)
    with watched() as log:
        t.add_(1).mul_(t)
        t.view(2, 2)[0].copy_(out[:2])
        torch.mul(t, 2, out=out)
    assert not log


# A capturable step


def _capturable(case: Case, **options: Any) -> Any:
    params = [{"params": new_params(seed=s), "lr": lr} for s, lr in ((1, 0.1), (2, 0.05))]
    arguments = {**case.options, "capturable": True, "backend": "triton", **options}
    return case.ours(params, **arguments)


def _flags(optimizer: Any) -> None:
    optimizer.grad_scale = torch.full((1,), 8.0).as_subclass(FlagOnDevice)
    optimizer.found_inf = torch.zeros(1).as_subclass(FlagOnDevice)


@on_cpu
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("norm", [None, 2.0, float("inf")], ids=["free", "two", "inf"])
@pytest.mark.parametrize("case", COUNTING, ids=ids)
def test_a_step_reads_and_allocates_nothing(
    case: Case, norm: float | None, scaled: bool, launches: _Launches
) -> None:
    """A read would abort a capture; memory made by the host would be stale at a replay."""
    clip = fusedopt.GlobalNorm(0.5, norm_type=norm) if norm else None
    optimizer = _capturable(case, clip=clip)
    set_gradients(groups_of(optimizer), 1)
    for _ in range(2):
        if scaled:
            _flags(optimizer)
        optimizer.step()
    launches.kernels.clear()
    with watched() as log:
        optimizer.step()
    assert not log
    assert len(launches.kernels) == (4 if norm else 2)


@on_cpu
@pytest.mark.parametrize("case", COUNTING, ids=ids)
def test_tensor_hyper_parameters_are_not_read(case: Case, launches: _Launches) -> None:
    optimizer = _capturable(case)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = torch.tensor(0.1), torch.tensor(0.01)
        if "betas" in group:
            group["betas"] = (torch.tensor(0.5), torch.tensor(0.9))
    set_gradients(groups_of(optimizer), 1)
    for _ in range(2):
        optimizer.step()
    with watched() as log:
        optimizer.step()
    assert not log


@on_cpu
@pytest.mark.parametrize("momentum", [0.9, 0.0], ids=["momentum", "plain"])
def test_sgd_under_a_loss_scaler_reads_nothing(momentum: float, launches: _Launches) -> None:
    """SGD has no ``capturable``: the flag on the device makes its step live."""
    optimizer = fusedopt.SGD(new_params(), lr=0.1, momentum=momentum, backend="triton")
    set_gradients(groups_of(optimizer), 1)
    for _ in range(2):
        _flags(optimizer)
        optimizer.step()
    with watched() as log:
        optimizer.step()
    assert not log


@on_cpu
def test_a_group_without_states_does_not_make_every_step_wait(launches: _Launches) -> None:
    """The flag is read where a state is yet to be made: a group that has none never is."""
    groups = [{"params": new_params()}, {"params": new_params(seed=2), "momentum": 0.9}]
    optimizer = fusedopt.SGD(groups, lr=0.1, backend="triton")
    set_gradients(groups_of(optimizer), 1)
    for _ in range(2):
        _flags(optimizer)
        optimizer.step()
    with watched() as log:
        optimizer.step()
    assert not log


@on_cpu
def test_gradients_that_moved_cost_no_read(launches: _Launches) -> None:
    """The usual loop drops gradients; the new addresses go over without waiting."""
    optimizer = _capturable(ADAMW)
    for seed in range(3):
        set_gradients(groups_of(optimizer), seed)
        optimizer.step()
    kept = [p.grad for p in groups_of(optimizer)]
    set_gradients(groups_of(optimizer), 9)
    with watched() as log:
        optimizer.step()
    assert kept and not [entry for entry in log if "reads" in entry or entry in Calls.READS]


# Values that change


@on_backends(COUNTING)
def test_device_tensors_changed_in_place_take_effect(case: Case, backend: str) -> None:
    """lr, decay and betas: what a graph would read at its next replay."""
    pair = Pair(case, backend=backend, groups=({}, {}), shapes=[(5,), ()])
    mine = pair.ours.param_groups[0]
    pair.ours.param_groups[0]["capturable"] = pair.ours.param_groups[1]["capturable"] = True
    for key in ("lr", "weight_decay", "eps"):
        mine[key] = torch.tensor(mine[key], dtype=torch.float64, device=DEVICE)
    has_betas = "betas" in mine
    if has_betas:
        mine["betas"] = tuple(torch.tensor(b, dtype=torch.float64) for b in mine["betas"])
    for lr, decay, eps, betas in (
        (0.1, 0.1, 1e-8, (0.6, 0.8)), (0.02, 0.3, 1e-2, (0.2, 0.5)), (0.2, 0.0, 0.1, (0.0, 0.9)),
    ):  # fmt: skip
        for key, value in (("lr", lr), ("weight_decay", decay), ("eps", eps)):
            mine[key].fill_(value)
            pair.theirs.param_groups[0][key] = value
        if has_betas:
            for tensor, value in zip(mine["betas"], betas, strict=True):
                tensor.fill_(value)
            pair.theirs.param_groups[0]["betas"] = betas
        pair.step(2)
        assert_same_state(pair.ours, pair.theirs)
    pair.check()


def _tables(optimizer: Any) -> list[Tensor]:
    return [lane.table.values for lane in optimizer._engine.plan.device_groups]


@on_backends(COUNTING)
def test_pushed_numbers_reach_the_next_replay(case: Case, backend: str) -> None:
    """A replay repeats the device work of a step and no host work.

    So between ``push_hyperparameters`` and the refresh that a graph would hold, the scalars that
    the refresh reads must be the new numbers already. The refresh is replayed here by stepping
    with a copy whose numbers the host is kept from pushing again.
    """
    pair = Pair(case, backend=backend, shapes=[(5,), ()])
    pair.ours.param_groups[0]["capturable"] = True
    pair.step(2)
    lr = pair.ours.param_groups[0]["lr"]
    for factor in (0.5, 0.1):
        pair.each(lambda o, f=factor: o.param_groups[0].update(lr=lr * f, weight_decay=f))
        pair.ours.push_hyperparameters()
        (lane,) = pair.ours._engine.plan.device_groups
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lane.table, "push", lambda groups: None)
            pair.step()
        assert_same_state(pair.ours, pair.theirs)
    pair.check()


def test_push_hyperparameters_before_the_first_step_is_no_error() -> None:
    for case in PLAIN:
        optimizer = case.ours(new_params(), **case.options)
        optimizer.push_hyperparameters()
        set_gradients(groups_of(optimizer), 1)
        optimizer.step()
        optimizer.push_hyperparameters()


# No recompilation

_COMPILATIONS = """
import torch, triton, fusedopt
from fusedopt import backends
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

compiled = []

def compile_nothing(self, key, *arguments, **options):
    # Called for a key that no earlier launch had: returning None skips the launch.
    compiled.append((self.fn.__name__, str(key)))

triton.runtime.driver.set_active(Driver())
JITFunction._do_compile = compile_nothing
backends._triton_runs_on = lambda device: (True, "a stand-in")

def count(steps=50, clip=None, optimizer=fusedopt.AdamW, absent=(), **options):
    compiled.clear()
    params = [torch.nn.Parameter(torch.zeros(n)) for n in (1, 16, 17, 4096, 9, 5)]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.5}]
    o = optimizer(groups, backend="triton", clip=clip, **options)
    after_first = 0
    for step in range(steps):
        for p in params:
            p.grad = torch.ones_like(p)
        for place in absent[step] if step < len(absent) else ():
            params[place].grad = None
        for group in o.param_groups if step else ():
            schedule(group, step)
        if clip is not None:
            clip.max_norm = 1.0 + step
        o.step()
        if step == 0:
            after_first = len(set(compiled))
    return after_first, len(set(compiled))

def schedule(group, step):
    # Ones, zeros, whole numbers and multiples of 16: what a compiler specialises integers on.
    values = (0.1, 1, 0, 16, 1.0, 0.0, 16.0, 1e-8)
    group["lr"], group["weight_decay"] = values[step % 8], values[(step + 3) % 8]
    if "betas" in group:
        group["betas"] = (0.9 - step / 100, 0.5)
        group["eps"] = values[(step + 1) % 8]
    elif "alpha" in group:
        group["alpha"] = 1 - step / 100
    else:
        group["momentum"], group["dampening"] = 0.95 - step / 100, step / 50
"""


_COUNTS = """
import json
result = {}
for capturable in (False, True):
    for name in ("SGD", "RMSprop", "Adam", "AdamW"):
        extra = {"momentum": 0.9} if name == "SGD" else {"capturable": capturable}
        result[f"{name} {capturable}"] = count(optimizer=getattr(fusedopt, name), **extra)
    clip = fusedopt.GlobalNorm(1.0)
    result[f"clip {capturable}"] = count(clip=clip, capturable=capturable)
absent = [(), (0,), (0, 1), (0, 1, 2), (0, 1, 2, 3), (3,), (0, 1, 2, 4, 5)]
result["absent"] = count(absent=absent)
result["absent, clip"] = count(absent=absent, clip=fusedopt.GlobalNorm(1.0))
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def compilations() -> dict[str, list[int]]:
    """For each run, how many kernels were compiled at the first step and in all 50."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _COMPILATIONS + _COUNTS]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_changing_numbers_compile_nothing_anew(compilations: dict[str, list[int]]) -> None:
    """For every class, on the host's path and on the captured one; clipping has two kernels."""
    for run, counts in compilations.items():
        if "absent" not in run:
            own = 3 if "clip" in run else 1
            # Where counts are on the device, a kernel forms coefficients; SGD has none there.
            own += run.endswith("True") and not run.startswith("SGD")
            assert counts == [own, own], run


def test_gradients_that_come_and_go_compile_nothing_anew(
    compilations: dict[str, list[int]],
) -> None:
    """Catches a variant for every few counts of chunks: seconds of compilation amid a run."""
    assert compilations["absent"] == [1, 1]
    assert compilations["absent, clip"] == [3, 3]


# On a GPU


def _capture(optimizer: Optimizer) -> Any:
    """Warm up on a side stream, as torch asks for, then capture one step."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


def _on_gpu(case: Case, **ours_only: Any) -> tuple[Any, Any]:
    """Ours, capturable, on the GPU; torch's for-loop on the CPU; equal gradients in both."""
    ours = case.ours([p.cuda().detach().requires_grad_() for p in new_params()], **case.options,
                     backend="triton", **ours_only)  # fmt: skip
    theirs = case.theirs(
        [p.detach().cpu().requires_grad_() for p in new_params()], **case.options, foreach=False
    )
    for p, q in zip(groups_of(ours), groups_of(theirs), strict=True):
        q.grad = torch.full_like(q, 0.3) + q.detach() / 2
        p.grad = q.grad.cuda()
    return ours, theirs


def _assert_close(ours: Optimizer, theirs: Optimizer) -> None:
    for p, q in zip(groups_of(ours), groups_of(theirs), strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-4, atol=1e-5)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("clipped", [False, True], ids=["free", "clipped"])
@pytest.mark.parametrize("case", COUNTING, ids=ids)
def test_a_captured_graph_replays_with_changed_numbers(case: Case, clipped: bool) -> None:
    clip = fusedopt.GlobalNorm(0.5) if clipped else None
    ours, theirs = _on_gpu(case, capturable=True, clip=clip)
    if clipped:
        torch.nn.utils.clip_grad_norm_(groups_of(theirs), 0.5)
    graph = _capture(ours)
    for _ in range(3):  # the warm-up; capturing runs nothing
        theirs.step()
    _assert_close(ours, theirs)
    lr = case.options["lr"]
    for factor in (1.0, 0.5, 0.1):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0].update(lr=lr * factor, weight_decay=factor / 10)
        ours.push_hyperparameters()
        graph.replay()
        theirs.step()
        _assert_close(ours, theirs)
    counts = {int(ours.state[p]["step"].item()) for p in groups_of(ours)}
    assert counts == {6}


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("case", PLAIN, ids=ids)
def test_a_captured_graph_reads_tensors_live(case: Case) -> None:
    """A learning rate on the device makes SGD capturable too."""
    ours, theirs = _on_gpu(case)
    lr = torch.tensor(case.options["lr"], device="cuda")
    decay = torch.tensor(case.options["weight_decay"], device="cuda")
    ours.param_groups[0].update(lr=lr, weight_decay=decay)
    graph = _capture(ours)
    for _ in range(3):
        theirs.step()
    for factor in (0.5, 0.1):
        lr.fill_(case.options["lr"] * factor)
        decay.fill_(factor / 10)
        theirs.param_groups[0].update(lr=case.options["lr"] * factor, weight_decay=factor / 10)
        graph.replay()
        theirs.step()
        _assert_close(ours, theirs)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("case", COUNTING, ids=ids)
def test_a_captured_graph_obeys_the_loss_scaler(case: Case) -> None:
    """The flag is read by the graph: an overflow at a replay changes nothing."""
    ours, theirs = _on_gpu(case, capturable=True)
    for p in groups_of(ours):
        p.grad = p.grad * 8
    ours.grad_scale = torch.full((1,), 8.0, device="cuda")
    ours.found_inf = torch.zeros(1, device="cuda")
    graph = _capture(ours)
    for _ in range(3):
        theirs.step()
    for overflow in (0.0, 1.0, 0.0):
        ours.found_inf.fill_(overflow)
        graph.replay()
        if not overflow:
            theirs.step()
        _assert_close(ours, theirs)
    assert {int(ours.state[p]["step"].item()) for p in groups_of(ours)} == {5}


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@on_gpu
@pytest.mark.gpu
def test_a_number_that_changed_during_a_capture_is_a_clear_error() -> None:
    ours, _ = _on_gpu(ADAMW, capturable=True)
    ours.step()
    torch.cuda.synchronize()
    ours.param_groups[0]["lr"] = 0.5
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="push_hyperparameters"), torch.cuda.graph(graph):
        ours.step()


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@on_gpu
@pytest.mark.gpu
def test_a_capture_before_the_first_step_is_a_clear_error() -> None:
    ours, _ = _on_gpu(ADAMW, capturable=True)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="run one step"), torch.cuda.graph(graph):
        ours.step()
