"""Numbers that would leave the range of their type: an error, and nothing has changed."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch.nn import Parameter

import fusedopt
from fusedopt import scaling

# What is tested is the arithmetic, of torch's optimizers, too.
pytestmark = pytest.mark.filterwarnings('ignore:rule="decoupled" is for:UserWarning')

BOTH = pytest.mark.parametrize("module", [torch.optim, fusedopt], ids=["torch", "fusedopt"])


def make(module, name: str, dtype=torch.float32, **options):
    """Return an optimizer that has taken a step."""
    params = [Parameter(torch.zeros(3, dtype=dtype)) for _ in range(2)]
    if module is fusedopt:
        options["backend"] = "reference"
    optimizer = getattr(module, name)(params, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def states(optimizer) -> list[dict]:
    return [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]


def refused(optimizer, from_batch, to_batch, rule, message, **options) -> None:
    """Check that ``rescale_`` raises, and changes neither groups nor state nor bound."""
    clip = getattr(optimizer, "clip", None)
    before = copy.deepcopy((optimizer.state_dict(), getattr(clip, "max_norm", None)))
    with pytest.raises(ValueError, match=message):
        scaling.rescale_(optimizer, from_batch, to_batch, rule, **options)
    after = optimizer.state_dict(), getattr(clip, "max_norm", None)
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


OVERFLOWS = [
    ("SGD", {"momentum": 0.99}, "decoupled", "momentum_buffer"),
    ("RMSprop", {}, "sqrt", "square_avg"),
    ("RMSprop", {"centered": True}, "sqrt", "square_avg"),
    ("AdamW", {}, "sqrt", "exp_avg_sq"),
    ("Adam", {"amsgrad": True}, "sqrt", "max_exp_avg_sq"),
]


@BOTH
@pytest.mark.parametrize(("name", "options", "rule", "state"), OVERFLOWS)
def test_state_that_overflows(module, name, options, rule, state) -> None:
    """4e4 in float16 has no room for a batch of an eighth; in bfloat16 it has."""
    # Catches an inf in the state after a call that returns, one parameter rescaled and the next
    # not, and a look at the sum or the mean in place of the largest number.
    for sign in (1, -1) if state == "momentum_buffer" else (1,):
        optimizer = make(module, name, torch.float16, lr=0.1, **options)
        states(optimizer)[1][state][2] = sign * 4e4
        message = f"{name} has a state '{state}' that would overflow torch.float16"
        refused(optimizer, 80, 10, rule, message, beta_form="power")
    optimizer = make(module, name, torch.bfloat16, lr=0.1, **options)
    states(optimizer)[1][state][2] = 4e4
    scaling.rescale_(optimizer, 80, 10, rule, beta_form="power")
    assert states(optimizer)[1][state].isfinite().all()
    assert states(optimizer)[1][state][2] > 5e4


def test_state_just_below_the_bound() -> None:
    # Catches a bound of which the type's own rounding is no part: 4 * 16376 is 65504, the largest.
    optimizer = make(torch.optim, "Adam", torch.float16, lr=0.1)
    states(optimizer)[0]["exp_avg_sq"].fill_(16376.0)
    scaling.rescale_(optimizer, 8, 2, "sqrt")
    assert states(optimizer)[0]["exp_avg_sq"].tolist() == [65504.0] * 3
    optimizer = make(torch.optim, "Adam", torch.float16, lr=0.1)
    states(optimizer)[0]["exp_avg_sq"].fill_(16384.0)
    refused(optimizer, 8, 2, "sqrt", "would overflow")


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_state_that_is_not_finite_already(value) -> None:
    # Catches an error for what rescale_ has not done, in a run that a scaler may yet save.
    optimizer = make(torch.optim, "Adam", lr=0.1)
    states(optimizer)[0]["exp_avg_sq"][1] = value
    scaling.rescale_(optimizer, 16, 8, "sqrt")
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / math.sqrt(2))


def test_states_without_elements_or_values() -> None:
    # Catches a largest number of none, and a read of what has no values.
    p, q = Parameter(torch.zeros(0)), Parameter(torch.zeros(3, device="meta"))
    optimizer = torch.optim.SGD([p, q], lr=0.1, momentum=0.5)
    for x in (p, q):
        x.grad = torch.zeros_like(x)
    optimizer.step()
    scaling.rescale_(optimizer, 16, 8, "decoupled")
    assert optimizer.param_groups[0]["momentum"] == pytest.approx(0.5**0.5)


@pytest.mark.parametrize("tensor", [False, True])
def test_complex_buffer_that_overflows(tensor) -> None:
    # Catches an order of complex numbers, which there is none of.
    momentum = torch.tensor(0.99) if tensor else 0.99
    p = Parameter(torch.zeros(2, dtype=torch.complex64))
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=momentum)
    p.grad = torch.tensor([1.0 + 2.0j, 3.0])
    optimizer.step()
    scaling.rescale_(optimizer, 16, 8, "decoupled")
    optimizer.state[p]["momentum_buffer"][1] = 1.0 - 3e38j
    refused(optimizer, 16, 8, "decoupled", "would overflow torch.complex64")
    assert type(optimizer.param_groups[0]["lr"]) is float


@BOTH
def test_step_count_that_overflows(module) -> None:
    # Catches a count of inf, whose bias correction is none, behind an lr that is still a number.
    optimizer = make(module, "AdamW", betas=(0.0, 0.0), eps=1.0)
    refused(optimizer, 1e60, 1, "decoupled", "'step' that would overflow")


@pytest.mark.parametrize(
    ("lr", "from_batch", "to_batch"),
    [
        (1e300, 1, 1e200),
        (1e-300, 1e200, 1),
        (torch.tensor(1e30), 1, 1e20),
        (torch.tensor(1e-30), 1e20, 1),
        (torch.tensor(1e-7, dtype=torch.float16), 1e3, 1),
    ],
)
def test_lr_out_of_range(lr, from_batch, to_batch) -> None:
    # Catches a run that goes on with lr = inf, or stands still with lr = 0.
    optimizer = torch.optim.AdamW([Parameter(torch.zeros(3))], lr=lr)
    refused(optimizer, from_batch, to_batch, "linear", "lr = .* would become (inf|0.0)")
    with pytest.raises(ValueError, match="lr = .* would become"):
        scaling.rescale({"lr": lr}, from_batch, to_batch, "linear")


def test_zero_stays_zero() -> None:
    # Catches a warm-up that starts at 0, or an eps of 0, taken for one that has vanished.
    hyper = {"lr": 0.0, "initial_lr": torch.tensor(0.0), "eps": 0, "weight_decay": 0}
    new = scaling.rescale({**hyper, "decoupled_weight_decay": True}, 8, 32, "sqrt")
    assert {name: float(new[name]) for name in hyper} == dict.fromkeys(hyper, 0.0)


@pytest.mark.parametrize("sizes", [(1e-320, 1e300), (1e300, 1e-300)])
@pytest.mark.parametrize("rule", scaling.RULES)
def test_ratio_out_of_range(rule, sizes) -> None:
    # Catches a kappa of inf, or of 0, by which states are divided.
    optimizer = make(torch.optim, "SGD", lr=0.1, momentum=0.5)
    refused(optimizer, *sizes, rule, "from_batch = .* and to_batch = .* are too far apart")


@pytest.mark.parametrize(("bound", "sizes"), [(1e200, (1e300, 1)), (1e-200, (1, 1e300))])
def test_bound_of_the_norm_out_of_range(bound, sizes) -> None:
    # Catches a bound of inf, which clips nothing any more, and of 0, which leaves nothing.
    options = {"lr": 1.0, "betas": (0.0, 0.0), "eps": 1.0, "weight_decay": 0.0}
    optimizer = fusedopt.Adam(
        [Parameter(torch.zeros(3))], **options, clip=fusedopt.GlobalNorm(bound)
    )
    form = {"beta_form": "power"}
    refused(optimizer, *sizes, "sqrt", "clip.max_norm = .* would become (inf|0.0)", **form)
    # No bound stays none.
    optimizer.clip.max_norm = math.inf
    scaling.rescale_(optimizer, *sizes, "sqrt", **form)
    assert optimizer.clip.max_norm == math.inf


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_sharded_state_that_overflows() -> None:
    # Catches a check by operations that DTensors do not have, or that mixes them with plain ones.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        values = torch.ones(4, 3, dtype=torch.float16)
        p = Parameter(distribute_tensor(values, mesh, [Shard(0)]))
        options = {"momentum": 0.5, "centered": True, "alpha": 0.9, "eps": 1e-3}
        optimizer = torch.optim.RMSprop([p], **options, foreach=False)
        p.grad = distribute_tensor(values, mesh, [Shard(0)])
        optimizer.step()
        scaling.rescale_(optimizer, 16, 8, "sqrt", beta_form="power")
        square = optimizer.state[p]["square_avg"]
        assert square.full_tensor().isfinite().all()
        square.to_local()[2, 1] = 4e4
        before = square.full_tensor().clone()
        with pytest.raises(ValueError, match="'square_avg' that would overflow torch.float16"):
            scaling.rescale_(optimizer, 16, 8, "sqrt", beta_form="power")
        torch.testing.assert_close(square.full_tensor(), before, rtol=0, atol=0)
    finally:
        dist.destroy_process_group()


# Tensors in groups


def test_tensor_that_two_entries_share() -> None:
    # Catches the value of the entry that is written last in both.
    shared = torch.tensor(0.25)
    groups = {"lr": shared, "eps": shared, "betas": (0.9, 0.99), "capturable": True}
    optimizer = torch.optim.Adam([{"params": [Parameter(torch.zeros(3))], **groups}])
    refused(optimizer, 8, 32, "sqrt", "eps and another entry of the groups share one tensor")
    # "linear" leaves eps as it is, which the shared tensor cannot.
    refused(optimizer, 8, 32, "linear", "eps and another entry")


def test_tensor_of_integers() -> None:
    # Catches sqrt(2) cut off to 1.
    optimizer = torch.optim.SGD([Parameter(torch.zeros(3))], lr=torch.tensor(1))
    refused(optimizer, 8, 16, "sqrt", "lr is a tensor of type torch.int64")
    scaling.rescale_(optimizer, 8, 16, "linear")
    assert optimizer.param_groups[0]["lr"].item() == 2


# Conversions


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("average_lr", (1e308, 0.999)),
        ("temperature_lr", (1e300, 0.9, 1e10)),
        ("temperature_lr", (1e-300, 0.9, 1e-100)),
        ("epsilon_decoupled_lr", (1e308, 1e10)),
        ("epsilon_decoupled_lr", (1e-200, 1e-200)),
        ("half_life", (1 - 1e-16, 1e308)),
    ],
)
def test_conversion_out_of_range(function, arguments) -> None:
    # Catches a learning rate of inf or 0 out of numbers that are neither.
    with pytest.raises(ValueError, match="would be (inf|0.0): .* out of a float's range"):
        getattr(scaling, function)(*arguments)


def test_conversion_of_zero() -> None:
    # Catches a learning rate of 0, which was asked for, taken for one that has vanished.
    assert scaling.average_lr(0, 0.9) == 0
    assert scaling.temperature_lr(0.0, 0.9, 32) == 0
    assert scaling.epsilon_decoupled_lr(0.0, 1e-8) == 0
