"""Checks made before a step changes anything, with messages that say what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import backends
from .codecs import STORABLE, real_dtype
from .layout import overlaps_itself


def describe(optimizer: Optimizer, param: Tensor) -> str:
    """Name a parameter: its name where the optimizer knows it, its place, and its shape."""
    for index, group in enumerate(optimizer.param_groups):
        for position, candidate in enumerate(group["params"]):
            if candidate is param:
                names = group.get("param_names")
                name = f"{names[position]!r} = " if names else ""
                place = f"param_groups[{index}]['params'][{position}]"
                return f"parameter {name}{place} of shape {tuple(param.shape)}"
    return f"parameter of shape {tuple(param.shape)}"


def check_gradients(optimizer: Any, params: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Raise for a parameter or gradient that cannot be used.

    Raises:
        RuntimeError: sparse gradients, gradients on another device or of another shape, an
            expanded parameter, a backend that cannot run.
        TypeError: element types that are not floating point.
    """
    for p, gradient in zip(params, gradients, strict=True):
        problem = _problem(p, gradient)
        if problem is not None:
            error, text = problem
            raise error(f"{describe(optimizer, p)}: {text}")
    for device in dict.fromkeys(p.device for p in params):
        backends.choose(device, optimizer.backend)


def _problem(p: Tensor, gradient: Tensor) -> tuple[type[Exception], str] | None:
    if gradient.layout != torch.strided:
        return RuntimeError, (
            f"its gradient is sparse ({gradient.layout}). Use a dense one (for an embedding"
            " sparse=False), or gradient.to_dense(), or torch.optim.SparseAdam for it"
        )
    if p.layout != torch.strided:
        return RuntimeError, f"its layout is {p.layout}; only dense parameters are supported"
    if gradient.device != p.device:
        return RuntimeError, (
            f"it is on {p.device}, its gradient on {gradient.device}. Move one to the other"
        )
    if p.device.type == "meta":
        return RuntimeError, "it is on the meta device and has no values to update"
    if gradient.shape != p.shape:
        return RuntimeError, (
            f"its gradient has shape {tuple(gradient.shape)}; set p.grad = None and run"
            " backward again after changing a parameter's shape"
        )
    for name, tensor in (("its", p), ("its gradient's", gradient)):
        if real_dtype(tensor.dtype) not in STORABLE:
            return TypeError, f"{name} type is {tensor.dtype}; it must be floating point"
    if p.is_complex() != gradient.is_complex():
        return TypeError, "parameter and gradient must both be complex or both be real"
    if overlaps_itself(p):
        return RuntimeError, (
            "several of its elements share one memory location (it is an expanded view), so"
            " it cannot be updated in place; optimize a clone() or the tensor it is a view of"
        )
    return None


def check_states(
    optimizer: Any, param: Tensor, names: Sequence[str], tensors: Sequence[Tensor]
) -> None:
    """Raise for a state that does not fit its parameter.

    Raises:
        RuntimeError: a state on another device or of another shape.
    """
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.shape != param.shape or tensor.device != param.device:
            raise RuntimeError(
                f"{describe(optimizer, param)} on {param.device}: its state {name!r} has shape"
                f" {tuple(tensor.shape)} on {tensor.device}. Load the optimizer's state after"
                " the model's parameters have their final shape and device"
            )
        if real_dtype(tensor.dtype) not in STORABLE:
            raise RuntimeError(
                f"{describe(optimizer, param)}: its state {name!r} has type {tensor.dtype}"
            )
