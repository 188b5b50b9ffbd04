"""Rules and formats that tests of what rides along run over."""

from __future__ import annotations

from typing import Any

import torch

# Class, numbers that coefficients are made of, and other arguments.
Numbers = dict[str, Any]
RULES: dict[str, tuple[str, Numbers, dict[str, Any]]] = {
    "sgd": (
        "SGD", {"lr": 0.1, "momentum": 0.6, "dampening": 0.3, "weight_decay": 0.2}, {},
    ),
    "rmsprop": (
        "RMSprop",
        {"lr": 0.03, "alpha": 0.7, "eps": 0.01, "weight_decay": 0.1, "momentum": 0.5}, {},
    ),
    "adam": ("Adam", {"lr": 0.05, "betas": (0.7, 0.8), "eps": 0.01, "weight_decay": 0.1}, {}),
    "adamw": ("AdamW", {"lr": 0.05, "betas": (0.7, 0.8), "eps": 0.01, "weight_decay": 0.3}, {}),
    "lion": ("Lion", {"lr": 0.02, "betas": (0.6, 0.8), "weight_decay": 0.3}, {}),
    "adam_c": (
        "AdamC", {"lr": 0.05, "betas": (0.7, 0.8), "eps": 0.01, "weight_decay": 0.3},
        {"max_lr": 0.125},
    ),
    "schedule_free": (
        "ScheduleFreeAdamW",
        {"lr": 0.05, "betas": (0.7, 0.8), "eps": 0.01, "weight_decay": 0.3, "warmup_steps": 2.5},
        {},
    ),
    "batch": (
        "BatchDecoupledAdam",
        {"lr": 0.05, "betas": (0.7, 0.8), "eps": 0.01, "weight_decay": 0.3}, {},
    ),
}  # fmt: skip

# Of a second moment, and of the rest of what a rule keeps.
_SQUARES = {"rmsprop": "square_avg", "sgd": None, "lion": None}
_FIRST = {"rmsprop": "momentum_buffer", "sgd": "momentum_buffer", "schedule_free": "z_minus_x"}

BESIDE: dict[str, dict[str, Any]] = {
    "nearest": {}, "stochastic": {"rounding": "stochastic"}, "kahan": {"rounding": "kahan"},
    "remainder": {"master": "remainder"}, "remainder8": {"master": "remainder8"},
    "remainder8-stochastic": {"master": "remainder8", "rounding": "stochastic"},
    "float32": {"master": "float32"},
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STATES = ("None", "bfloat16", "float16", "int8", "fp8", "mixed")


def goes_with(dtype: str | None, beside: str) -> bool:
    """Whether parameters of a type can be kept so; None for any type."""
    if beside.startswith("remainder"):
        return dtype in (None, "bf16")
    return beside == "nearest" or dtype != "fp32"


def states_of(rule: str, states: str) -> Any:
    """The option ``state_dtype``; what a rule refuses codes for is kept as float32."""
    first, square = _FIRST.get(rule, "exp_avg"), _SQUARES.get(rule, "exp_avg_sq")
    if states == "None":
        return None
    if states == "mixed":
        types: dict[str, Any] = {first: torch.float16}
        return types if square is None else {**types, square: "int8"}
    option = states if states in ("int8", "fp8") else getattr(torch, states)
    return {square: option, first: torch.float32} if rule == "schedule_free" else option
