"""Checks made before a step changes anything, with messages that say what to do."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import backends
from ..coefficients import lives_on_device, numbers_of
from ..formats import GroupFormat, format_of, keeps_steps
from ..formats.tensors import problem as shape_problem
from ..kernels.rule import Rule
from ..memory.dtensor import placed_alike
from ..memory.dtypes import STORABLE, real_dtype
from ..memory.layout import are_apart, byte_range, is_plain, overlaps_itself, share_memory
from ..memory.storage import chained, local_tensors, refusal
from ..source import MissingInput, Source
from ..statistics.base import Statistics
from .ordinary import find_doubtful

_DEVICE = operator.attrgetter("device")
_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def describe(optimizer: Optimizer, param: Tensor) -> str:
    """Name a parameter: its name where the optimizer knows it, its place, and its shape."""
    # A part of an optimizer has other places.
    for place in _places(getattr(optimizer, "whole", optimizer), param):
        return f"parameter {place} of shape {tuple(param.shape)}"
    return f"parameter of shape {tuple(param.shape)}"


def _places(optimizer: Optimizer, param: Tensor) -> Iterator[str]:
    for index, group in enumerate(optimizer.param_groups):
        for position, candidate in enumerate(group["params"]):
            if candidate is param:
                names = group.get("param_names")
                # Who appends a parameter to a group need not append a name.
                name = f"{names[position]!r} = " if names and position < len(names) else ""
                yield f"{name}param_groups[{index}]['params'][{position}]"


def is_on_device(rule: Rule, group: dict[str, Any], decided_there: bool) -> bool:
    """Whether step counts and hyper-parameters of a group are kept on the device.

    Args:
        rule: the update.
        group: the parameter group.
        decided_there: whether it is there alone that is known of a step that it is skipped.
    """
    here = lives_on_device(group, numbers_of(rule, group))
    return bool(group.get("capturable")) or decided_there or here


def check_one_group(
    optimizer: Optimizer, params: Sequence[Tensor], group_of: Sequence[int]
) -> None:
    """Raise ValueError for a parameter that is in two groups, as ``add_param_group`` does."""
    group: dict[int, int] = {}
    for p, index in zip(params, group_of, strict=True):
        if group.setdefault(id(p), index) != index:
            places = " and ".join(_places(optimizer, p))
            raise ValueError(
                f"one parameter of shape {tuple(p.shape)} is in two groups, {places}: a step"
                " updates it once, by the options of one group. Take it out of the other"
            )


def check_statistics(name: str, rule: Rule, statistics: Any, virtual_batch_size: Any) -> None:
    """Raise where a rule and its source of squares do not fit.

    Raises:
        TypeError: no statistics for a rule that takes squares, statistics for one that does not,
            or something else in their place.
    """
    wanted = len(rule.degrees) > 1
    if wanted and not isinstance(statistics, Statistics):
        raise TypeError(
            f"{name} needs per-sample squares: pass statistics=fusedopt.PerSampleSquares(model),"
            " MicroBatchSquares(), GradSampleSquares() or BackpackSquares(), got"
            f" {statistics!r}"
        )
    if not wanted and (statistics is not None or virtual_batch_size is not None):
        raise TypeError(
            f"{name} does not use per-sample squares: statistics= and virtual_batch_size= belong"
            " to BatchDecoupledAdam and BatchDecoupledRMSprop"
        )
    check_virtual_batch_size(virtual_batch_size)


def check_source(name: str, rule: Rule, source: Any) -> None:
    """Raise TypeError for something that cannot feed a rule."""
    if source is None:
        return
    if not isinstance(source, Source):
        raise TypeError(
            f"statistics of {name} must be fusedopt.PerSampleSquares(model), MicroBatchSquares(),"
            f" GradSampleSquares(), BackpackSquares() or None, got {source!r}"
        )
    if len(rule.degrees) == 1:
        raise TypeError(f"{name} does not use per-sample squares: its statistics are None")


def check_virtual_batch_size(value: Any) -> None:
    """Raise ValueError for anything but a number of at least 1, or None."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (number and value >= 1):
        raise ValueError(f"virtual_batch_size must be a number of at least 1, got {value!r}")


def check_samples(optimizer: Any, params: Sequence[Tensor]) -> None:
    """Raise RuntimeError where the samples of a step cannot be used, naming the parameter."""
    check_privacy(optimizer, params)
    check_every(optimizer)
    try:
        optimizer.statistics.check(params)
    except MissingInput as error:
        raise RuntimeError(f"{describe(optimizer, error.parameter)}: {error}") from None


