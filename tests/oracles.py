"""A device function's own text, executed by torch in the place of Triton."""

from __future__ import annotations

import ast
import dis
import inspect
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

import numpy
import torch
from torch import Tensor

from fusedopt.kernels import lang

INTERPRETED = lang.INTERPRETED


class ForeignName(Exception):
    """A device function uses what an elementwise rule must not."""


class _Language:
    """The part of ``triton.language`` that the vocabulary in ``lang`` is made of, in torch."""

    class PropagateNan:
        ALL = object()

    float32 = torch.float32
    where = staticmethod(torch.where)
    div_rn = staticmethod(torch.div)

    @staticmethod
    def sqrt(x: Tensor) -> Tensor:
        # Not torch.sqrt: on the CPU it is off by one ulp for some values.
        return torch.as_tensor(numpy.sqrt(x.numpy()))

    sqrt_rn = sqrt

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
