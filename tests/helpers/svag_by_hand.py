"""SVAG written out from its formulas: torch's optimizers in float64, fed with the mixed gradient.

``rescaled`` and ``weights`` are the table of Malladi et al. 2022 (adaptive methods) and of Li,
Malladi and Arora 2021 (SGD). Nothing here is taken from the package but what is under test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from contract import (
    SHAPES,
    Pair,
    assert_same_state,
    gradient_like,
    groups_of,
    new_params,
    set_gradients,
)
from torch import Tensor
from torch.optim import Optimizer
from trajectory import give_gradient

import fusedopt

NAMES = ("SGD", "RMSprop", "Adam", "AdamW")
ELLS = (1, 2, 3.5)

# Steps are large, averages short, and eps is no smaller than the roots it is added to.
OPTIONS: Mapping[str, dict[str, Any]] = {
    "SGD": {"lr": 0.3, "weight_decay": 0.1},
    "RMSprop": {"lr": 0.1, "alpha": 0.7, "eps": 0.3, "weight_decay": 0.1},
    "Adam": {"lr": 0.2, "betas": (0.6, 0.8), "eps": 0.3, "weight_decay": 0.1},
    "AdamW": {"lr": 0.2, "betas": (0.6, 0.8), "eps": 0.3, "weight_decay": 0.4},
}

# float64 against float64: no slip in a formula is that small, a float32 on the way neither.
EXACT = {"rtol": 1e-12, "atol": 1e-13}

each_name = pytest.mark.parametrize("name", NAMES)
each_ell = pytest.mark.parametrize("ell", ELLS)


# The interpreter is slow: where a test's subject is the host's part, two classes on Triton do.
on_backends = pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "reference") for name in NAMES), ("SGD", "triton"), ("AdamW", "triton")],
)

# Coefficients from the host, or from the device as under a CUDA graph; not for SGD.
PATHS = [(name, live) for name in NAMES for live in (False, True) if name != "SGD" or not live]
each_path = pytest.mark.parametrize(
    ("name", "live"), PATHS, ids=[f"{n}-{'capturable' if live else 'host'}" for n, live in PATHS]
)

Gradients = Sequence[Tensor | None]


def weights(name: str, ell: float) -> tuple[float, float]:
    """Weight of the first gradient and of the second."""
    root = math.sqrt(2 * (ell if name == "SGD" else ell**2) - 1)
    return (1 + root) / 2, (1 - root) / 2


def rescaled(name: str, ell: float, options: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters of the smaller steps."""
    new = {**options, "lr": options["lr"] / ell}
    if name == "SGD":
        return new
    if "alpha" in options:
        new["alpha"] = 1 - (1 - options["alpha"]) / ell**2
    if "betas" in options:
        new["betas"] = tuple(1 - (1 - beta) / ell**2 for beta in options["betas"])
    new["eps"] = options["eps"] * ell
    if name == "AdamW" or options.get("decoupled_weight_decay"):
        new["weight_decay"] = options["weight_decay"] / ell
    return new


