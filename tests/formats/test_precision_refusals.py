"""Options of precision that mean nothing, or nothing together: refused by name, and in time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import assert_unchanged, snapshot
from dyadic import Dyadic

import fusedopt

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ADAMW, SGD, RMSPROP = fusedopt.AdamW, fusedopt.SGD, fusedopt.RMSprop

# Class, type of the parameter, arguments, what the message must name.
REFUSED: dict[str, tuple[Any, torch.dtype, dict[str, Any], str]] = {
    "stochastic-remainder": (
        ADAMW, BF16, {"rounding": "stochastic", "master": "remainder"}, "rounding.*master",
    ),
    "stochastic-float32": (
        ADAMW, BF16, {"rounding": "stochastic", "master": "float32"}, "rounding.*master",
    ),
    "kahan-remainder": (ADAMW, BF16, {"rounding": "kahan", "master": "remainder"}, "master"),
    "kahan-remainder8": (SGD, BF16, {"rounding": "kahan", "master": "remainder8"}, "master"),
    "kahan-float32": (SGD, FP16, {"rounding": "kahan", "master": "float32"}, "rounding.*master"),
    "fp32-stochastic": (ADAMW, FP32, {"rounding": "stochastic"}, r"rounding.*float32"),
    "fp32-kahan": (SGD, FP32, {"rounding": "kahan"}, r"rounding.*float32"),
    "fp32-remainder": (ADAMW, FP32, {"master": "remainder"}, r"master.*float32"),
    "fp32-float32": (ADAMW, FP32, {"master": "float32"}, r"master.*float32"),
    "fp64-float32": (ADAMW, torch.float64, {"master": "float32"}, r"master.*float64"),
    "fp16-remainder": (ADAMW, FP16, {"master": "remainder"}, r"master='remainder'.*float16"),
    "fp16-remainder8": (RMSPROP, FP16, {"master": "remainder8"}, r"master='remainder8'.*float16"),
    "unknown-name": (ADAMW, BF16, {"state_dtype": {"exp_avgs": "int8"}}, "state_dtype.*exp_avgs"),
    "others-name": (ADAMW, BF16, {"state_dtype": {"square_avg": "int8"}}, "state_dtype"),
    "step": (ADAMW, BF16, {"state_dtype": {"step": "int8"}}, "state_dtype.*step"),
    "own-rule": (Dyadic, BF16, {"state_dtype": {"exp_avg": "int8"}}, "state_dtype.*mean"),
    "string": (ADAMW, BF16, {"state_dtype": "int4"}, "state_dtype.*int4"),
    "capital": (ADAMW, BF16, {"state_dtype": "INT8"}, "state_dtype.*INT8"),
    "bf16": (ADAMW, BF16, {"state_dtype": "bfloat16"}, "state_dtype.*bfloat16"),
    "in-dictionary": (ADAMW, BF16, {"state_dtype": {"exp_avg": "int4"}}, "state_dtype.*exp_avg"),
    "int-dtype": (ADAMW, BF16, {"state_dtype": torch.int8}, "state_dtype.*int8"),
    "uint-dtype": (ADAMW, BF16, {"state_dtype": {"exp_avg_sq": torch.uint8}}, "state_dtype"),
    "bool-dtype": (SGD, BF16, {"state_dtype": torch.bool}, "state_dtype"),
    "complex-dtype": (SGD, BF16, {"state_dtype": torch.complex64}, "state_dtype"),
    "float8-dtype": (ADAMW, BF16, {"state_dtype": torch.float8_e4m3fn}, "state_dtype"),
    "number": (ADAMW, BF16, {"state_dtype": 8}, "state_dtype.*8"),
    "list": (ADAMW, BF16, {"state_dtype": ["int8"]}, "state_dtype"),
    "nested": (ADAMW, BF16, {"state_dtype": {"exp_avg": {"exp_avg": "int8"}}}, "state_dtype"),
    "rounding": (ADAMW, BF16, {"rounding": "nearest"}, "rounding.*nearest"),
    "rounding-true": (ADAMW, BF16, {"rounding": True}, "rounding.*True"),
    "rounding-list": (ADAMW, BF16, {"rounding": ["kahan"]}, "rounding"),
    "master": (ADAMW, BF16, {"master": "remainder16"}, "master.*remainder16"),
    "master-dtype": (ADAMW, BF16, {"master": FP32}, "master.*float32"),
    "master-true": (ADAMW, BF16, {"master": True}, "master.*True"),
    "centered-int8": (RMSPROP, BF16, {"state_dtype": "int8", "centered": True}, "state_dtype"),
    "centered-one": (
        RMSPROP, FP32, {"state_dtype": {"grad_avg": "fp8"}, "centered": True}, "state_dtype.*grad",
    ),
    "centered-bf16": (RMSPROP, FP32, {"state_dtype": BF16, "centered": True}, "square_avg"),
    "centered-fp16": (
        RMSPROP, BF16, {"state_dtype": {"square_avg": torch.float16}, "centered": True},
        "square_avg",
    ),
    "amsgrad-int8": (ADAMW, BF16, {"state_dtype": "int8", "amsgrad": True}, "exp_avg_sq.*largest"),
    "amsgrad-one": (
        ADAMW, BF16, {"state_dtype": {"max_exp_avg_sq": "fp8"}, "amsgrad": True}, "max_exp_avg_sq",
    ),
    "complex-int8": (ADAMW, torch.complex64, {"state_dtype": "int8"}, "state_dtype.*complex"),
    "complex-bf16": (SGD, torch.complex64, {"state_dtype": BF16}, "state_dtype.*complex"),
    "complex-master": (SGD, torch.complex64, {"master": "float32"}, "master.*complex"),
    "seed-float": (ADAMW, BF16, {"rounding": "stochastic", "rounding_seed": 1.0}, "rounding_seed"),
    "seed-none": (ADAMW, BF16, {"rounding": "stochastic", "rounding_seed": None}, "rounding_seed"),
    "seed-bool": (ADAMW, BF16, {"rounding_seed": True}, "rounding_seed"),
    "seed-large": (ADAMW, BF16, {"rounding_seed": 1 << 63}, "rounding_seed"),
    "seed-small": (ADAMW, BF16, {"rounding_seed": -(1 << 63) - 1}, "rounding_seed"),
    "seed-string": (ADAMW, BF16, {"rounding_seed": "0"}, "rounding_seed"),
    "seed-tensor": (ADAMW, BF16, {"rounding_seed": torch.tensor(3)}, "rounding_seed"),
}  # fmt: skip

each = pytest.mark.parametrize("name", REFUSED)


def parameter(dtype: torch.dtype) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(3, dtype=dtype))


@each
def test_at_construction(name: str) -> None:
    # Catches a check that is missing, and a message that does not say which option.
    cls, dtype, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        cls([parameter(dtype)], lr=0.1, **options)
    with pytest.raises(ValueError, match=message):
        cls([{"params": [parameter(dtype)], **options}], lr=0.1)


def test_a_named_parameter_is_called_by_its_name() -> None:
    # Catches a shape for whoever gave names: a thousand norms have the same.
    named = [("norm.weight", parameter(FP32)), ("linear.weight", parameter(BF16))]
    with pytest.raises(ValueError, match=r"and 'norm\.weight' is torch\.float32"):
        ADAMW(named, lr=0.1, master="remainder8")


def test_types_by_state_are_the_groups_own() -> None:
    # Catches a dictionary of the caller's, or of another group's, that changes a running optimizer.
    types = {"exp_avg": "int8"}
    optimizer = ADAMW(
        [{"params": [parameter(FP32)]}, {"params": [parameter(FP32)]}], state_dtype=types
    )
    types["exp_avg"] = "fp8"
    first, second = (group["state_dtype"] for group in optimizer.param_groups)
    assert first == second == {"exp_avg": "int8"} and first is not second


def test_another_optimizer_has_nothing_to_export() -> None:
    with pytest.raises(TypeError, match="AdamW is none of fusedopt's"):
        fusedopt.export_state_dict(torch.optim.AdamW([parameter(FP32)]))


@each
def test_in_a_new_group(name: str) -> None:
    # Catches a group that stays behind half added.
    cls, dtype, options, message = REFUSED[name]
    optimizer = cls([parameter(FP32)], lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [parameter(dtype)], **options})
    assert len(optimizer.param_groups) == 1
    p = parameter(dtype)
    optimizer.add_param_group({"params": [p]})
    p.grad = torch.ones_like(p)
    optimizer.step()


@each
def test_after_an_edit(name: str) -> None:
    # Catches a plan that does not look again, and a group before it that was updated already.
    cls, dtype, options, message = REFUSED[name]
    params = [parameter(dtype), parameter(dtype)]
    optimizer = cls([{"params": [p]} for p in params], lr=0.1, backend="reference")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    group = optimizer.param_groups[1]
    held = {k: group[k] for k in options}
    group.update(options)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_unchanged(optimizer, before)
    group.update(held)
    optimizer.step()
    assert not torch.equal(params[0], before[0][0])


@pytest.mark.parametrize(
    "options",
    [{"rounding": "stochastic"}, {"rounding": "kahan"}, {"master": "remainder"},
     {"master": "remainder8"}, {"master": "float32"}],
    ids=lambda o: next(iter(o.values())),
)  # fmt: skip
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_after_the_model_was_made_float32(options: dict[str, Any], backend: str) -> None:
    # Catches a master that is read beside a float32, and states that are lost by the refusal.
    model = torch.nn.Linear(3, 2).to(BF16)
    optimizer = ADAMW(model.parameters(), lr=0.1, state_dtype="int8", backend=backend, **options)
    model(torch.ones(1, 3, dtype=BF16)).sum().backward()
    optimizer.step()
    model.to(FP32)
    optimizer.zero_grad()
    model(torch.ones(1, 3)).sum().backward()
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"{next(iter(options))}.*float32"):
        optimizer.step()
    assert_unchanged(optimizer, before)
    for option in options:
        optimizer.param_groups[0][option] = None
    optimizer.step()
    assert not torch.equal(model.weight, before[0][0])
    assert not {"master", "compensation"} & set(optimizer.state[model.weight])


SOUND: list[tuple[Callable[..., Any], torch.dtype, dict[str, Any]]] = [
    (ADAMW, BF16, {"rounding": "stochastic", "master": "remainder8", "state_dtype": "fp8"}),
    (ADAMW, FP32, {"state_dtype": {"exp_avg": "int8", "exp_avg_sq": BF16}}),
    (ADAMW, BF16, {"state_dtype": {"max_exp_avg_sq": "int8"}}),
    (ADAMW, BF16, {"state_dtype": {}}),
    (ADAMW, BF16, {"state_dtype": {"exp_avg": None}}),
    (RMSPROP, BF16, {"centered": True}),
    (RMSPROP, BF16, {"centered": True, "state_dtype": FP32}),
    (ADAMW, BF16, {"amsgrad": True, "state_dtype": {"exp_avg": "int8"}}),
    (ADAMW, BF16, {"amsgrad": True, "state_dtype": BF16}),
    (RMSPROP, FP32, {"centered": True, "momentum": 0.5, "state_dtype": {"momentum_buffer": "fp8"}}),
    (SGD, torch.complex64, {"momentum": 0.5, "state_dtype": FP32}),
    (SGD, BF16, {"state_dtype": "int8"}),
    (SGD, BF16, {"rounding_seed": -(1 << 63)}),
]


@pytest.mark.parametrize("cls, dtype, options", SOUND, ids=str)
def test_sound_ones_run(cls: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    # Catches a check that refuses too much.
    p = parameter(dtype)
    optimizer = cls([p], lr=0.1, **options)
    p.grad = torch.ones_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert not torch.equal(p, torch.ones_like(p))
