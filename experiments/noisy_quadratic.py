"""SGD, RMSprop, Adam, their SVAG and their SDE on a noisy quadratic, all on one Brownian motion.

f(x) = x H x / 2 and a gradient's noise is normal with Sigma = sigma^2 diag(1 + x^2 / (1 + x^2)).
A refinement n does n steps where the base does one, with what n means for the hyper-parameters:
noise sqrt(n) times as large, lr 1 / sqrt(n) (SGD: 1 / n), and so on. All of them approximate one
SDE. Each replica's noise is the increment of the Brownian motion that also drives its SDE: they
then differ by what the approximation does, and very little by chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fusedopt
from fusedopt import scaling

from . import sde
from .arms import backend

# Test functions of a replica's state; SGD has no u.
FUNCTIONS = ("loss", "|x|²", "mean |x|", "mean √u")
_RULES = {"SGD": "linear", "RMSprop": "sqrt", "Adam": "sqrt"}


class Quadratic:
    """The loss and its gradient's mean and noise; x is [replica, dimension]."""

    def __init__(self, curvatures: list[float], sigma: float) -> None:
        dimension = len(curvatures)
        # A rotation, so that coordinates interact.
        basis, _ = torch.linalg.qr(
            torch.randn(dimension, dimension, generator=torch.Generator().manual_seed(0)).double()
        )
        self.hessian = basis @ torch.tensor(curvatures, dtype=torch.float64).diag() @ basis.T
        self.sigma = sigma

    def slope(self, x: Tensor) -> Tensor:
        """Return grad f."""
        return x @ self.hessian.to(x.device)

    def spread(self, x: Tensor) -> Tensor:
        """Return the noise's standard deviation over sigma."""
        square = x * x
        return (1 + square / (1 + square)).sqrt()

    def functions(self, x: Tensor, u: Tensor | None) -> Tensor:
        """Return ``FUNCTIONS`` [function, replica]."""
        values = [(x * self.slope(x)).sum(1) / 2, x.square().sum(1), x.abs().mean(1)]
        if u is not None:
            values.append(u.sqrt().mean(1))
        return torch.stack(values)


@dataclass(frozen=True)
class Setting:
    """A base optimizer with its problem and start.

    Attributes:
        kind: ``"SGD"``, ``"RMSprop"`` or ``"Adam"``.
        hyper: the base's hyper-parameters.
        problem: with the base's sigma.
        start: of every coordinate.
        start_u: the second moment at the start, over that of the noise there.
        warm: steps of the base that Adam's averages have behind them. At time 0 the SDE is
            singular: it starts later.
    """

    kind: str
    hyper: Mapping[str, Any]
    problem: Quadratic
    start: float
    start_u: float
    warm: int

    @property
    def constants(self) -> sde.Constants:
        """Return the constants of the SDE."""
        return sde.constants(self.kind, self.hyper, self.problem.sigma)

    @property
    def time(self) -> float:
        """Return when Adam's averages are as old as they are at the start."""
        return self.warm * self.constants.step

    def state(self, x: Tensor) -> sde.State:
        """Return the state at the start, given zeros [replica, dimension]."""
        x = x + self.start
        u = self.start_u * self.problem.spread(x).square()
        if self.kind == "SGD":
            return (x,)
        if self.kind == "RMSprop":
            return x, u
        bias1, bias2 = (-math.expm1(-rate * self.time) for rate in self.constants.rates)
        return x, bias1 * self.problem.slope(x), bias2 * u


class Solution:
    """The SDE's solution, `parts` steps to a step of the base."""

    def __init__(self, setting: Setting, zeros: Tensor, parts: int) -> None:
        self.setting, self.parts = setting, parts
        self.equation = sde.EQUATIONS[setting.kind](setting.problem, setting.constants)
        self.values, self.time = setting.state(zeros), setting.time

    def advance(self, increments: Tensor) -> None:
        """Do a step of the base; increments [parts, replica, dimension] have variance 1 / parts."""
        step = self.setting.constants.step
        self.values = sde.euler_maruyama(
            self.equation, self.values, self.time, step / self.parts, increments * math.sqrt(step)
        )
        self.time += step

    def functions(self) -> Tensor:
        """Return the test functions [function, replica]."""
        u = self.values[-1] if len(self.values) > 1 else None
        return self.setting.problem.functions(self.values[0], u)