def draw(params: Sequence[Tensor], seed: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Gradients that depend on the seed and on the place."""
    values = [gradient_like(p, 1000 * seed + place) for place, p in enumerate(params)]
    return [v if dtype is None else v.to(dtype) for v in values]


def give(params: Sequence[Tensor], gradients: Gradients) -> None:
    for p, g in zip(params, gradients, strict=True):
        if g is None:
            p.grad = None
        else:
            give_gradient(p, g)


def mix(name: str, ell: float, first: Gradients, second: Gradients) -> list[Tensor | None]:
    """The gradient of the step, in float64; None where either is."""
    r1, r2 = weights(name, ell)

    def one(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if a is None or b is None:
            return None
        wide = torch.complex128 if a.is_complex() else torch.float64
        return r1 * a.to(wide) + r2 * b.to(wide)

    return [one(a, b) for a, b in zip(first, second, strict=True)]


def plain(name: str, params: Any = None, **options: Any) -> Any:
    """An optimizer of ``OPTIONS``, of new parameters in float64 or of these."""
    params = new_params(dtype=torch.float64) if params is None else params
    return getattr(fusedopt, name)(params, **{**OPTIONS[name], **options})


def stepped(name: str, params: Any = None, **options: Any) -> Any:
    """The same after three steps of its own."""
    optimizer = plain(name, params, **options)
    for seed in range(1, 4):
        set_gradients(groups_of(optimizer), seed)
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def made(
    name: str, ell: float, *, backend: str = "reference", **options: Any
) -> tuple[list[Tensor], fusedopt.SVAG]:
    """Parameters, and an optimizer of them under SVAG."""
    optimizer = plain(name, **options, backend=backend)
    return groups_of(optimizer), fusedopt.SVAG(optimizer, ell)


def hold(svag: fusedopt.SVAG, seed: int = 1) -> list[Tensor]:
    """Hold new gradients, and give the parameters others."""
    params = groups_of(svag.optimizer)
    first = draw(params, seed)
    give(params, first)
    svag.hold()
    give(params, draw(params, seed + 1))
    return first


def svag_step(svag: fusedopt.SVAG, first: Gradients, second: Gradients) -> None:
    """One step as the documentation shows it, with gradients that are given."""
    params = groups_of(svag.optimizer)
    give(params, first)
    svag.hold()
    give(params, second)
    svag.step()
    svag.zero_grad()


class Beside:
    """An optimizer under SVAG, and torch's of the hyper-parameters rescaled by hand.

    Args:
        name: the class.
        ell: of SVAG.
        groups: options of each parameter group, in addition to ``OPTIONS[name]``.
        ours_only: arguments for our class alone.
        options: arguments for both.
    """

    def __init__(
        self,
        name: str,
        ell: float,
        *,
        groups: Sequence[dict[str, Any]] = ({},),
        shapes: Sequence[tuple[int, ...]] = SHAPES,
        dtype: torch.dtype = torch.float64,
        backend: str = "reference",
        ours_only: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.name, self.ell = name, ell
        merged = [{**OPTIONS[name], **options, **group} for group in groups]
        params = [new_params(shapes, dtype, seed) for seed in range(len(groups))]
        copies = [new_params(shapes, dtype, seed) for seed in range(len(groups))]
        mine = [{**o, "params": p} for o, p in zip(merged, params, strict=True)]
        other = [
            {**rescaled(name, ell, o), "params": p} for o, p in zip(merged, copies, strict=True)
        ]
        more = {"backend": backend, **(ours_only or {})}
        self.ours = getattr(fusedopt, name)(mine, **more)
        self.svag = fusedopt.SVAG(self.ours, ell)
        self.theirs: Optimizer = getattr(torch.optim, name)(other, lr=1.0, foreach=False)
        self.params, self.copies = Pair.flat(params), Pair.flat(copies)
        self.start = [p.detach().clone() for p in self.params]
        self.seed = 0

    def draw(self) -> tuple[list[Tensor], list[Tensor]]:
        """Two new gradients of every parameter."""
        self.seed += 2
        return draw(self.params, self.seed), draw(self.params, self.seed + 1)

    def oracle(self, first: Gradients, second: Gradients) -> None:
        give(self.copies, mix(self.name, self.ell, first, second))
        self.theirs.step()

    def step(self, steps: int = 1) -> None:
        for _ in range(steps):
            first, second = self.draw()
            svag_step(self.svag, first, second)
            self.oracle(first, second)

    def check(self) -> None:
        """Parameters and states agree, and standing still would not have."""
        assert_same_state(self.ours, self.theirs, **EXACT)
        for p, start in zip(self.params, self.start, strict=True):
            assert p.numel() == 0 or (p.detach() - start).abs().max() > 1e-3
