"""What a capture demands of the host, with a flag in the place of a CUDA graph.

No graph is captured here: these tests hold the host's side to what was found necessary by reading.
"""

from __future__ import annotations

import copy

import pytest
import torch

import fusedopt
from fusedopt import coefficients, engine
from fusedopt.memory import device as memory_device
from fusedopt.step import plan, scale


class Capture:
    """Stands for torch.cuda.is_current_stream_capturing."""

    active = False


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Capture:
    flag = Capture()
    for module in (memory_device, coefficients, engine, plan, scale):
        monkeypatch.setattr(module, "is_capturing", lambda device: flag.active)
    return flag


def make(cls=fusedopt.AdamW, count=2, **options):
    params = [torch.nn.Parameter(torch.randn(6)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn(6)
    return params, cls(params, lr=0.1, backend="triton", **options)


def test_frozen_numbers_are_refused_and_eager_steps_go_on(capture):
    params, ours = make()
    ours.step()
    before = copy.deepcopy((params, ours.state_dict()["state"]))
    capture.active = True
    with pytest.raises(RuntimeError, match="capturable=True"):
        ours.step()
    torch.testing.assert_close((params, ours.state_dict()["state"]), before, rtol=0, atol=0)
    capture.active = False
    ours.step()
    assert ours.state[params[0]]["step"] == 2


@pytest.mark.parametrize(
    "cls", [fusedopt.AdamW, fusedopt.SGD, fusedopt.ScheduleFreeAdamW, fusedopt.Lion]
)
def test_an_unprepared_capture_says_what_to_do(capture, cls):
    params, ours = make(cls, capturable=True)
    capture.active = True
    with pytest.raises(RuntimeError, match="run one step"):
        ours.step()
    assert not ours.state
    capture.active = False
    ours.step()
    capture.active = True
    ours.step()


def test_replays_and_eager_steps_do_not_rely_on_each_others_addresses(capture):
    params, ours = make(capturable=True)
    eager = [torch.randn(6) for _ in params]
    captured = [torch.randn(6) for _ in params]

    def step(gradients):
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        ours.step()

    step(eager)
    capture.active = True
    step(captured)
    capture.active = False
    table = ours._engine.plan.device_groups[0].executor.buckets[0].table
    in_graph = table.clone()
    step(eager)
    table.copy_(in_graph)  # what a replay leaves behind
    before = copy.deepcopy((params, ours))
    step(eager)
    (expected, other) = before
    for p, gradient in zip(other.param_groups[0]["params"], eager, strict=True):
        p.grad = gradient
    other.step()
    for p, q in zip(params, other.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)


def test_a_captured_step_is_measured_whatever_its_number(capture):
    """What the graph repeats has to write the norms; eager steps are measured as before."""
    telemetry = fusedopt.Telemetry(every=3)
    params, ours = make(fusedopt.SGD, capturable=True, telemetry=telemetry)
    for number in range(1, 8):
        capture.active = number in (3, 6)
        for p in params:
            p.grad.fill_(number)
        ours.step()
        assert telemetry.measured == (number in (1, 3, 4, 6, 7))
        if telemetry.measured:
            wanted = torch.full((2,), number * 6**0.5)
            torch.testing.assert_close(telemetry.norms[:, 0], wanted)


def test_a_graph_keeps_its_plan_and_its_step_counts(capture):
    params, ours = make(capturable=True)
    ours.step()
    capture.active = True
    ours.step()
    capture.active = False
    held = ours._engine.plan
    steps = [ours.state[p]["step"] for p in params]
    params[1].grad = None
    ours.step()
    assert ours._engine.plan is not held and ours._engine.captured == [held]
    assert [ours.state[p]["step"] for p in params] == steps
    assert all(ours.state[p]["step"] is s for p, s in zip(params, steps, strict=True))
    assert [float(s) for s in steps] == [3.0, 2.0]


def test_pushed_numbers_reach_every_captured_plan(capture):
    params, ours = make(capturable=True, clip=fusedopt.GlobalNorm(1.0))
    ours.step()
    capture.active = True
    ours.step()
    capture.active = False
    params[1].grad = None
    ours.step()
    ours.param_groups[0]["lr"] = 0.25
    ours.clip.max_norm = 0.5
    ours.push_hyperparameters()
    for lane in (ours._engine.captured[0].device_groups[0], ours._engine.plan.device_groups[0]):
        assert lane.table.inputs[0, 0] == 0.25
        assert lane.scale.max_norm == 0.5


@pytest.mark.parametrize("change", ["lr", "max_norm"])
def test_a_number_changed_just_before_the_capture_is_refused(capture, change):
    _, ours = make(capturable=True, clip=fusedopt.GlobalNorm(1.0))
    ours.step()
    if change == "lr":
        ours.param_groups[0]["lr"] = 0.5
    else:
        ours.clip.max_norm = 0.5
    capture.active = True
    with pytest.raises(RuntimeError, match=f"{change} changed .*push_hyperparameters"):
        ours.step()


def test_an_overflow_flag_is_a_sum(device):
    """Two devices, or eight processes, add up to a flag of more than 1."""
    params, ours = make(capturable=True)
    ours.step()
    ours.found_inf = torch.tensor(8.0)
    # As a flag on a GPU is taken: by the device, not by the host.
    ours._overflowed = lambda *_: False
    before = copy.deepcopy(params)
    ours.step()
    assert ours.state[params[0]]["step"] == 1
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("cls", [fusedopt.SGD, fusedopt.AdamW])
def test_the_default_device_does_not_matter(cls, device):
    """Tables that are made on the host must be there, whatever new tensors default to."""
    with torch.device("cpu"):
        params, ours = make(cls, clip=fusedopt.GlobalNorm(1.0))
        same, theirs = copy.deepcopy(params), None
        for p, q in zip(params, same, strict=True):
            q.grad = p.grad.clone()
        theirs = cls(same, lr=0.1, backend="triton", clip=fusedopt.GlobalNorm(1.0))
        theirs.step()
    with torch.device("meta"):
        ours.step()
    assert all(torch.equal(p, q) for p, q in zip(params, same, strict=True))


@pytest.mark.parametrize("clipping", [False, True])
def test_eager_steps_do_not_rely_on_what_a_replay_leaves_of_the_scale(capture, clipping):
    """Catches a host that remembers what it wrote, which a replay has overwritten since."""
    scale_of_step = scale.GradScale(torch.device("cpu"))
    written = scale_of_step.inverse_scale if clipping else scale_of_step.values[:1]

    def plain_step():
        scale_of_step.load(None, None, clipping)
        assert written == 1.0 and scale_of_step.values[1] == 0.0

    capture.active = True
    scale_of_step.load(torch.tensor(4.0), torch.tensor(1.0), clipping)
    capture.active = False
    left = written.clone()
    assert left == 0.25
    plain_step()
    # A replay.
    written.copy_(left)
    scale_of_step.values[1] = 1.0
    plain_step()
    scale_of_step.release()
    written.copy_(left)
    plain_step()


def test_a_factor_and_a_scale_are_each_of_one_step():
    """Catches a factor, a scale or a flag that stays for a later step, clipped or not."""
    found = scale.GradScale(torch.device("cpu"))
    grad_scale, flag = torch.tensor([8.0]), torch.tensor([0.0])
    found.load(grad_scale, flag, False, 2.0)
    assert found.values[:2].tolist() == [0.25, 0.0]
    found.load(None, torch.tensor(3.0), True, 0.5)
    assert found.inverse_scale == 0.5 and found.values[1] == 3.0
    found.values[0] = 7.0  # the norm's factor
    found.load(None, None, True)
    assert found.inverse_scale == 1.0 and found.values[1] == 0.0
    found.load(None, None, False)
    assert found.values[:2].tolist() == [1.0, 0.0]
    found.load(None, None, False, 0.5)
    assert found.values[:2].tolist() == [0.5, 0.0]
    found.load(None, None, True)
    found.values[0] = 7.0
    found.load(None, None, False, 0.5)
    assert found.values[:2].tolist() == [0.5, 0.0]
    found.load(None, None, False, 0.5, measured=True)
    assert found.values.tolist() == [0.5, 0.0, 0.5]
    found.load(grad_scale, None, False, measured=True)
    assert found.values.tolist() == [0.125, 0.0, 0.125]
    found.load(None, None, False, measured=True)
    assert found.values.tolist() == [1.0, 0.0, 1.0]
