"""Formats of parameters and states, and rules, which tests of formats run over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.125, "weight_decay": 0.125}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.8, "dampening": 0.25, "nesterov": False}),
    "rmsprop": ("RMSprop", {"lr": 0.03, "alpha": 0.75, "weight_decay": 0.1, "momentum": 0.5}),
    "adam": ("Adam", {"lr": 0.05, "betas": (0.75, 0.9), "weight_decay": 0.1}),
    "adamw": ("AdamW", {"lr": 0.05, "betas": (0.75, 0.9), "weight_decay": 0.3}),
    "amsgrad": ("AdamW", {"lr": 0.05, "betas": (0.6, 0.7), "amsgrad": True}),
    "batch": ("BatchDecoupledAdam", {"lr": 0.05, "betas": (0.75, 0.9), "weight_decay": 0.3}),
}
STATE_DTYPES: dict[str, Any] = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "int8": "int8", "fp8": "fp8", 
    "mixed": {"exp_avg_sq": "int8", "square_avg": "int8", "momentum_buffer": "fp8"},
}  # fmt: skip
PARAMETERS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "fp16": (torch.float16, {}),
    "bf16-stochastic": (torch.bfloat16, {"rounding": "stochastic"}),
    "fp16-stochastic": (torch.float16, {"rounding": "stochastic"}),
    "bf16-kahan": (torch.bfloat16, {"rounding": "kahan"}),
    "fp16-kahan": (torch.float16, {"rounding": "kahan"}),
    "bf16-remainder": (torch.bfloat16, {"master": "remainder"}),
    "bf16-remainder8": (torch.bfloat16, {"master": "remainder8"}),
    "bf16-remainder8-stochastic": (
        torch.bfloat16, {"master": "remainder8", "rounding": "stochastic"},
    ),
    "bf16-float32": (torch.bfloat16, {"master": "float32"}),
    "fp16-float32": (torch.float16, {"master": "float32"}),
}  # fmt: skip

# What a rule keeps, by its name here.
KEPT = {
    "sgd": (), "momentum": ("momentum_buffer",), "rmsprop": ("square_avg", "momentum_buffer"),
    "adam": ("exp_avg", "exp_avg_sq"), "adamw": ("exp_avg", "exp_avg_sq"),
    "amsgrad": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), "batch": ("exp_avg", "exp_avg_sq"),
}  # fmt: skip


def states_for(name: str, rule: str) -> Any:
    """The option ``state_dtype`` of a name; of a dictionary, what the rule knows.

    AMSGrad refuses codes for what it keeps the largest of.
    """
    option = STATE_DTYPES[name]
    if rule == "amsgrad" and not isinstance(option, torch.dtype):
        return {"exp_avg": option if isinstance(option, str) else "int8"}
    return {k: v for k, v in option.items() if k in KEPT[rule]} if name == "mixed" else option


def raw(x: Tensor) -> Tensor:
    """The bits of a tensor of any type, in logical order."""
    x = x.detach().contiguous()
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.view(kinds[x.element_size()])


def params_of(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def bits_of(optimizer: Any) -> list[tuple[Tensor, dict[str, Any]]]:
    """All bits of parameters and of what is kept of them."""
    found = []
    for p in params_of(optimizer):
        state = optimizer.state[p] if p in optimizer.state else {}
        found.append((raw(p).clone(), {k: (v.dtype, raw(v).clone()) for k, v in state.items()}))
    return found


def assert_same_bits_of(ours: Any, theirs: Any) -> None:
    """Equal in every bit and type, in two optimizers or in what ``bits_of`` returned."""
    mine, others = (x if isinstance(x, list) else bits_of(x) for x in (ours, theirs))
    for i, ((p, a), (q, b)) in enumerate(zip(mine, others, strict=True)):
        assert torch.equal(p, q), f"parameter {i}: {int((p != q).sum())} of {p.numel()}"
        assert set(a) == set(b), f"parameter {i}: {sorted(a)} and {sorted(b)}"
        for name, (dtype, value) in a.items():
            assert dtype == b[name][0], f"parameter {i}, {name}: {dtype} and {b[name][0]}"
            off = value != b[name][1] if value.shape == b[name][1].shape else None
            assert off is not None, f"parameter {i}, {name}: shapes"
            assert not off.any(), f"parameter {i}, {name}: {int(off.sum())} of {off.numel()}"
