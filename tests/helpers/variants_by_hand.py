"""The optional forms of the optimizers, written out from their formulas in float64.

A ``Loop`` holds one parameter and its states in float64 and updates them as the formula reads;
``Beside`` runs an optimizer of the package next to one loop per parameter group. Nothing here is
taken from the package but the optimizer under test.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tolerances import FORMULA, TRAJECTORY, Tolerance, assert_close_ulps, assert_equal
from torch import Tensor
from trajectory import give_gradient

import fusedopt

DEVICE = torch.device(os.environ.get("FUSEDOPT_TEST_DEVICE", "cpu"))
SHAPE = (2, 3)
STEPS = 8

# In float64 tighter than any slip in a formula, even a coefficient that was a float32 once.
TOLERANCES: Mapping[torch.dtype, Tolerance] = {**TRAJECTORY, torch.float64: FORMULA}


def _real(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


class Loop:
    """One parameter and its states, updated by a formula.

    Args:
        p: start value; a complex one is a pair of reals.
        options: hyper-parameters, which a test may change between steps.
    """

    keys: tuple[str, ...] = ()
    counts_steps = True

    def __init__(self, p: Tensor, **options: Any) -> None:
        self.stored = _real(p).dtype
        self.p = _real(p).to(torch.float64, copy=True)
        self.options = options
        self.state: dict[str, Tensor] = {}
        self.t = 0
        self.largest: dict[str, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        if name == "options":
            raise AttributeError(name)
        return self.options.get(name, DEFAULTS[name])

    def step(self, g: Tensor, square: Callable[[Tensor], Tensor] = torch.square) -> None:
        """Take one step; ``square`` makes the second moment's input from the descent direction."""
        self.t += 1
        g = _real(g).double()
        self.update(-g if self.maximize else g, square)
        self.p = self.p.to(self.stored).double()
        self.state = {key: value.to(self.stored).double() for key, value in self.state.items()}
        for key, value in {"p": self.p, **self.state}.items():
            self.largest[key] = torch.maximum(self.largest.get(key, value.abs()), value.abs())

    def update(self, g: Tensor, square: Callable[[Tensor], Tensor]) -> None:
        raise NotImplementedError


DEFAULTS: dict[str, Any] = {
    "lr": None, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False,
    "maximize": False, "momentum_form": "torch", "alpha": 0.99, "eps": 1e-8, "centered": False,
    "denominator": "std", "betas": (0.9, 0.999), "amsgrad": False, "decoupled": False,
    "bias_correction": "unset",
}  # fmt: skip


class Sgd(Loop):
    """The three momentum forms."""

    counts_steps = False

    def update(self, g: Tensor, square: Callable[[Tensor], Tensor]) -> None:
        lr, mu, damp = float(self.lr), self.momentum, 1 - self.dampening
        d = g + self.weight_decay * self.p
        if mu == 0:
            self.p = self.p - lr * d
            return
        old = self.state.get("momentum_buffer")
        if self.momentum_form == "torch":
            b = d if old is None else mu * old + damp * d
            move = lr * (d + mu * b) if self.nesterov else lr * b
        elif self.momentum_form == "velocity":
            b = lr * d if old is None else mu * old + lr * damp * d
            move = lr * d + mu * b if self.nesterov else b
        else:
            b = (1 - mu) * d + (0 if old is None else mu * old)
            move = lr * ((1 - mu) * d + mu * b) if self.nesterov else lr * b
        self.state["momentum_buffer"] = b
        self.p = self.p - move


class RmsProp(Loop):
    """Bias correction and both denominators."""

    def update(self, g: Tensor, square: Callable[[Tensor], Tensor]) -> None:
        alpha, zero = self.alpha, torch.zeros_like(self.p)
        d = g + self.weight_decay * self.p
        s = alpha * self.state.get("square_avg", zero) + (1 - alpha) * square(d)
        c = 1 - alpha**self.t if self.bias_correction is True else 1.0
        self.state["square_avg"], r = s, s / c
        if self.centered:
            a = alpha * self.state.get("grad_avg", zero) + (1 - alpha) * d
            self.state["grad_avg"] = a
            r = (r - (a / c) ** 2).clamp(min=0)
        ratio = d / (r + self.eps) if self.denominator == "variance" else d / (r.sqrt() + self.eps)
        if self.momentum > 0:
            ratio = self.momentum * self.state.get("momentum_buffer", zero) + ratio
            self.state["momentum_buffer"] = ratio
        self.p = self.p - self.lr * ratio


