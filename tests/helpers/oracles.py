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


def _shared(update: Any) -> dict[str, Callable[..., Any]]:
    """The parts that rules have in common: device functions of theirs that the text names."""
    named = set(update.fn.__code__.co_names)
    return {
        name: source_of(value)
        for name, value in vars(inspect.getmodule(update.fn)).items()
        if name in named
        and isinstance(value, type(lang.lerp))
        and value.fn.__module__.startswith("fusedopt.kernels.rules.")
    }


def source_of(update: Any) -> Callable[..., Any]:
    """Return the device function as a function of torch tensors.

    Raises:
        ForeignName: if its text, executed or not, names anything but its arguments, the vocabulary
            of ``kernels/lang.py`` and other device functions of rules, for which the same holds; or
            if it reaches into a value by an attribute.
    """
    words = {**_vocabulary(), **_shared(update)}
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
