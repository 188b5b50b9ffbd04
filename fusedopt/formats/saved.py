"""How what is kept stands in a ``state_dict()``, so that anybody can move it, and its name.

Between memory and file, tensors go through collectives and from one layout to another:

* Neither gloo nor NCCL moves 16-bit integers, and gloo no 8-bit floats. A master of 16 bits is
  shown as the bfloat16 of the same patterns, an 8-bit float as the 8-bit integer that the power
  code of the same state is not.
* Groups that run along the first dimension are other ones where that is cut over processes. Of such
  parameters (rows of less than a group, vectors) the scale of each element is shown.

All else is shown as it is, in the memory that it has.

Distributed checkpoint reads a file's tensor into one of any type, number by number, and asks the
file for every key of the optimizer that is to load it. So the name of a format is such a key.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.rule import Rule
from ..memory import codes
from ..memory.dtensor import is_dtensor, local_of, sharded_like
from ..memory.walk import rows_of, runs_along_first, walk_of
from .group import CODED, COMPANIONS, SCALE, GroupFormat, codec_of
from .tensors import local_scale_shape, whole_scale_shape

PLAIN = "plain"
_CODES = ("int8", "fp8")
# By what a name says of a master, its types: in a file, and in memory.
_MASTERS = {
    "int16": (torch.bfloat16, torch.int16),
    "int8": (torch.int8,),
    "float32": (torch.float32,),
}


def name_of(format: GroupFormat, params: Sequence[Any]) -> str:
    """Name what must be equal for the numbers in two files to mean the same.

    Args:
        format: of a group.
        params: its parameters, whose rows may be cut in the middle of a group.
    """
    found = []
    for state in format.states:
        if state.is_coded:
            kind = "fp8" if state.dtype == torch.float8_e4m3fn else "int8"
            found.append(f"{state.name}={kind}")
    if found:
        cut = [(i, rows) for i, rows in enumerate(map(_cut_rows, params)) if rows is not None]
        # Scales are in other places then, whose shape a copy may stretch to its own.
        found += [f"rows={zlib.crc32(repr(cut).encode()):08x}"] if cut else []
    if format.companion is not None:
        kind = str(format.companion_dtype or "parameter").removeprefix("torch.")
        found.append(f"{format.companion}={kind}")
    return ",".join(found) or PLAIN


def companion_kinds(name: str) -> dict[str, str]:
    """Return what a name says is kept beside each parameter, and how."""
    return {key: kind for key, kind in _parts(name) if key in COMPANIONS}


def has_codes(name: str) -> bool:
    """Return whether a name says that states are in 8 bits."""
    return any(key not in COMPANIONS and kind in _CODES for key, kind in _parts(name))


def _parts(name: str) -> list[tuple[str, str]]:
    parts = (part.partition("=") for part in name.split(","))
    return [(key, kind) for key, _, kind in parts]


def kind_problem(key: str, kind: str, value: Tensor) -> str | None:
    """Say how what is kept beside a parameter is not what a name says; None where it is.

    Args:
        key: of the state dictionary.
        kind: what the name says.
        value: the tensor.
    """
    if key != "master" or value.dtype in _MASTERS.get(kind, ()):
        return None
    return f"has type {value.dtype}, and the format that it was saved in is {key}={kind}"


def _cut_rows(p: Any) -> tuple[int, int | None] | None:
    if not is_dtensor(p) or runs_along_first(p.shape):
        return None
    rows, whole = rows_of(p), rows_of(torch.empty(p.shape, device="meta"))
    return None if rows == whole else (rows.dim, rows.parts)


def shown(p: Any, state: Mapping[str, Any], rule: Rule) -> dict[str, Any]:
    """Return a state as it is to be saved.

    Args:
        p: the parameter.
        state: its state dictionary, which stays what it is.
        rule: whose states these are.
    """
    found = dict(state)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue
        if value.dtype == torch.float8_e4m3fn:
            found[name] = viewed(value, _shown_float8(name, rule))
        elif name == "master" and value.dtype == torch.int16:
            found[name] = viewed(value, torch.bfloat16)
        elif _is_scale(name, state) and runs_along_first(p.shape):
            found[name] = _of_each(p, value)
    return found


def restored(p: Any, state: MutableMapping[str, Any], rule: Rule, format: GroupFormat) -> None:
    """Undo ``shown``, in place; what is as it is kept stays so.

    Of groups that now lie otherwise, those whose elements do not have one scale are rounded to
    nearest again.

    Args:
        p: the parameter.
        state: its state dictionary.
        rule: whose states these are.
        format: that they were saved in.
    """
    floats = {own.name for own in format.states if own.dtype == torch.float8_e4m3fn}
    for name, value in list(state.items()):
        if not isinstance(value, Tensor):
            continue
        if name in floats and value.dtype == _shown_float8(name, rule):
            state[name] = viewed(value, torch.float8_e4m3fn)
        elif name == "master" and value.dtype == torch.bfloat16:
            state[name] = viewed(value, torch.int16)
    for name in [n for n in state if _is_scale(n, state)]:
        if _is_of_each(p, state[name]):
            _regroup(p, state, name[: -len(SCALE)], rule)


def _is_scale(name: str, state: Mapping[str, Any]) -> bool:
    codes = state.get(name[: -len(SCALE)]) if name.endswith(SCALE) else None
    return isinstance(codes, Tensor) and isinstance(state[name], Tensor) and codes.dtype in CODED


def _shown_float8(name: str, rule: Rule) -> torch.dtype:
    return torch.int8 if name in rule.nonnegative else torch.uint8


def viewed(tensor: Any, dtype: torch.dtype) -> Tensor:
    """Take patterns for another type of the same width."""
    if is_dtensor(tensor):
        return sharded_like(tensor, local_of(tensor).view(dtype))
    return tensor.view(dtype)


def _of_each(p: Any, scale: Any) -> Tensor:
    """Return for each element its scale, in the shape of the parameter."""
    local = local_of(p) if is_dtensor(p) else p
    groups = (local_of(scale) if is_dtensor(scale) else scale).reshape(-1, 1)
    inner = walk_of(p, coded=True).inner
    found = codes.ungrouped(groups.expand(-1, codes.GROUP), local, inner).contiguous()
    return sharded_like(p, found) if is_dtensor(p) else found


def _is_of_each(p: Any, scale: Tensor) -> bool:
    wanted = whole_scale_shape(p)
    return tuple(scale.shape) == tuple(p.shape) != tuple(wanted)


def _regroup(p: Any, state: MutableMapping[str, Any], name: str, rule: Rule) -> None:
    own, each = (local_of(x) if is_dtensor(x) else x for x in (state[name], state[name + SCALE]))
    codec, inner = codec_of(own.dtype, name in rule.nonnegative), walk_of(p, coded=True).inner
    if codec is None:  # refused where states are brought to their format
        return
    found, scale = codes.regroup(own.contiguous(), each.contiguous(), codec, inner)
    scale = scale.reshape(local_scale_shape(p))
    if is_dtensor(p):
        found, scale = sharded_like(p, found), sharded_like(p, scale, whole_scale_shape(p))
    state[name], state[name + SCALE] = found, scale
