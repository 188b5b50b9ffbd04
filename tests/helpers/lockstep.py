"""An optimizer in any format beside the update's formula in float64, step by step.

Each step starts from what the optimizer has stored, read by hand. So that what is compared is the
arithmetic of one step and one storing, with no error that has grown: bounds are those of the
format's bits. ``free`` is a second loop that is never told of what was rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from formats_by_hand import (
    ARITHMETIC,
    HALF_UNIT,
    assert_encoded,
    code_type,
    is_code,
    joined,
    read,
    rounded,
)
from torch import Tensor
from variants_by_hand import LOOPS, Loop

import fusedopt

# Samples of a gradient, for rules that read them.
SAMPLES = 3
# Half a unit below the normal range.
# What is above zero may stay at float16's smallest number.
TINY = {torch.float16: 2.0**-24, torch.bfloat16: 1e-40, torch.float32: 1e-44, torch.float64: 0.0}


def halves(g: Tensor, samples: int) -> Tensor:
    """Samples' gradients whose mean is g, and whose squares have another mean than its square."""
    factors = torch.linspace(-1, 3, samples, dtype=torch.float64)
    return (factors.reshape(-1, *[1] * g.dim()) * g.double()).to(g.dtype)


class Lockstep:
    """One parameter under an optimizer, and its loop.

    Args:
        name: the class in ``fusedopt``.
        p: the parameter's first value.
        formats: options of precision.
        hyper: other options, which the loop is told of.
        loops: the loops' classes by name.
        make: the class itself, where it is not in ``fusedopt``.
        optimizer: that has the parameter already.
        arithmetic: relative error of a step in float32.
        common: arguments that the loop is not told of.
    """

    def __init__(
        self,
        name: str,
        p: Tensor,
        formats: Mapping[str, Any],
        hyper: Mapping[str, Any],
        loops: Mapping[str, type[Loop]] = LOOPS,
        make: Any = None,
        optimizer: Any = None,
        arithmetic: float = ARITHMETIC,
        **common: Any,
    ) -> None:
        self.p = p if isinstance(p, torch.nn.Parameter) else torch.nn.Parameter(p)
        p = self.p.detach().clone()
        self.formats = dict(formats)
        self.sampled = name.startswith("BatchDecoupled")
        if self.sampled:
            common = {**common, "statistics": fusedopt.GradSampleSquares(), "virtual_batch_size": 1}
        if optimizer is None:
            make = make or getattr(fusedopt, name)
            optimizer = make([self.p], **hyper, **formats, **common)
        self.optimizer, self.arithmetic = optimizer, arithmetic
        self.loop = loops[name](p.double(), **hyper)
        self.free = loops[name](p.double(), **hyper)
        self.start = p.double().clone()

    @property
    def state(self) -> dict[str, Tensor]:
        return self.optimizer.state[self.p]

    def step(self, g: Tensor) -> None:
        """Take a step of all three, and compare."""
        self.give(g)
        self.optimizer.step()
        self.follow()

    def give(self, g: Tensor, scale: float = 1.0) -> None:
        """Set the gradient, multiplied by a loss scale, and read what is stored."""
        self._take_up()
        if self.sampled:
            samples = halves(g, SAMPLES)
            self.p.grad_sample = samples * scale
            self.g = samples.double().mean(0)
            self.square = samples.double().square().mean(0)
        else:
            self.p.grad = g * scale
            self.g, self.square = g.double(), None

    def follow(self, factor: float = 1.0) -> None:
        """Have the loops take the step that the optimizer has taken, and compare.

        Args:
            factor: of clipping.
        """
        before, square = self.loop.p.clone(), self.square
        g = factor * (-self.g if self.loop.maximize else self.g)
        for loop in (self.loop, self.free):
            loop.t += 1
            loop.update(g, torch.square if square is None else lambda _: factor**2 * square)
        self._compare_parameter(before)
        for name, exact in self.loop.state.items():
            self._compare_state(name, exact)

    def _take_up(self) -> None:
        """Read what is stored into the loop."""
        state = self.optimizer.state[self.p] if self.p in self.optimizer.state else {}
        self.loop.p = joined(self.p, state)
        self.loop.state = {name: read(state, name) for name in self.loop.state}

    def _compare_parameter(self, before: Tensor) -> None:
        exact, dtype, p = self.loop.p, self.p.dtype, self.p.detach()
        size = torch.maximum(exact.abs(), torch.maximum(before.abs(), (exact - before).abs()))
        # An average that cancels is as exact as its terms, and so is the update made of it.
        slack = self.arithmetic * (size + (exact - before).abs().amax()) if exact.numel() else size
        master, rounding = self.formats.get("master"), self.formats.get("rounding")
        full = joined(p, self.state)
        off = (full - exact).abs()
        unit = HALF_UNIT[dtype] * exact.abs() + TINY[dtype]
        if master == "remainder8":
            unit = (2 if rounding == "stochastic" else 1) * 2.0**-16 * exact.abs()
        elif master is not None:
            unit = 0.0
        elif rounding == "kahan":
            # The compensation is at most half a unit, and rounded to the parameter's type; one step
            # more where it would have been half a unit.
            unit = 2 * (HALF_UNIT[dtype] * unit + TINY[dtype])
        elif rounding == "stochastic":
            unit = 2 * unit
        assert (off <= unit + slack).all(), self._report("p", off, unit + slack)
        if rounding == "stochastic" and master is None:
            low, high = rounded(exact, dtype)
            near = (p.double() >= low - slack) & (p.double() <= high + slack)
            assert near.all(), "p is no neighbour of the value"
        if master is not None or rounding == "kahan":
            # Ties of small masters go away from zero.
            shown = (p.double() - full).abs() <= HALF_UNIT[dtype] * p.double().abs() + TINY[dtype]
            assert shown.all(), "the parameter is not its master rounded"

    def _compare_state(self, name: str, exact: Tensor) -> None:
        kept = self.state[name]
        assert kept.dtype == self.expected_type(name), f"{name}: {kept.dtype}"
        if is_code(kept):
            assert_encoded(self.state, name, exact, self.arithmetic)
            return
        bound = (HALF_UNIT[kept.dtype] + 4 * self.arithmetic) * exact.abs() + TINY[kept.dtype]
        # A difference of two terms is as exact as these are large.
        bound += self.arithmetic * exact.abs().amax() if exact.numel() else 0
        off = (kept.double() - exact).abs()
        assert (off <= bound).all(), self._report(name, off, bound)

    def expected_type(self, name: str) -> torch.dtype:
        """In what a state must be kept."""
        option = self.formats.get("state_dtype")
        option = option.get(name) if isinstance(option, dict) else option
        if option is None:
            return self.p.dtype
        return code_type(option, name) if isinstance(option, str) else option

    def drift(self) -> float:
        """How far the ends of the free loop and of the optimizer are apart, by the way gone."""
        end = joined(self.p, self.state)
        return float((end - self.free.p).norm() / (self.free.p - self.start).norm())

    def _report(self, name: str, off: Tensor, bound: Tensor | float) -> str:
        worst = (off / (bound + 1e-300)).max()
        return f"{name} after {self.loop.t}: {worst:.3g} times as far off as {self.formats} allows"
