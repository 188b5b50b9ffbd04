"""States from one way of keeping them to another, and back to what torch keeps."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from ..kernels.codecs import format as device
from ..kernels.rule import Rule
from ..memory import codes, parameter
from ..memory.dtensor import is_dtensor, local_of, sharded_like
from ..memory.dtypes import positive
from ..memory.walk import walk_of
from .group import CODED, COMPANIONS, SCALE, GroupFormat, StateFormat, codec_of
from .saved import restored
from .tensors import local_scale_shape, whole_scale_shape

State = MutableMapping[str, Any]
# By the type of a master, how it is kept.
_MASTERS = {
    torch.int16: device.REMAINDER,
    torch.int8: device.REMAINDER,
    torch.float32: device.FLOAT32,
}


class MissingScale(ValueError):
    """Codes without the scales that they are read by."""


def is_compressed(state: Mapping[str, Any]) -> bool:
    """Whether a state holds what torch's optimizers do not."""
    return any(
        name.endswith(SCALE) or name in COMPANIONS or getattr(value, "dtype", None) in CODED
        for name, value in state.items()
    )


def fit(p: Any, state: State, format: GroupFormat, rule: Rule) -> None:
    """Bring the tensors of a state, in place, to how they are to be kept.

    They may be as a ``state_dict()`` shows them. What is missing stays so. Values are kept as well
    as the format can, rounded to nearest.

    Args:
        p: the parameter.
        state: its state dictionary.
        format: of its group.
        rule: whose states these are.

    Raises:
        MissingScale: for codes without scales.
        ValueError: for a parameter whose states cannot be in groups.
    """
    restored(p, state, rule, format)
    for own in format.kept:
        value = state.get(own.name)
        if isinstance(value, Tensor) and not _is_kept(value, state, own, p, format):
            plain = decoded(p, state, own.name, rule)
            state.pop(own.name + SCALE, None)
            state.update(_encoded(p, plain, own, format.dtype(own.name, p.dtype)))
    _fit_companion(p, state, format)


def _is_kept(value: Tensor, state: State, own: StateFormat, p: Any, format: GroupFormat) -> bool:
    if value.dtype in CODED or own.is_coded:
        return value.dtype == own.dtype and isinstance(state.get(own.name + SCALE), Tensor)
    return own.dtype is None or value.dtype == format.dtype(own.name, p.dtype)


def decoded(p: Any, state: Mapping[str, Any], name: str, rule: Rule) -> Tensor:
    """Return a state as numbers: float32 of codes, or the tensor itself.

    Args:
        p: the parameter.
        state: its state dictionary.
        name: of the state.
        rule: that keeps it.

    Raises:
        MissingScale: for codes without scales.
        ValueError: for scales of another shape, and for codes of another kind of states.
    """
    value: Tensor = state[name]
    codec = codec_of(value.dtype, name in rule.nonnegative)
    if codec is None:
        if value.is_floating_point() or value.is_complex():
            return value
        raise ValueError(f"its state {name!r} is of {value.dtype}, in which it is never kept")
    scale = state.get(name + SCALE)
    if not isinstance(scale, Tensor):
        raise MissingScale(f"its state {name!r} is in 8 bits, and there is no {name + SCALE!r}")
    inner = walk_of(p, coded=True).inner
    local, scales = (local_of(x) if is_dtensor(x) else x for x in (value, scale))
    if tuple(scales.shape) != local_scale_shape(p):
        raise ValueError(
            f"its state {name + SCALE!r} has shape {tuple(scale.shape)} where"
            f" {whole_scale_shape(p)} is wanted"
        )
    found = _compact(codes.decode(local.contiguous(), scales.contiguous(), codec, inner))
    return sharded_like(value, found) if is_dtensor(value) else found


def _compact(values: Tensor) -> Tensor:
    """Copy values out of groups, whose last of a row is longer in memory than what is in it."""
    return values.clone(memory_format=torch.contiguous_format)


def _encoded(p: Any, value: Tensor, own: StateFormat, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors that keep a state of some values."""
    if not own.is_coded:
        value = positive(value) if own.codec == device.POSITIVE_CAST else value
        return {own.name: value.to(dtype)}
    local = local_of(value) if is_dtensor(value) else value
    inner = walk_of(p, coded=True).inner
    found, scale = codes.encode(local.float().contiguous(), own.codec, inner)
    found = _compact(found)
    scale = scale.reshape(local_scale_shape(p))
    if is_dtensor(value):
        found, scale = sharded_like(p, found), sharded_like(p, scale, whole_scale_shape(p))
    return {own.name: found, own.name + SCALE: scale}


def companion_problem(p: Any, name: str, value: Tensor) -> str | None:
    """Say what is wrong with what is kept beside a parameter, in whichever form; None for nothing.

    Args:
        p: the parameter.
        name: the key.
        value: the tensor.
    """
    if tuple(value.shape) != tuple(p.shape):
        return f"has shape {tuple(value.shape)} where {tuple(p.shape)} is wanted"
    known = tuple(_MASTERS) if name == "master" else (torch.bfloat16, torch.float16)
    if value.dtype not in known:
        return f"has type {value.dtype} where one of {', '.join(map(str, known))} is wanted"
    return None


def _fit_companion(p: Any, state: State, format: GroupFormat) -> None:
    """Bring what is kept beside a parameter to another form; the parameter stays as it is."""
    for name in COMPANIONS:
        found = state.get(name)
        if not isinstance(found, Tensor):
            continue
        wanted = None if name != format.companion else format.dtype(name, p.dtype)
        if found.dtype == wanted:
            continue
        del state[name]
        if format.companion is None:
            continue
        own = local_of(p) if is_dtensor(p) else p.detach()
        local = local_of(found) if is_dtensor(found) else found
        codec = device.KAHAN if name == "compensation" else _MASTERS[found.dtype]
        value = parameter.load(own, local, codec)
        dtype = format.dtype(format.companion, p.dtype)
        made = parameter.beside(own, value, format.device.parameter, dtype)
        state[format.companion] = sharded_like(p, made) if is_dtensor(p) else made