def check_every(optimizer: Any) -> None:
    """Raise ValueError where squares of some steps alone do not go with an optimizer's options."""
    every = optimizer.statistics.every
    if every == 1:
        return
    what = f"PerSampleSquares(every={every})"
    for index, group in enumerate(optimizer.param_groups):
        if is_on_device(optimizer.rule, group, optimizer.scaler_on_device):
            raise ValueError(
                f"{what}: param_groups[{index}] keeps step counts or hyper-parameters on the device"
                " (capturable=True, or a tensor there), and the host chooses by the count at which"
                " steps squares are made. Use every=1"
            )
        if group.get("centered"):
            raise ValueError(
                f"{what}: param_groups[{index}] has centered=True, which subtracts the square of a"
                " mean that is newer than the squares, so that nothing might be left. Use every=1"
            )


def follow_unscaling(optimizer: Any, params: Sequence[Tensor]) -> None:
    """Make inputs besides the gradients follow ``GradScaler.unscale_``, or raise RuntimeError."""
    source = optimizer.statistics
    if source.follow(params):
        return
    # Where something else is wrong besides, that is the cause.
    check_samples(optimizer, params)
    raise RuntimeError(
        "scaler.unscale_(optimizer) has divided p.grad by the loss scale, but not the"
        f" {source.names[-1]} that this step reads besides: leave it out,"
        f" step() divides both{source.instead_of_unscaling}"
    )


def check_privacy(optimizer: Any, params: Sequence[Tensor]) -> None:
    """Raise RuntimeError where squares of samples would get around differential privacy.

    What Opacus' privacy engine releases is the clipped and noised ``p.grad`` alone. Squares of
    samples, or gradients that were put aside before, are neither clipped nor covered by the noise,
    wherever they come from.
    """
    if "opacus" not in sys.modules:
        return
    for p in params:
        # Its optimizers leave these on every parameter that they are to make private.
        if "summed_grad" in p.__dict__ or "_norm_sample" in p.__dict__:
            raise RuntimeError(
                f"{describe(optimizer, p)} is trained under Opacus' privacy engine, and"
                f" {type(optimizer).__name__} reads besides p.grad"
                f" {type(optimizer.statistics).__name__}, which privacy does not cover: it would be"
                " lost in silence. Give the engine fusedopt.AdamW, Adam, RMSprop or SGD, which read"
                " the noised p.grad alone. If the engine is not used any more, delete the"
                " parameters' attributes summed_grad and _norm_sample"
            )


def check_gradients(
    optimizer: Any,
    params: Sequence[Tensor],
    local_params: Sequence[Tensor],
    inputs: Sequence[Sequence[Tensor]],
    local_inputs: Sequence[Sequence[Tensor]],
    per_sample: bool,
) -> None:
    """Raise for a parameter, gradient or other input that cannot be used.

    Args:
        optimizer: that is to step.
        params: as of ``Request``, as what follows.
        local_params: what of them lies in this process.
        inputs: as they were found.
        local_inputs: what of them lies in this process.
        per_sample: whether they are gradients of samples.

    Raises:
        RuntimeError: sparse gradients, gradients on another device or of another shape, an
            expanded parameter, a backend that cannot run.
        TypeError: element types that are not floating point.
    """
    names = _input_names(optimizer, inputs, per_sample)
    for name, tensors, local in zip(names, inputs, local_inputs, strict=True):
        doubtful: Iterable[int] = range(len(params))
        if not per_sample:
            doubtful = find_doubtful(params, tensors, local_params, local)
        for i in doubtful:
            p, tensor = params[i], tensors[i]
            # Of samples, one stands for all: they share strides.
            problem = _problem(p, tensor[0] if per_sample else tensor, name)
            if problem is not None:
                error, text = problem
                raise error(f"{describe(optimizer, p)}: {text}")
            sharding = _sharding_problem(p, tensor)
            if sharding is not None:
                raise RuntimeError(f"{describe(optimizer, p)}: {sharding}")
    for device in dict.fromkeys(map(_DEVICE, params)):
        backends.choose(device, optimizer.backend)


def _input_names(optimizer: Any, inputs: Sequence[Any], per_sample: bool) -> Sequence[str]:
    if optimizer.statistics is None:
        return ("gradient",)
    if per_sample:
        return ["per-sample gradient"] * len(inputs)
    names: Sequence[str] = optimizer.statistics.names
    return names


