"""Updates worked out by hand, which neither torch.optim nor a shared harness can bend."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from tolerances import STEP, assert_close_ulps
from torch import Tensor

import fusedopt

F = Fraction
# (class, arguments, first parameter, gradients, parameters after each step, states at the end)
BY_HAND = {
    # d = 3 + 0.5 * 2 = 4; p = 2 - 0.25 * 4 = 1.   d = -1 + 0.5 * 1 = -0.5; p = 1 + 0.125.
    "SGD-decay": (
        fusedopt.SGD, {"lr": 0.25, "weight_decay": 0.5},
        2, [3, -1], [1, F(9, 8)], {},
    ),
    # Ascent: d = -3 + 0.5 * 2 = -2; p = 2 + 0.25 * 2 = 2.5. The decay still pulls down.
    "SGD-maximize": (
        fusedopt.SGD, {"lr": 0.25, "weight_decay": 0.5, "maximize": True},
        2, [3], [F(5, 2)], {},
    ),
    # b = 4, undampened; p = 1 - 0.5 * 4 = -1.   b = 0.75 * 4 + 0.25 * 8 = 5; p = -1 - 2.5.
    # b = 0.75 * 5 + 0.25 * (-3) = 3; p = -3.5 - 1.5.
    "SGD-dampening": (
        fusedopt.SGD, {"lr": 0.5, "momentum": 0.75, "dampening": 0.75},
        1, [4, 8, -3], [-1, F(-7, 2), -5], {"momentum_buffer": 3},
    ),
    # b = 4; p = 1 - 0.5 * (4 + 0.5 * 4) = -2.   b = 2 + 2 = 4; p = -2 - 0.5 * (2 + 2) = -4.
    "SGD-nesterov": (
        fusedopt.SGD, {"lr": 0.5, "momentum": 0.5, "nesterov": True},
        1, [4, 2], [-2, -4], {"momentum_buffer": 4},
    ),
    # s = 0.25 * 8^2 = 16; p = 1 - 5 * 8 / (4 + 1) = -7.
    # s = 0.75 * 16 + 0.25 * 4^2 = 16; p = -7 - 5 * 4 / (4 + 1) = -11.
    "RMSprop": (
        fusedopt.RMSprop, {"lr": 5, "alpha": 0.75, "eps": 1},
        1, [8, 4], [-7, -11], {"square_avg": 16},
    ),
    # d = 6 + 0.5 * 4 = 8; s = 0.25 * 64 = 16; b = 8 / (4 + 1) = 1.6; p = 4 - 2 * 1.6 = 0.8.
    # d = 3.6 + 0.4 = 4; s = 0.75 * 16 + 0.25 * 16 = 16; b = 0.5 * 1.6 + 4 / 5 = 1.6; p = -2.4.
    "RMSprop-momentum": (
        fusedopt.RMSprop,
        {"lr": 2, "alpha": 0.75, "eps": 1, "momentum": 0.5, "weight_decay": 0.5},
        4, [6, F(18, 5)], [F(4, 5), F(-12, 5)],
        {"square_avg": 16, "momentum_buffer": F(8, 5)},
    ),
    # s = 0.2 * 25 = 5; a = 0.2 * 5 = 1; s - a^2 = 4; p = 3 - 2 * 5 / (2 + 0.5) = -1.
    # s = 0.8 * 5 + 0.2 * 25 = 9; a = 0.8 + 1 = 1.8; s - a^2 = 5.76; p = -1 - 10 / (2.4 + 0.5).
    "RMSprop-centered": (
        fusedopt.RMSprop, {"lr": 2, "alpha": 0.8, "eps": 0.5, "centered": True},
        3, [5, 5], [-1, -1 - F(100, 29)], {"square_avg": 9, "grad_avg": F(9, 5)},
    ),
    # m = 5/8 * 2 = 5/4, v = 1/4 * 4 = 1; m / (1 - 3/8) = 2, sqrt(v / (1 - 3/4)) = 2;
    # p = 1 - 9/8 * 2 / (2 + 1/4) = 0.
    # m = 3/8 * 5/4 + 5/8 * 5 = 115/32, v = 3/4 + 25/4 = 7; m / (1 - 9/64) = 46/11,
    # sqrt(7 / (1 - 9/16)) = 4; p = 0 - 9/8 * 46/11 / (4 + 1/4) = -207/187.
    "Adam": (
        fusedopt.Adam, {"lr": 1.125, "betas": (0.375, 0.75), "eps": 0.25},
        1, [2, 5], [0, F(-207, 187)], {"exp_avg": F(115, 32), "exp_avg_sq": 7},
    ),
    # The same two steps, from d = g + 0.5 p: 1.5 + 0.5 = 2 and 5 + 0 = 5.
    "Adam-decay": (
        fusedopt.Adam, {"lr": 1.125, "betas": (0.375, 0.75), "eps": 0.25, "weight_decay": 0.5},
        1, [F(3, 2), 5], [0, F(-207, 187)], {"exp_avg": F(115, 32), "exp_avg_sq": 7},
    ),
    # Decay apart from the gradient: p = (1 - 1.125 * 0.5) * 16 - 9/8 * 2 / (9/4) = 7 - 1 = 6,
    # then 7/16 * 6 - 207/187.
    "AdamW": (
        fusedopt.AdamW, {"lr": 1.125, "betas": (0.375, 0.75), "eps": 0.25, "weight_decay": 0.5},
        16, [2, 5], [6, F(21, 8) - F(207, 187)], {"exp_avg": F(115, 32), "exp_avg_sq": 7},
    ),
    # m = 2.5, v = 7/16 * 25 = v_max; m / 0.5 = 5, sqrt(v / (7/16)) = 5; p = 1 - 6 * 5 / 6 = -4.
    # m = 1.25 - 0.5 = 0.75, v = 9/16 * 175/16 + 7/16 = 1687/256 < v_max = 2800/256, and
    # 1 - (9/16)^2 = 175/256: m / 0.75 = 1, sqrt(v_max / (175/256)) = 4; p = -4 - 6 * 1 / 5.
    "Adam-amsgrad": (
        fusedopt.Adam, {"lr": 6, "betas": (0.5, 0.5625), "eps": 1, "amsgrad": True},
        1, [5, -1], [-4, F(-26, 5)],
        {"exp_avg": F(3, 4), "exp_avg_sq": F(1687, 256), "max_exp_avg_sq": F(175, 16)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("case", BY_HAND)
def test_by_hand(case: str, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    # Catches what torch.optim, twin and kernel might all get wrong alike, and what a shared
    # harness would hide.
    optimizer_class, arguments, start, gradients, expected, states = BY_HAND[case]

    def scalar(value: Any) -> Tensor:
        return torch.tensor([float(value)], dtype=dtype, device=device)

    p = torch.nn.Parameter(scalar(start))
    optimizer = optimizer_class([p], **arguments, backend=backend)
    for step, (gradient, value) in enumerate(zip(gradients, expected, strict=True), start=1):
        before = p.detach().clone()
        p.grad = scalar(gradient)
        optimizer.step()
        assert_close_ulps(p, scalar(value), before, STEP[dtype], f"step {step}: p")
    for name, value in states.items():
        got = optimizer.state[p][name]
        assert_close_ulps(got, scalar(value), scalar(0), STEP[dtype], name)
