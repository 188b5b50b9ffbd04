"""Stochastic differential equations of SGD, RMSprop and Adam, and their Euler-Maruyama solution.

A gradient is grad f(theta) + sigma z, with E z = 0 and Cov z = Sigma(theta), here diagonal. A step
advances the equation's time by lr for SGD, and by lr^2 for the other two. With W a Brownian motion,
u = v / sigma^2, and constants s = sigma0, e = eps0 and rates c1, c2 as in ``constants``:

    SGD      dtheta = -grad f dt - s Sigma^1/2 dW
    RMSprop  dtheta = -(grad f dt + s Sigma^1/2 dW) / (s sqrt(u) + e)
             du = c2 (diag Sigma - u) dt
    Adam     dtheta = -(m / b1) / (s sqrt(u / b2) + e) dt,  b_i = 1 - exp(-c_i t)
             dm = c1 (grad f - m) dt + c1 s Sigma^1/2 dW
             du = c2 (diag Sigma - u) dt

Li, Tai and E, arXiv 1511.06251, for SGD; Malladi et al., arXiv 2205.10287, definition 4.1 and its
counterpart for Adam, where P and the factor before it are multiplied out here. b_i is Adam's bias
correction. As u follows the noise alone, these hold where noise dominates the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

# theta; theta, u; or theta, m, u.
State = tuple[Tensor, ...]


class Oracle(Protocol):
    """Where gradients come from."""

    def slope(self, theta: Tensor) -> Tensor:
        """Return grad f."""

    def spread(self, theta: Tensor) -> Tensor:
        """Return the root of the diagonal of Sigma."""


@dataclass(frozen=True)
class Constants:
    """What the equation knows of the hyper-parameters: the same for all that it describes.

    Attributes:
        step: the time of one step, in units of lr or lr^2. The equation does not contain it.
        noise: sigma0, the root of step times sigma.
        eps: eps0 = lr eps.
        rates: (1 - beta) / step of every average.
    """

    step: float
    noise: float
    eps: float = 0.0
    rates: tuple[float, ...] = ()


def constants(kind: str, hyper: Mapping[str, Any], sigma: float) -> Constants:
    """Return the constants of ``"SGD"``, ``"RMSprop"`` or ``"Adam"`` with some hyper-parameters."""
    lr = hyper["lr"]
    if kind == "SGD":
        return Constants(lr, math.sqrt(lr) * sigma)
    betas = hyper["betas"] if kind == "Adam" else (hyper["alpha"],)
    step = lr**2
    return Constants(step, lr * sigma, lr * hyper["eps"], tuple((1 - b) / step for b in betas))


@dataclass(frozen=True)
class Sde:
    """An equation dX = drift(X, t) dt + diffusion(X) dW, W of the shape of theta.

    Attributes:
        drift: one tensor for each of the state's.
        diffusion: likewise; None where there is no noise.
    """

    drift: Callable[[State, float], State]
    diffusion: Callable[[State], tuple[Tensor | None, ...]]


def sgd(oracle: Oracle, c: Constants) -> Sde:
    """Return the equation of SGD."""
    return Sde(
        lambda state, time: (-oracle.slope(state[0]),),
        lambda state: (-c.noise * oracle.spread(state[0]),),
    )


def rmsprop(oracle: Oracle, c: Constants) -> Sde:
    """Return the equation of RMSprop without bias correction."""
    (rate,) = c.rates

    def drift(state: State, time: float) -> State:
        theta, u = state
        root = c.noise * u.sqrt() + c.eps
        return -oracle.slope(theta) / root, rate * (oracle.spread(theta).square() - u)

    def diffusion(state: State) -> tuple[Tensor | None, ...]:
        theta, u = state
        return -c.noise * oracle.spread(theta) / (c.noise * u.sqrt() + c.eps), None

    return Sde(drift, diffusion)


def adam(oracle: Oracle, c: Constants) -> Sde:
    """Return the equation of Adam; its averages begin at time 0."""
    rate1, rate2 = c.rates

    def drift(state: State, time: float) -> State:
        theta, m, u = state
        bias1, bias2 = (-math.expm1(-rate * time) for rate in c.rates)
        root = c.noise * (u / bias2).sqrt() + c.eps
        change = rate1 * (oracle.slope(theta) - m)
        return -m / (bias1 * root), change, rate2 * (oracle.spread(theta).square() - u)

    def diffusion(state: State) -> tuple[Tensor | None, ...]:
        return None, rate1 * c.noise * oracle.spread(state[0]), None

    return Sde(drift, diffusion)


EQUATIONS = {"SGD": sgd, "RMSprop": rmsprop, "Adam": adam}


def euler_maruyama(
    sde: Sde, state: State, time: float, dt: float, increments: Iterable[Tensor]
) -> State:
    """Return the state after a step of length dt for each increment of the Brownian motion.

    Args:
        sde: the equation.
        state: at the beginning.
        time: of the beginning.
        dt: length of a step.
        increments: normal with variance dt, of the shape of theta.
    """
    for count, increment in enumerate(increments):
        slopes = sde.drift(state, time + count * dt)
        noises = sde.diffusion(state)
        state = tuple(
            (x + dt * slope) if noise is None else (x + dt * slope).addcmul(noise, increment)
            for x, slope, noise in zip(state, slopes, noises, strict=True)
        )
    return state