def _problem(p: Tensor, gradient: Tensor, what: str) -> tuple[type[Exception], str] | None:
    if gradient.is_sparse or gradient.layout in _COMPRESSED:
        return RuntimeError, (
            f"its {what} is sparse ({gradient.layout}). Use a dense one (for an embedding"
            " sparse=False), or gradient.to_dense(), or torch.optim.SparseAdam for it"
        )
    for name, tensor in (("it", p), (f"its {what}", gradient)):
        if tensor.layout != torch.strided:
            return RuntimeError, f"the layout of {name} is {tensor.layout}; only dense ones work"
    if gradient.device != p.device:
        return RuntimeError, (
            f"it is on {p.device}, its {what} on {gradient.device}. Move one to the other"
        )
    if p.device.type == "meta":
        return RuntimeError, "it is on the meta device and has no values to update"
    for name, tensor in (("it", p), (f"its {what}", gradient)):
        without = refusal(tensor)
        if without is not None:
            return RuntimeError, f"{name} {without}"
    if gradient.shape != p.shape:
        return RuntimeError, (
            f"its {what} has shape {tuple(gradient.shape)}; set p.grad = None and run"
            " backward again after changing a parameter's shape"
        )
    for name, tensor in (("its", p), (f"its {what}'s", gradient)):
        if real_dtype(tensor.dtype) not in STORABLE:
            return TypeError, f"{name} type is {tensor.dtype}; it must be floating point"
    if p.is_complex() != gradient.is_complex():
        return TypeError, f"parameter and {what} must both be complex or both be real"
    if not is_plain(p):
        return RuntimeError, "it is lazily conjugated or negated; optimize its clone() instead"
    if overlaps_itself(p):
        return RuntimeError, (
            "several of its elements share one memory location (it is an expanded view), so"
            " it cannot be updated in place; optimize a clone() or the tensor it is a view of"
        )
    return None


def check_states(optimizer: Any, params: Sequence[Tensor], group_of: Sequence[int]) -> None:
    """Raise for a state that does not fit its parameter.

    Raises:
        RuntimeError: a state on another device, of another shape or of a type that is no
            floating point, or without memory.
        TypeError: a state that is no tensor.
    """
    if not optimizer.state:
        return
    formats = [format_of(optimizer.rule, group) for group in optimizer.param_groups]
    counts = [keeps_steps(optimizer.rule, group) for group in optimizer.param_groups]
    for p, index in zip(params, group_of, strict=True):
        state = optimizer.state.get(p, {})
        if not isinstance(state, Mapping):
            raise TypeError(f"{describe(optimizer, p)}: its state is no dictionary, but {state!r}")
        for name in formats[index].names:
            value = state.get(name)
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(
                    f"{describe(optimizer, p)}: its state {name!r} is no tensor, but {value!r}"
                )
            problem = None if value is None else _state_problem(p, name, value, formats[index])
            if problem is not None:
                raise RuntimeError(f"{describe(optimizer, p)}: {problem}")
        step = state.get("step") if counts[index] else None
        without = refusal(step) if isinstance(step, Tensor) else None
        if without is not None:
            raise RuntimeError(f"{describe(optimizer, p)}: its state 'step' {without}")


def check_memory(
    optimizer: Any,
    params: Sequence[Tensor],
    local_params: Sequence[Tensor],
    inputs: Sequence[Sequence[Tensor]],
    local_inputs: Sequence[Sequence[Tensor]],
    group_of: Sequence[int],
    per_sample: bool,
) -> bool:
    """Raise RuntimeError for a state that lies over something else that the step reads or writes.

    What comes of that would depend on the order in which a kernel takes elements. Parameters may
    lie over each other: they are updated one after the other.

    Returns:
        Whether nothing lies over anything else.
    """
    if not optimizer.state and are_apart([*local_params, *chained(local_inputs)]):
        return True
    named: list[tuple[Tensor, str | None, Tensor]] = [(p, None, p) for p in params]
    for name, tensors in zip(_input_names(optimizer, inputs, per_sample), inputs, strict=True):
        named += [(p, name, x) for p, x in zip(params, tensors, strict=True)]
    groups = optimizer.param_groups
    names_of = [format_of(optimizer.rule, group).names for group in groups]
    if any(keeps_steps(optimizer.rule, group) for group in groups):
        # On the host, counts are given memory of their own.
        decided = optimizer.decided_on_device
        live = [is_on_device(optimizer.rule, group, decided) for group in groups]
        names_of = [(*n, "step") if on else n for n, on in zip(names_of, live, strict=True)]
    for p, index in zip(params, group_of, strict=True):
        state = optimizer.state.get(p)
        if state:
            found = [(n, state[n]) for n in names_of[index] if isinstance(state.get(n), Tensor)]
            named += [(p, f"state {n!r}", x) for n, x in found]
    local = local_tensors([x for _, _, x in named])
    if are_apart(local):
        return True
    owned = [_Owned(p, kind, x) for (p, kind, _), x in zip(named, local, strict=True)]
    clash = _first_clash(owned)
    if clash is None:
        return False
    state, other = clash if clash[0].is_state else reversed(clash)
    what = other.kind or "values"
    same = other.param is state.param
    what = f"its {what}" if same else f"the {what} of {describe(optimizer, other.param)}"
    raise RuntimeError(
        f"{describe(optimizer, state.param)}: its {state.kind} shares memory with {what}; replace"
        " the state by its clone()"
    )