class Refined:
    """The optimizer itself, `parts` steps to a step of the base, by the rule for its batch size."""

    def __init__(self, setting: Setting, zeros: Tensor, parts: int) -> None:
        self.setting, self.parts = setting, parts
        x, *averages = setting.state(zeros)
        self.x = torch.nn.Parameter(x)
        # An n-th of the batch: n times the variance.
        self.sigma = setting.problem.sigma * math.sqrt(parts)
        made: type[fusedopt.FusedOptimizer] = getattr(fusedopt, setting.kind)
        self.optimizer = made([self.x], **setting.hyper, backend=backend(zeros.device))
        if averages:
            self._load(averages)
        self._refine()

    def _load(self, averages: list[Tensor]) -> None:
        names = ("exp_avg", "exp_avg_sq") if self.setting.kind == "Adam" else ("square_avg",)
        state = dict(zip(names, averages, strict=True))
        state[names[-1]] = state[names[-1]] * self.setting.problem.sigma**2
        state["step"] = torch.tensor(float(self.setting.warm))
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": {0: state}})

    def _refine(self) -> None:
        """Make the base, with its state, the finer optimizer."""
        scaling.rescale_(self.optimizer, self.parts, 1, _RULES[self.setting.kind])

    def _gradient(self, noise: Tensor, sigma: float) -> Tensor:
        x, problem = self.x.detach(), self.setting.problem
        return torch.addcmul(problem.slope(x), problem.spread(x), noise, value=sigma)

    def advance(self, increments: Tensor) -> None:
        """Do a step of the base; increments [parts, replica, dimension] have variance 1 / parts."""
        for noise in increments * math.sqrt(self.parts):
            self.x.grad = self._gradient(noise, self.sigma)
            self.optimizer.step()

    def functions(self) -> Tensor:
        """Return the test functions [function, replica]."""
        u = None
        if self.setting.kind != "SGD":
            name = "exp_avg_sq" if self.setting.kind == "Adam" else "square_avg"
            u = self.optimizer.state[self.x][name] / self.sigma**2
        return self.setting.problem.functions(self.x.detach(), u)


class Amplified(Refined):
    """SVAG: as many steps as ``Refined``, its noise made from two gradients of the base's noise."""

    def __init__(self, setting: Setting, zeros: Tensor, ell: int) -> None:
        self.ell = ell
        super().__init__(setting, zeros, steps_per_step(setting.kind, ell))
        self.generator = torch.Generator(zeros.device).manual_seed(ell)

    def _refine(self) -> None:
        self.svag = fusedopt.SVAG(self.optimizer, ell=self.ell)

    def advance(self, increments: Tensor) -> None:
        """Do a step of the base; increments [parts, replica, dimension] have variance 1 / parts."""
        for noise in increments * math.sqrt(self.parts):
            first, second = self._pair(noise)
            self.x.grad = self._gradient(first, self.setting.problem.sigma)
            self.svag.hold()
            self.x.grad = self._gradient(second, self.setting.problem.sigma)
            self.svag.step()

    def _pair(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return independent normal draws whose mix by SVAG's weights is sqrt(parts) noise.

        The weights are the paper's, not those of ``fusedopt.SVAG``, which thereby is tested.
        """
        n = self.parts
        root = math.sqrt(2 * n - 1)
        a, b = (1 + root) / (2 * math.sqrt(n)), (1 - root) / (2 * math.sqrt(n))
        other = torch.empty_like(noise).normal_(generator=self.generator)
        return a * noise - b * other, b * noise + a * other


def steps_per_step(kind: str, ell: int) -> int:
    """Return how many steps SVAG does for one of the base."""
    return ell if kind == "SGD" else ell**2


def simulate(
    setting: Setting,
    runs: Mapping[str, Solution | Refined],
    zeros: Tensor,
    steps: int,
    seed: int,
) -> Iterator[dict[str, Tensor]]:
    """Yield the test functions of every run at the start and after each step of the base."""
    generator = torch.Generator(zeros.device).manual_seed(seed)
    yield {name: run.functions() for name, run in runs.items()}
    finest = max(run.parts for run in runs.values())
    for _ in range(steps):
        draws = torch.empty(finest, *zeros.shape, dtype=zeros.dtype, device=zeros.device)
        increments = draws.normal_(std=1 / math.sqrt(finest), generator=generator)
        sums = {
            n: increments.unflatten(0, (n, -1)).sum(1) for n in {r.parts for r in runs.values()}
        }
        for run in runs.values():
            run.advance(sums[run.parts])
        yield {name: run.functions() for name, run in runs.items()}
