"""Bytes of parameters, gradients and states: kept, and moved by a step, as formats have them.

An update reads everything once and writes everything but the gradient. What it moves is what the
kernels are compiled for: ``kernels/aot/update.py`` has these sums as budgets of the machine code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..kernels.codecs.place import GROUP
from ..kernels.rule import Group, Rule
from ..memory.walk import rows_of, scale_shape
from .group import format_of, keeps_steps
from .tensors import is_scale


@dataclass(frozen=True)
class Part:
    """One of the tensors that belong to a parameter.

    Attributes:
        name: what it is, or the key of the state dictionary.
        dtype: of its elements.
        resident: bytes that are kept: of one element, or of all tensors.
        moved: bytes that a step reads and writes of it, the same.
    """

    name: str
    dtype: torch.dtype
    resident: float
    moved: float


def of_element(
    rule: Rule,
    group: Group,
    parameter: torch.dtype,
    gradient: torch.dtype,
    clip: bool = False,
) -> list[Part]:
    """List what belongs to one element of a tensor whose rows are whole groups.

    Args:
        rule: the update.
        group: hyper-parameters with sound options of precision.
        parameter: type of parameters.
        gradient: type of gradients.
        clip: whether the norm of the gradients is taken, which reads them once more.

    Returns:
        Parameter, gradient, further inputs, and what is kept, in the order of the kernels' table.
    """
    format = format_of(rule, group)
    size = gradient.itemsize
    found = [Part("parameter", parameter, parameter.itemsize, 2 * parameter.itemsize)]
    found.append(Part("gradient", gradient, size, size * (1 + clip)))
    for degree in rule.degrees[1:]:
        # Squares are kept in float32; a second gradient as the first.
        dtype = torch.float32 if degree == 2 else gradient
        name = "squares" if degree == 2 else "second gradient"
        found.append(Part(name, dtype, dtype.itemsize, dtype.itemsize))
    for name in format.names:
        dtype = format.dtype(name, parameter)
        share = dtype.itemsize / (GROUP if is_scale(format, name) else 1)
        found.append(Part(name, dtype, share, 2 * share))
    return found


def of_tensors(
    rule: Rule,
    group: Group,
    parameter: torch.dtype,
    gradient: torch.dtype,
    shapes: Sequence[Sequence[int]],
    clip: bool = False,
) -> list[Part]:
    """List what belongs to whole tensors: exactly, step counts included.

    Args:
        rule: as of ``of_element``, and what follows.
        group: the hyper-parameters.
        parameter: type of parameters.
        gradient: type of gradients.
        shapes: of the parameters; of shards, those of their parts.
        clip: whether the norm is taken.
    """
    elements = sum(map(math.prod, shapes))
    scales = sum(math.prod(_scale_shape(shape)) for shape in shapes)
    found = []
    for part in of_element(rule, group, parameter, gradient, clip):
        count = scales * GROUP if part.resident < part.dtype.itemsize else elements
        found.append(
            replace(part, resident=round(count * part.resident), moved=round(count * part.moved))
        )
    if keeps_steps(rule, group):
        # A float32 of its own, which the host keeps and counts.
        found.append(Part("step", torch.float32, 4 * len(shapes), 0))
    return found


def _scale_shape(shape: Sequence[int]) -> tuple[int, ...]:
    tensor = torch.empty(tuple(shape), device="meta")
    return scale_shape(tensor.shape, rows_of(tensor))


def total(parts: Sequence[Part], released: bool = False) -> tuple[float, float]:
    """Return bytes kept and moved.

    Args:
        parts: what there is.
        released: whether gradients are freed as soon as each has been used, so that what is there
            of them at a time is not the model's.
    """
    kept = sum(part.resident for part in parts if not (released and part.name == "gradient"))
    return kept, sum(part.moved for part in parts)