class Adam(Loop):
    """Kingma and Ba's correction, the running mean of document 000, and none."""

    def update(self, g: Tensor, square: Callable[[Tensor], Tensor]) -> None:
        (beta1, beta2), lr, zero = self.betas, float(self.lr), torch.zeros_like(self.p)
        beta1, beta2 = float(beta1), float(beta2)
        if self.decoupled:
            self.p = self.p * (1 - lr * self.weight_decay)
        d = g if self.decoupled else g + self.weight_decay * self.p
        new1, new2 = 1 - beta1, 1 - beta2
        if self.bias_correction == "running_mean":
            new1, new2 = (1 / min(self.t, 1 / new) for new in (new1, new2))
        m = (1 - new1) * self.state.get("exp_avg", zero) + new1 * d
        v = (1 - new2) * self.state.get("exp_avg_sq", zero) + new2 * square(d)
        self.state.update(exp_avg=m, exp_avg_sq=v)
        if self.amsgrad:
            v = torch.maximum(self.state.get("max_exp_avg_sq", zero), v)
            self.state["max_exp_avg_sq"] = v
        if self.bias_correction in ("adam", "unset"):
            m, v = m / (1 - beta1**self.t), v / (1 - beta2**self.t)
        self.p = self.p - lr * m / (v.sqrt() + self.eps)


class AdamDecoupled(Adam):
    """The same with the decay apart from the gradient."""

    def __init__(self, p: Tensor, **options: Any) -> None:
        super().__init__(p, **{"weight_decay": 0.01, **options, "decoupled": True})


LOOPS: dict[str, type[Loop]] = {
    "SGD": Sgd,
    "RMSprop": RmsProp,
    "Adam": Adam,
    "AdamW": AdamDecoupled,
    "BatchDecoupledRMSprop": RmsProp,
    "BatchDecoupledAdam": AdamDecoupled,
}


