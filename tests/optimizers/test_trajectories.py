"""Thirty steps of every optimizer beside torch.optim: parameters and states, in every type."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from tolerances import (
    TRAJECTORY,
    Tolerance,
    assert_travelled_alike,
)
from torch import Tensor
from torch_registry import OPTION_SETS, read_from_torch, with_large_steps
from trajectory import (
    Trajectory,
    assert_same_ends,
    assert_same_trajectory,
    describe,
    make_gradients,
    wide,
)

import fusedopt

NAMES = ("SGD", "RMSprop", "Adam", "AdamW")
STEPS = 30
SIZE = 40

# Types of parameter (with its states) and gradient.
TYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float64": (torch.float64, torch.float64),
    "float32-bfloat16": (torch.float32, torch.bfloat16),
    "bfloat16-float32": (torch.bfloat16, torch.float32),
    "bfloat16-float16": (torch.bfloat16, torch.float16),
    "float32-float64": (torch.float32, torch.float64),
}
# The sets that turn on the most, one optimizer each, for what takes long in the interpreter.
RICH: dict[str, list[dict[str, Any]]] = {
    "SGD": [{"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}],
    "RMSprop": [{"lr": 0.03, "alpha": 0.9, "centered": True, "momentum": 0.9}],
    "Adam": [{"lr": 0.1, "betas": (0.6, 0.9), "amsgrad": True, "weight_decay": 0.1}],
    "AdamW": [{"lr": 0.1, "betas": (0.6, 0.9), "maximize": True, "weight_decay": 0.3}],
}


def _beside_torch(
    name: str,
    option_sets: Sequence[Mapping[str, Any]],
    stored: torch.dtype,
    compute: torch.dtype,
    backend: str,
    device: torch.device,
) -> tuple[Trajectory, Trajectory]:
    """Our optimizer, and torch's on equal values in the compute type, one group a set."""
    labels = [f"{name}({describe(options, {})})" for options in option_sets]
    values = [torch.randn(SIZE, dtype=stored).to(device) for _ in option_sets]
    ours = _groups(option_sets, values)
    optimizer = getattr(fusedopt, name)(ours, backend=backend)
    unsupported = {"foreach", "fused", "capturable"}
    plain = [{k: v for k, v in o.items() if k not in unsupported} for o in option_sets]
    model = getattr(torch.optim, name)(_groups(plain, values, compute), foreach=False)
    return Trajectory(optimizer, labels), Trajectory(model, labels, stored)


def _groups(
    option_sets: Sequence[Mapping[str, Any]],
    values: Sequence[Tensor],
    dtype: torch.dtype | None = None,
) -> list[dict[str, Any]]:
    return [
        {**options, "params": [torch.nn.Parameter(value.to(dtype or value.dtype, copy=True))]}
        for options, value in zip(option_sets, values, strict=True)
    ]


def _exact_on_cpu(device: torch.device) -> Mapping[torch.dtype, Tolerance] | None:
    return None if device.type == "cpu" else TRAJECTORY


def test_option_sets_are_torchs() -> None:
    # Catches an option that torch tests and this suite does not.
    for name, sets in read_from_torch().items():
        plain = [o for o in sets if not o.get("differentiable") and not o.get("capturable")]
        missing = [o for o in plain if repr(o) not in map(repr, OPTION_SETS[name])]
        assert not missing, f"{name}: torch tests {missing}"


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str, types: str, device: torch.device) -> None:
    # Catches any slip in a twin, its coefficients or its states, and more or fewer roundings
    # than one a step: on the CPU the reference makes torch's calls, so all values are equal.
    stored, gradient_type = TYPES[types]
    compute = wide([stored, gradient_type])
    ours, model = _beside_torch(name, with_large_steps(name), stored, compute, "reference", device)
    gradients = make_gradients(ours.params, STEPS, gradient_type)
    assert_same_trajectory(ours, model, gradients, _exact_on_cpu(device))


@pytest.mark.parametrize("name", NAMES)
def test_triton_with_every_option(name: str, device: torch.device) -> None:
    # Catches what only some options reach in a kernel; many groups share each launch.
    ours, model = _beside_torch(
        name, with_large_steps(name), torch.float32, torch.float32, "triton", device
    )
    assert_same_trajectory(ours, model, make_gradients(ours.params, STEPS), TRAJECTORY)


