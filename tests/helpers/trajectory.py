"""Runs of an optimizer, and what they are compared with: ``torch.optim``'s single-tensor loop.

For stored types narrower than the arithmetic, torch runs in the wide type and rounds parameters
and states once a step: what a kernel that computes wide and stores narrow must produce.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from contract import OWN
from tolerances import Tolerance, assert_close_ulps, assert_equal
from torch import Tensor

from fusedopt import FusedOptimizer
from fusedopt.kernels.rule import Rule
from fusedopt.testing import statistics_for

# The torch class that takes a rule's example groups as keyword arguments.
TORCH_CLASS: Mapping[str, type[torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "RMSprop": torch.optim.RMSprop,
    "Adam": torch.optim.Adam,
}


def torch_groups(rule: Rule) -> list[Mapping[str, Any]]:
    """The example groups that say something which torch's class can do, too."""
    own = OWN[rule.name]
    return [g for g in rule.example_groups if {name: g[name] for name in own} == own]


def wide(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The type to compute in: float64 if any operand has it, else float32."""
    return torch.float64 if torch.float64 in set(dtypes) else torch.float32


def gradient_scales(steps: int) -> list[float]:
    """Large gradients, then small ones: second moments rise and fall, so AMSGrad's maximum holds.

    With gradients of one size, beta2 = 0.999 forgets too slowly for the maximum ever to be passed.
    """
    return [3.0 if step < 5 else 0.1 for step in range(steps)]


def make_gradients(
    params: Sequence[Tensor], steps: int, dtype: torch.dtype | None = None
) -> list[list[Tensor]]:
    """Draw gradients for every step and parameter."""
    return [
        [scale * away_from_zero(p, dtype or p.dtype) for p in params]
        for scale in gradient_scales(steps)
    ]


def away_from_zero(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Draw values of magnitude at least a half.

    A gradient that nearly cancels weight_decay * p leaves a difference of few correct bits, whose
    square would call for a wider tolerance.
    """
    # Drawn on the CPU, whose numbers are the same on every machine.
    values = torch.randn_like(like.detach(), dtype=dtype, device="cpu").to(like.device)
    parts = torch.view_as_real(values) if dtype.is_complex else values
    parts.mul_(0.5).add_(parts.sign(), alpha=0.5)
    return values


def give_gradient(param: Tensor, gradient: Tensor) -> None:
    """Assign a gradient, of another type than the parameter if need be."""
    if gradient.dtype != param.dtype:
        param.grad_dtype = None
    param.grad = gradient


class Trajectory:
    """An optimizer at work, with its parameters and states readable by name.

    Args:
        optimizer: whose steps these are.
        labels: a name for each of its parameters, in order.
        stored: the type that parameters and states are rounded to after every step, and gradients
            widened from before it, for an optimizer whose parameters are wider; None for one that
            runs as it is.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        labels: Sequence[str],
        stored: torch.dtype | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.labels = list(labels)
        self.stored = stored
        assert len(self.labels) == len(self.params)
        self.largest: dict[str, Tensor] = {}
        self._note_largest()

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """Take one step with these gradients."""
        for p, g in zip(self.params, gradients, strict=True):
            if g is None:
                p.grad = None
            else:
                give_gradient(p, g if self.stored is None else g.to(p.dtype))
        self.optimizer.step()
        if self.stored is not None:
            self._round(self.stored)
        self._note_largest()

    def values(self) -> dict[str, Tensor]:
        """Copy parameters and states, by label and label + state name."""
        return {
            name: tensor.to(
                tensor.dtype if self.stored is None or name.endswith(" step") else self.stored,
                copy=True,
            )
            for name, tensor in self._tensors()
        }

    def _tensors(self) -> Iterable[tuple[str, Tensor]]:
        for label, p in zip(self.labels, self.params, strict=True):
            yield label, p.detach()
            for key, value in self.optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    yield f"{label} {key}", value

    def _round(self, stored: torch.dtype) -> None:
        for name, tensor in self._tensors():
            if not name.endswith(" step"):
                tensor.copy_(tensor.to(stored))

    def _note_largest(self) -> None:
        for name, tensor in self._tensors():
            size = tensor.abs() if not tensor.is_complex() else torch.view_as_real(tensor).abs()
            seen = self.largest.get(name)
            self.largest[name] = size if seen is None else torch.maximum(seen, size)


CHECKPOINTS = (1, 5, 30)


def assert_same_trajectory(
    actual: Trajectory,
    expected: Trajectory,
    gradients: Sequence[Sequence[Tensor | None]],
    tolerances: Mapping[torch.dtype, Tolerance] | None,
) -> None:
    """Run both and compare parameters and states after 1, 5 and 30 steps.

    Standing still since the checkpoint before must fail for every parameter, and for states up
    to the second checkpoint (later ones of AMSGrad rightly stand still).

    Args:
        actual: what is tested.
        expected: what it is tested against.
        gradients: for every step, one gradient a parameter or None.
        tolerances: by stored type; None demands equal values.
    """
    before = expected.values()
    for number, gradient in enumerate(gradients, start=1):
        actual.step(gradient)
        expected.step(gradient)
        if number not in CHECKPOINTS:
            continue
        got, wanted = actual.values(), expected.values()
        assert got.keys() == wanted.keys(), f"{sorted(got)} instead of {sorted(wanted)}"
        for name, value in wanted.items():
            where = f"step {number}: {name}"
            if name.endswith(" step"):
                assert_equal(got[name], value, None, where)
                continue
            is_state = " " in name
            still = is_state and number > CHECKPOINTS[1]
            old = None if still else before.get(name, torch.zeros_like(value))
            if tolerances is None:
                assert_equal(got[name], value, old, where)
            else:
                allowed = tolerances[value.dtype.to_real()]
                largest = expected.largest[name]
                assert_close_ulps(got[name], value, old, allowed, where, scale=largest)
        before = wanted


def assert_same_ends(
    actual: Trajectory,
    expected: Trajectory,
    before: Mapping[str, Tensor],
    tolerances: Mapping[torch.dtype, Tolerance],
) -> None:
    """Compare parameters and states where two runs have ended.

    Args:
        actual: what is tested.
        expected: what it is tested against.
        before: where the parameters started; states start at zero.
        tolerances: by stored type.
    """
    got, wanted = actual.values(), expected.values()
    assert got.keys() == wanted.keys(), f"{sorted(got)} instead of {sorted(wanted)}"
    for name, value in wanted.items():
        if name.endswith(" step"):
            assert_equal(got[name], value, None, name)
            continue
        start = before.get(name, torch.zeros_like(value))
        allowed = tolerances[value.dtype.to_real()]
        largest = expected.largest[name]
        assert_close_ulps(got[name], value, start, allowed, name, scale=largest)


def optimizer_of(rule: Rule) -> type[FusedOptimizer]:
    """Return an optimizer class for a rule, taking groups and a backend."""

    def init(self: FusedOptimizer, params: Any, **common: Any) -> None:
        FusedOptimizer.__init__(self, params, {}, statistics=statistics_for(rule), **common)

    return type(f"Fused{rule.name}", (FusedOptimizer,), {"rule": rule, "__init__": init})


def describe(group: Mapping[str, Any], default: Mapping[str, Any]) -> str:
    """Name a group by what it changes."""
    parts = [f"{k}={v}" for k, v in group.items() if default.get(k, None) != v]
    return ",".join(parts).replace(" ", "") or "default"
