"""The tensors that are kept of a parameter: made, and checked against what they must be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.codecs import format as device
from ..memory import parameter
from ..memory.dtensor import is_dtensor, local_of, sharded_like
from ..memory.storage import local_tensors
from ..memory.walk import Rows, rows_of, scale_shape
from .group import SCALE, GroupFormat


def local_scale_shape(p: Any) -> tuple[int, ...]:
    """Return the shape of what of a scale lies in this process."""
    rows = rows_of(p)
    # Of a row that is cut, one part is here.
    own = Rows(rows.dim, None if rows.parts is None else 1)
    return scale_shape((local_of(p) if is_dtensor(p) else p).shape, own)


def whole_scale_shape(p: Any) -> tuple[int, ...]:
    """Return the shape of a scale."""
    return scale_shape(p.shape, rows_of(p))


def is_scale(format: GroupFormat, name: str) -> bool:
    """Whether a key is that of a scale."""
    return name.endswith(SCALE) and name[: -len(SCALE)] in format.codecs


def make_tensor(p: Any, local: Tensor, name: str, format: GroupFormat) -> tuple[Tensor, Tensor]:
    """Make a tensor for the state of a parameter, of no values yet.

    Args:
        p: the parameter.
        local: what of it lies in this process.
        name: the key.
        format: of its group.

    Returns:
        The tensor, and what of it lies in this process.
    """
    cut = is_dtensor(p)
    if is_scale(format, name):
        made = torch.empty(local_scale_shape(p), dtype=torch.float32, device=local.device)
        return (sharded_like(p, made, whole_scale_shape(p)) if cut else made), made
    dtype = format.dtype(name, p.dtype)
    if name in format.codecs:
        # Groups are of the elements in row-major order, whatever the parameter's is.
        made = torch.empty(local.shape, dtype=dtype, device=local.device)
    else:
        # Of a wrapper that is no DTensor, a wrapper.
        made = torch.empty_like(local if cut else p, dtype=dtype)
    return (sharded_like(p, made) if cut else made), made


def starts_as_copy(name: str, format: GroupFormat) -> bool:
    """Whether a tensor begins as the parameter's values, and not at zero."""
    if format.average is not None and name == format.average.name:
        return True
    return format.parameter == device.FLOAT32 and name == format.companion


def begin_as_copy(
    new: Tensor, local: Tensor, name: str, format: GroupFormat, state: Mapping[str, Any]
) -> None:
    """Write the parameter's values into a tensor that begins with them.

    Args:
        new: what of the tensor lies in this process.
        local: what of the parameter does.
        name: the key.
        format: of the group.
        state: what is kept of the parameter and has values, a master perhaps.
    """
    beside = None if format.companion is None else state.get(format.companion)
    if name == format.companion or not isinstance(beside, Tensor):
        new.copy_(local)
    else:
        (companion,) = local_tensors([beside])
        new.copy_(parameter.load(local, companion, format.parameter))


def begun(p: Any, name: str, format: GroupFormat, state: Mapping[str, Any]) -> Tensor:
    """Make a tensor for the state of a parameter, with what it begins as; arguments as above."""
    (local,) = local_tensors([p])
    tensor, new = make_tensor(p, local, name, format)
    if starts_as_copy(name, format):
        begin_as_copy(new, local, name, format, state)
    else:
        new.zero_()
    return tensor


def problem(p: Any, name: str, state: Tensor, format: GroupFormat) -> str | None:
    """Say what is wrong with shape or type of a tensor that is kept; None where nothing is.

    Args:
        p: the parameter.
        name: the key.
        state: the tensor.
        format: of the group.
    """
    wanted: Sequence[int] = whole_scale_shape(p) if is_scale(format, name) else p.shape
    if tuple(state.shape) != tuple(wanted):
        return f"has shape {tuple(state.shape)} where {tuple(wanted)} is wanted"
    if not format.is_free(name) and state.dtype != format.dtype(name, p.dtype):
        return f"has type {state.dtype} where {format.dtype(name, p.dtype)} is wanted"
    if (
        is_scale(format, name)
        and not (local_of(state) if is_dtensor(state) else state).is_contiguous()
    ):
        return "is not contiguous"
    return None