class _Owned(NamedTuple):
    """A tensor of a step: a parameter, or what kind of tensor of a parameter."""

    param: Tensor
    kind: str | None
    tensor: Tensor

    @property
    def is_state(self) -> bool:
        return self.kind is not None and self.kind.startswith("state")


def _first_clash(owned: Sequence[_Owned]) -> tuple[_Owned, _Owned] | None:
    """Return a state and what it shares memory with, in the order of addresses."""
    spans: dict[torch.device, list[tuple[int, int, int]]] = {}
    for i, x in enumerate(owned):
        start, stop = byte_range(x.tensor)
        if stop > start:
            spans.setdefault(x.tensor.device, []).append((start, stop, i))
    for device_spans in spans.values():
        open_spans: list[tuple[int, _Owned]] = []
        for start, stop, i in sorted(device_spans):
            open_spans = [span for span in open_spans if span[0] > start]
            for _, other in open_spans:
                if _clash(owned[i], other):
                    return owned[i], other
            open_spans.append((stop, owned[i]))
    return None


def _clash(a: _Owned, b: _Owned) -> bool:
    # Counts that parameters share are separated.
    counts = a.kind == b.kind == "state 'step'"
    return (a.is_state or b.is_state) and not counts and share_memory(a.tensor, b.tensor)


def _state_problem(p: Tensor, name: str, state: Tensor, format: GroupFormat) -> str | None:
    without = "is not dense" if state.layout != torch.strided else refusal(state)
    if without is not None:
        return f"its state {name!r} {without}"
    found = shape_problem(p, name, state, format)
    if found is not None or state.device != p.device:
        found = found or f"is on {state.device}, the parameter on {p.device}"
        return (
            f"its state {name!r} {found}. Load the optimizer's state after the model's parameters"
            " have their final shape and device"
        )
    problem = placement_problem(p, name, state)
    if problem is not None:
        return problem
    if overlaps_itself(state) or not is_plain(state):
        return f"several elements of its state {name!r} share memory; replace it by its clone()"
    if not format.is_free(name):
        return None
    if real_dtype(state.dtype) not in STORABLE or state.is_complex() != p.is_complex():
        return f"its state {name!r} has type {state.dtype}, the parameter {p.dtype}"
    return None


def placement_problem(p: Tensor, name: str, state: Tensor) -> str | None:
    """Say how a state is cut over processes otherwise than its parameter; None where it is not.

    Its shape, that of the whole, does not show it.
    """
    own, found = (
        (getattr(x, "placements", None), getattr(x, "device_mesh", None)) for x in (p, state)
    )
    if own == found:
        return None
    words = [
        "no DTensor" if x[0] is None else f"a DTensor placed as {x[0]} on {x[1]}"
        for x in (own, found)
    ]
    return (
        f"its state {name!r} is {words[1]}, the parameter is {words[0]}. Load states of another"
        " layout by torch.distributed.checkpoint, or whole ones by set_optimizer_state_dict with"
        " StateDictOptions(full_state_dict=True)"
    )


def _sharding_problem(p: Tensor, gradient: Tensor) -> str | None:
    placements = getattr(p, "placements", None)
    found = getattr(gradient, "placements", None)
    if placements is None and found is None:
        return None
    if placements is None:
        return f"its gradient is a DTensor placed as {found}, and it is none"
    if found is not None and placed_alike(p, gradient):
        return None
    return (
        f"it is a DTensor placed as {placements}, its gradient is"
        f" {'no DTensor' if found is None else f'placed as {found} on another mesh'};"
        " redistribute the gradient first"
    )