@pytest.mark.parametrize("types", list(TYPES)[1:])
@pytest.mark.parametrize("name", NAMES)
def test_triton_in_every_type(name: str, types: str, device: torch.device) -> None:
    # Catches arithmetic in the stored type, coefficients narrowed too early (float64), states
    # that are rounded twice or truncated.
    stored, gradient_type = TYPES[types]
    compute = wide([stored, gradient_type])
    ours, model = _beside_torch(name, RICH[name], stored, compute, "triton", device)
    gradients = make_gradients(ours.params, STEPS, gradient_type)
    assert_same_trajectory(ours, model, gradients, TRAJECTORY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_low_precision_goes_where_torch_goes(
    name: str, dtype: torch.dtype, device: torch.device
) -> None:
    # Loose, but against torch.optim on the same low-precision parameters: catches a model that
    # is wrong in the same way as the library.
    option_sets = [{"eps": 1e-3, **o} if name != "SGD" else o for o in with_large_steps(name)]
    ours, by_torch = _beside_torch(name, option_sets, dtype, dtype, "reference", device)
    start = ours.values()
    for gradients in make_gradients(ours.params, STEPS):
        ours.step(gradients)
        by_torch.step(gradients)
    expected = by_torch.values()
    for label in ours.labels:
        assert_travelled_alike(ours.values()[label], expected[label], start[label], label)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", NAMES)
def test_complex(name: str, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    # Catches moments of the complex number instead of its parts, and half of the elements.
    if backend == "reference":
        option_sets, steps = with_large_steps(name), STEPS
    else:
        option_sets, steps = RICH[name], 5
    ours, by_torch = _beside_torch(name, option_sets, dtype, dtype, backend, device)
    gradients = make_gradients(ours.params, steps)
    assert_same_trajectory(ours, by_torch, gradients, TRAJECTORY)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_amsgrad_is_active(name: str, device: torch.device) -> None:
    # Not of the library but of these tests: where the maximum is never above the current second
    # moment, a kernel without it would pass.
    for options in with_large_steps(name) + RICH[name]:
        if not options.get("amsgrad"):
            continue
        ours, _ = _beside_torch(name, [options], torch.float32, torch.float32, "reference", device)
        for gradients in make_gradients(ours.params, STEPS):
            ours.step(gradients)
        state = ours.optimizer.state[ours.params[0]]
        assert (state["max_exp_avg_sq"] > state["exp_avg_sq"]).double().mean() > 0.5, options


def _schedule_lr(optimizer: torch.optim.Optimizer, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.1 / (1 + step % 7)


def _fill_tensor_lr(optimizer: torch.optim.Optimizer, step: int) -> None:
    for group in optimizer.param_groups:
        if not isinstance(group["lr"], Tensor):
            # In float64: torch divides a tensor lr by the bias correction in the tensor's type.
            group["lr"] = torch.tensor(0.1, dtype=torch.float64)
        group["lr"].fill_(0.125 / (1 + step % 4))


def _anneal_everything(optimizer: torch.optim.Optimizer, step: int) -> None:
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.1 * (step % 3)
        group["maximize"] = step % 5 == 0
        if "betas" in group:
            group["betas"] = (0.5 + 0.01 * step, 0.8 + 0.005 * step)
        if "alpha" in group:
            group["alpha"] = 0.8 + 0.005 * step
        if group.get("momentum"):
            group["momentum"] = 0.5 + 0.01 * step


@pytest.mark.parametrize("change", [_schedule_lr, _fill_tensor_lr, _anneal_everything])
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", NAMES)
def test_hyper_parameters_change(
    name: str,
    backend: str,
    change: Callable[[torch.optim.Optimizer, int], None],
    device: torch.device,
) -> None:
    # Catches a coefficient that is computed once and kept.
    ours, by_torch = _beside_torch(name, RICH[name], torch.float64, torch.float64, backend, device)
    before = ours.values()
    for step, gradients in enumerate(make_gradients(ours.params, 10)):
        for run in (ours, by_torch):
            change(run.optimizer, step)
            run.step(gradients)
    assert_same_ends(ours, by_torch, before, TRAJECTORY)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", NAMES)
def test_steps_are_counted_for_each_parameter(
    name: str, backend: str, device: torch.device
) -> None:
    # Catches one step count for all, a dampened first momentum, and coefficients taken from
    # another parameter's row: no two of these have the same history.
    option_sets = [{**RICH[name][0], "lr": 0.02 * i} for i in range(1, 7)]
    ours, by_torch = _beside_torch(name, option_sets, torch.float64, torch.float64, backend, device)
    before = ours.values()
    absent = {0: (), 1: (1, 2), 2: (2,), 3: (0, 2), 4: (3,), 5: (0, 5)}
    for step, gradients in enumerate(make_gradients(ours.params, 6)):
        given = [None if i in absent[step] else g for i, g in enumerate(gradients)]
        ours.step(given)
        by_torch.step(given)
    assert_same_ends(ours, by_torch, before, TRAJECTORY)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_late_steps(name: str, backend: str, device: torch.device) -> None:
    # Catches a bias correction that goes wrong where beta^step is tiny or step is large, up to
    # the largest count that float32 holds.
    option_sets = [{**RICH[name][0], "betas": (0.9, 0.9999)} for _ in range(4)]
    ours, by_torch = _beside_torch(name, option_sets, torch.float64, torch.float64, backend, device)
    before = ours.values()
    first, second = make_gradients(ours.params, 2)
    for run in (ours, by_torch):
        run.step(first)
        for p, count in zip(run.params, (10.0, 999.0, 123456.0, 2.0**24 - 2), strict=True):
            run.optimizer.state[p]["step"] = torch.tensor(count)
        run.step(second)
    assert_same_ends(ours, by_torch, before, TRAJECTORY)
