"""What results are compared with: none of it shares update mathematics with the library.

* ``source_of``: the text of a device function, executed by torch instead of Triton.
* ``Trajectory`` over ``torch.optim``'s single-tensor loop, optionally in a wider type with one
  rounding a step: what a kernel that computes wide and stores narrow must produce.
"""

from __future__ import annotations

import ast
import dis
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from fusedopt import FusedOptimizer
from fusedopt.kernels import lang
from fusedopt.kernels.rule import Rule
from tolerances import Tolerance, assert_close_ulps, assert_equal
from torch import Tensor

# The torch class that takes a rule's example groups as keyword arguments.
TORCH_CLASS: Mapping[str, type[torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "RMSprop": torch.optim.RMSprop,
    "Adam": torch.optim.Adam,
}

INTERPRETED = lang.INTERPRETED


# --- device functions, executed by torch -----------------------------------------------------


class ForeignName(Exception):
    """A device function uses what an elementwise rule must not."""


class _Language:
    """The part of ``triton.language`` that the vocabulary in ``lang`` is made of, in torch."""

    class PropagateNan:
        ALL = object()

    float32 = torch.float32
    where = staticmethod(torch.where)
    sqrt = staticmethod(torch.sqrt)
    sqrt_rn = staticmethod(torch.sqrt)
    div_rn = staticmethod(torch.div)

    @staticmethod
    def maximum(a: Tensor, b: Tensor, propagate_nan: object) -> Tensor:
        assert propagate_nan is _Language.PropagateNan.ALL
        return torch.maximum(a, b)


def _execute(function: Any, namespace: dict[str, Any]) -> Callable[..., Any]:
    """Define a jitted function's text in a namespace that holds nothing else."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function.fn)))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list.clear()
    for argument in definition.args.args:
        argument.annotation = None
    exec(compile(tree, inspect.getsourcefile(function.fn) or "", "exec"), namespace)
    result: Callable[..., Any] = namespace[definition.name]
    return result


def _vocabulary() -> dict[str, Callable[..., Any]]:
    namespace: dict[str, Any] = {"__builtins__": {}, "tl": _Language}
    device_functions = {k: v for k, v in vars(lang).items() if isinstance(v, type(lang.lerp))}
    return {name: _execute(function, namespace) for name, function in device_functions.items()}


def source_of(update: Any) -> Callable[..., Any]:
    """Return the device function as a function of torch tensors.

    Raises:
        ForeignName: if its text, executed or not, names anything but its arguments and the
            vocabulary of ``kernels/lang.py``, or reaches into a value by an attribute.
    """
    words = _vocabulary()
    function = _execute(update, {"__builtins__": {}, **words})
    for instruction in dis.get_instructions(function.__code__):  # type: ignore[attr-defined]
        kind = instruction.opname
        if kind.startswith(("IMPORT_", "LOAD_ATTR", "LOAD_METHOD", "STORE_", "DELETE_")):
            if kind.startswith("STORE_FAST"):
                continue
            raise ForeignName(f"{kind} {instruction.argval}")
        if kind in ("LOAD_GLOBAL", "LOAD_NAME") and instruction.argval not in words:
            raise ForeignName(f"{kind} {instruction.argval}")
    return function


def as_scalars(
    values: Iterable[Any], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Tensor, ...]:
    """Coefficients as a device function gets them: scalars of the compute type."""
    return tuple(torch.tensor(float(v), dtype=dtype, device=device) for v in values)


# --- trajectories ----------------------------------------------------------------------------


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
        [scale * torch.randn_like(p, dtype=dtype or p.dtype).detach() for p in params]
        for scale in gradient_scales(steps)
    ]


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
        stored: types that parameters and states are rounded to after every step, by label; for
            an optimizer whose parameters are wider than that.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        labels: Sequence[str],
        stored: Mapping[str, torch.dtype] | None = None,
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
                give_gradient(p, g.clone() if self.stored is None else g.to(p.dtype))
        self.optimizer.step()
        if self.stored is not None:
            self._round(self.stored)
        self._note_largest()

    def values(self) -> dict[str, Tensor]:
        """Copy parameters and states, by label and label + state name."""
        return {
            name: t.clone() if stored is None or name.endswith(" step") else t.to(stored)
            for name, t, stored in self._tensors()
        }

    def _tensors(self) -> Iterable[tuple[str, Tensor, torch.dtype | None]]:
        for label, p in zip(self.labels, self.params, strict=True):
            stored = self.stored[label] if self.stored is not None else None
            yield label, p.detach(), stored
            for key, value in self.optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    yield f"{label} {key}", value, stored

    def _round(self, stored: Mapping[str, torch.dtype]) -> None:
        for name, tensor, dtype in self._tensors():
            if not name.endswith(" step"):
                tensor.copy_(tensor.to(dtype))

    def _note_largest(self) -> None:
        for name, tensor, _ in self._tensors():
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


# --- optimizers for any rule -----------------------------------------------------------------


def optimizer_of(rule: Rule) -> type[FusedOptimizer]:
    """Return an optimizer class for a rule, taking groups and a backend."""

    def init(self: FusedOptimizer, params: Any, **common: Any) -> None:
        FusedOptimizer.__init__(self, params, {}, **common)

    return type(f"Fused{rule.name}", (FusedOptimizer,), {"rule": rule, "__init__": init})


def describe(group: Mapping[str, Any], default: Mapping[str, Any]) -> str:
    """Name a group by what it changes."""
    parts = [f"{k}={v}" for k, v in group.items() if default.get(k, None) != v]
    return ",".join(parts).replace(" ", "") or "default"