def eighths(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Multiples of 1/8 of magnitude 1/2 to 2, which every type holds.

    Their squares and first averages are exact. Centred and corrected, the first step subtracts two
    equal numbers: values that round there would compare rounding noise.
    """
    generator = torch.Generator().manual_seed(seed)
    real = torch.randint(4, 17, (*shape, 2), generator=generator, dtype=torch.float64) / 8
    real *= torch.randint(0, 2, real.shape, generator=generator) * 2 - 1
    value = torch.view_as_complex(real) if dtype.is_complex else real[..., 0]
    return value.to(dtype).to(DEVICE)


class Beside:
    """An optimizer of the package, and for each of its groups the loop of that group's options.

    Args:
        name: the class in ``fusedopt``.
        option_sets: the options of each group; a group holds one parameter.
        common: arguments of the class that no loop is told of.
    """

    def __init__(
        self,
        name: str,
        option_sets: Sequence[Mapping[str, Any]],
        *,
        backend: str = "reference",
        dtype: torch.dtype = torch.float64,
        gradient_type: torch.dtype | None = None,
        shape: Sequence[int] = SHAPE,
        **common: Any,
    ) -> None:
        self.params = [
            torch.nn.Parameter(eighths(shape, dtype, seed)) for seed in range(len(option_sets))
        ]
        self.loops = [LOOPS[name](p, **o) for p, o in zip(self.params, option_sets, strict=True)]
        groups = [{**o, "params": [p]} for p, o in zip(self.params, option_sets, strict=True)]
        self.optimizer = getattr(fusedopt, name)(groups, backend=backend, **common)
        self.start = [loop.p.clone() for loop in self.loops]
        self.gradient_type = gradient_type or dtype
        self.seed = 0

    def gradients(self) -> list[Tensor]:
        """Draw new ones; small ones after half of the steps, so that AMSGrad's maximum holds."""
        self.seed += 1
        scale = 1.0 if self.seed <= STEPS // 2 else 0.125
        return [
            scale * eighths(p.shape, self.gradient_type, 100 * self.seed + i)
            for i, p in enumerate(self.params)
        ]

    def give(self, gradients: Sequence[Tensor | None], factor: float = 1.0) -> None:
        """Set the optimizer's gradients, multiplied by a factor."""
        for p, g in zip(self.params, gradients, strict=True):
            if g is None:
                p.grad = None
            else:
                give_gradient(p, g * factor)

    def loops_step(self, gradients: Sequence[Tensor | None], factor: float = 1.0) -> None:
        for loop, g in zip(self.loops, gradients, strict=True):
            if g is not None:
                loop.step(_real(g).double() * factor)

    def step(self, steps: int = 1) -> None:
        """Take steps of both with equal gradients, which must stay as they are."""
        for _ in range(steps):
            gradients = self.gradients()
            self.give(gradients)
            self.optimizer.step()
            for p, g in zip(self.params, gradients, strict=True):
                assert torch.equal(p.grad, g), "the step has written to p.grad"
            self.loops_step(gradients)

    def set(self, **options: Any) -> None:
        """Change an option of every group and of every loop."""
        for group, loop in zip(self.optimizer.param_groups, self.loops, strict=True):
            group.update(options)
            loop.options.update(options)

    def check(self) -> None:
        """Parameters, states and step counts are the loops', and standing still would not be."""
        for i, (p, loop, start) in enumerate(zip(self.params, self.loops, self.start, strict=True)):
            options = {k: v for k, v in loop.options.items() if k != "lr"}
            name = f"{type(loop).__name__}({options}) after {loop.t}"
            state = dict(self.optimizer.state[p]) if p in self.optimizer.state else {}
            self._compare(p, loop.p, start, loop, "p", name)
            if loop.counts_steps and loop.t:
                expected = torch.tensor(float(loop.t))
                assert_equal(state.pop("step").float().cpu(), expected, None, f"{name} step")
            assert set(state) == set(loop.state), f"group {i}, {name}"
            for key, value in loop.state.items():
                self._compare(state[key], value, torch.zeros_like(value), loop, key, name)

    def _compare(
        self, got: Tensor, wanted: Tensor, before: Tensor, loop: Loop, key: str, name: str
    ) -> None:
        stored = loop.stored
        assert_close_ulps(
            _real(got),
            wanted.to(stored),
            before.to(stored) if loop.t else None,
            TOLERANCES[stored],
            f"{name} {key}",
            scale=loop.largest.get(key),
        )


# One of each form, with what else reaches the same lines.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "velocity": (
        "SGD",
        {"momentum_form": "velocity", "lr": 0.1, "momentum": 0.8, "dampening": 0.25,
         "weight_decay": 0.125},
    ),
    "ema": (
        "SGD",
        {"momentum_form": "ema", "lr": 0.2, "momentum": 0.75, "nesterov": True, "maximize": True},
    ),
    "corrected": (
        "RMSprop",
        {"bias_correction": True, "lr": 0.03, "alpha": 0.75, "eps": 0.25, "weight_decay": 0.125},
    ),
    "variance": (
        "RMSprop",
        {"denominator": "variance", "bias_correction": True, "lr": 0.15, "alpha": 0.75,
         "eps": 0.5, "momentum": 0.5},
    ),
    "centred-variance": (
        "RMSprop",
        {"denominator": "variance", "lr": 0.03, "alpha": 0.75, "eps": 0.5, "centered": True,
         "maximize": True},
    ),
    "running-mean": (
        "AdamW",
        {"bias_correction": "running_mean", "lr": 0.1, "betas": (0.6, 0.75), "eps": 0.125,
         "weight_decay": 0.25, "amsgrad": True},
    ),
    "uncorrected": (
        "Adam",
        {"bias_correction": None, "lr": 0.1, "betas": (0.6, 0.75), "eps": 0.125,
         "weight_decay": 0.125, "maximize": True},
    ),
}  # fmt: skip


def beside(variant: str, groups: int = 2, **arguments: Any) -> Beside:
    """A variant in parameter groups that differ in lr."""
    name, options = VARIANTS[variant]
    sets = [{**options, "lr": options["lr"] / (1 + i)} for i in range(groups)]
    return Beside(name, sets, **arguments)


def run_all(optimizers: list[Any], steps: int, first: int = 0) -> None:
    """Step each with the same random gradients."""
    for seed in range(first, first + steps):
        for each in optimizers:
            generator = torch.Generator().manual_seed(seed)
            for p in (p for group in each.param_groups for p in group["params"]):
                p.grad = torch.randn(p.shape, generator=generator).to(DEVICE, p.dtype)
            each.step()
