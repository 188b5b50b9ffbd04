"""What a step is asked to do, gathered once: parameters, what the rule reads of them, the scale."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..backends import Executor
from ..clipping import GlobalNorm
from ..formats import keeps_state
from ..guard import SpikeGuard
from ..kernels.rule import Rule, held
from ..memory.dtensor import placed_as, specs_of
from ..memory.storage import local_tensors, unwrapped
from ..source import RuleInputs, Source
from .checks import check_one_group, check_samples, follow_unscaling, is_on_device
from .counts import State
from .scale import GradScale
from .span import Span


class Measures(Protocol):
    """What asks for the norms of gradient, parameter and update."""

    @property
    def is_due(self) -> bool:
        """Whether the step under way is to be measured."""

    def took(
        self, parts: Sequence[tuple[list[Tensor], Executor]], measured: bool, certain: bool
    ) -> None:
        """Note a step, with the parameters that each executor has."""


class Steps(Protocol):
    """What a step reads of the optimizer that takes it."""

    backend: str
    param_groups: list[dict[str, Any]]
    state: Any

    @property
    def whole(self) -> Any:
        """The optimizer that parameters are numbered in: itself, or what this is a part of."""

    def scale_for(self, device: torch.device) -> GradScale:
        """Return what launches on a device are to read besides coefficients."""

    @property
    def rule(self) -> Rule:
        """The update."""

    @property
    def step_norm(self) -> GlobalNorm | None:
        """How the norm of all gradients is taken; None where nobody asks for it."""

    @property
    def guard(self) -> SpikeGuard | None:
        """What leaves steps out by their norms."""

    @property
    def decided_on_device(self) -> bool:
        """Whether the device alone knows of a step that it is skipped."""

    @property
    def statistics(self) -> Source | None:
        """What feeds the rule besides gradients."""

    @property
    def telemetry(self) -> Measures | None:
        """What the norms of steps are for."""


@dataclass
class Request:
    """One step.

    Attributes:
        rule, backend, groups, state, scale_for: the optimizer's.
        whole_groups: the groups that parameters are numbered by, of which these may be a part.
        clips: whether the norm of all gradients is taken, and gradients clipped by it.
        params: those that take part, ordered by group, each once.
        group_of: for each parameter, the index of its group.
        inputs: for each input of the rule, the tensors of all parameters as they were found.
        local_inputs: the same, where a DTensor or a wrapper is replaced by what is in this
            process' memory.
        wrappings: what of wrappers decides how they are replaced.
        specs: of each input, how DTensors are placed.
        per_sample: whether inputs are gradients of samples.
        measured: see ``RuleInputs``.
        samples: how many there are.
        factor: what gradients are to be multiplied by.
        grad_scale, found_inf: what ``torch.amp.GradScaler`` left, or None.
        statistics: what feeds the rule besides gradients.
        decided_on_device: whether the device alone knows of a step that it is skipped.
        span: the processes whose gradients are clipped together; None for this one.
        guard: what leaves steps out by their norms, or None.
        telemetry: what norms are measured for, or None.
    """

    rule: Rule
    backend: str
    groups: Sequence[dict[str, Any]]
    state: Mapping[Tensor, State]
    clips: bool
    params: list[Tensor]
    group_of: list[int]
    inputs: list[list[Tensor]]
    local_inputs: list[list[Tensor]]
    wrappings: list[Any]
    specs: list[list[Any]]
    per_sample: bool
    measured: list[int] | None
    samples: int
    factor: float
    grad_scale: Tensor | None
    found_inf: Tensor | None
    statistics: Source | None
    decided_on_device: bool
    span: Span | None
    guard: SpikeGuard | None
    telemetry: Measures | None
    whole_groups: Sequence[dict[str, Any]]
    scale_for: Callable[[torch.device], GradScale]

    @cached_property
    def local_params(self) -> list[Tensor]:
        """What of the parameters lies in this process' memory."""
        return local_tensors(self.params)

    @cached_property
    def on_device(self) -> list[bool]:
        """For each group, whether step counts and hyper-parameters are on the device."""
        return [is_on_device(self.rule, group, self.decided_on_device) for group in self.groups]

    @cached_property
    def coefficient_groups(self) -> Sequence[dict[str, Any]]:
        """The parameter groups, with what the samples of this step say to the rule."""
        return with_factors(self.groups, self.statistics, self.samples)


def with_factors(
    groups: Sequence[dict[str, Any]], statistics: Source | None, samples: int
) -> Sequence[dict[str, Any]]:
    """Return parameter groups, with what a number of samples says where a rule asks."""
    if statistics is None:
        return groups
    sizes = [group.get("virtual_batch_size", 1) for group in groups]
    factors = [statistics.factors(size, samples) for size in sizes]
    return [{**group, **own} for group, own in zip(groups, factors, strict=True)]


class Known(NamedTuple):
    """What one step found that the next one is likely to find.

    Attributes:
        params: as ``Request.params``.
        specs: as ``Request.specs``; inputs that are placed so are placed as their parameters.
    """

    params: list[Tensor]
    specs: list[list[Any]]


def _are_placed(params: list[Tensor], specs: list[list[Any]], known: Known | None) -> bool:
    """Whether inputs are placed as their parameters, as at the latest step."""
    if known is None or params is not known.params or len(specs) != len(known.specs):
        return False
    return all(map(identical, specs, known.specs))


def identical(now: Collection[Any], then: Collection[Any]) -> bool:
    """Whether both have the same objects, in the same order."""
    return now is then or (len(now) == len(then) and all(map(operator.is_, now, then)))


def gather(
    optimizer: Steps,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    known: Known | None = None,
    span: Span | None = None,
) -> Request | None:
    """Gather what a step is asked to do, and raise where it cannot be done.

    Args:
        optimizer: that is to step.
        grad_scale: the loss scale, or None.
        found_inf: whether the scaler has found an overflow, or None.
        known: of the latest step, or None before there was one.
        span: the processes whose gradients are clipped together; None for this one.

    Returns:
        None where there is nothing to do: no gradient, or an overflow.
    """
    params, gradients, group_of = gather_params(optimizer, None if known is None else known.params)
    statistics = optimizer.statistics
    if not params:
        if statistics is not None:
            check_samples(optimizer, params)
        return None
    found, samples, factor = RuleInputs([gradients]), 1, 1.0
    if statistics is not None:
        if found_inf is not None and grad_scale is None:
            # unscale_ was called. No factor is found of what is not finite.
            if bool(found_inf):
                statistics.used(params)
                return None
            follow_unscaling(optimizer, params)
        check_samples(optimizer, params)
        samples = statistics.count(params)
        factor = statistics.gradient_factor(samples)
        # Clipping and overflow are decided before the update, from what it is to read.
        plain = optimizer.step_norm is None and found_inf is None
        found = statistics.inputs(params, gradients, plain)
    elif len(optimizer.rule.degrees) > 1:
        raise RuntimeError(
            "this optimizer has no statistics (copies and pickles come without): set"
            " optimizer.statistics to where the squares come from"
        )
    tensors = found.tensors
    local, wrappings = unwrapped(tensors)
    # Where nothing stands for something else, nothing is placed.
    specs = [] if local is tensors else list(map(specs_of, tensors))
    if any(specs) and not (found.per_sample or _are_placed(params, specs, known)):
        tensors = [placed_as(params, x) for x in tensors]
        specs = list(map(specs_of, tensors))
        local, wrappings = unwrapped(tensors)
    if found_inf is not None:
        if statistics is not None:
            found_inf = _or_not_finite(found_inf, local[1])
        if _overflowed(optimizer, params, group_of, found_inf):
            if statistics is not None:
                statistics.used(params)
            return None
    rule = optimizer.rule if found.measured is None else held(optimizer.rule)
    return Request(
        rule, optimizer.backend, optimizer.param_groups, optimizer.state,
        optimizer.step_norm is not None, params, group_of, tensors, local, wrappings, specs,
        found.per_sample, found.measured, samples, factor, grad_scale, found_inf, statistics,
        optimizer.decided_on_device, span, optimizer.guard, optimizer.telemetry,
        optimizer.whole.param_groups, optimizer.scale_for,
    )  # fmt: skip


def gather_params(
    optimizer: Steps, known: list[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """List the parameters that have a gradient, each once, with gradient and group index.

    Where they are those of ``known``, each once as well, that is what is returned.
    """
    find: Callable[[Tensor], Tensor | None] | None = None
    if optimizer.statistics is not None:
        find = optimizer.statistics.find
    params: list[Tensor] = []
    gradients: list[Tensor] = []
    group_of: list[int] = []
    for index, group in enumerate(optimizer.param_groups):
        members = group["params"]
        if type(members) is not list:
            members = group["params"] = _listed(members)
        found: list[Any]
        found = [p.grad for p in members] if find is None else [find(p) for p in members]
        absent = [gradient is None for gradient in found]
        if True in absent:
            used = [i for i, missing in enumerate(absent) if not missing]
            params += [members[i] for i in used]
            gradients += [found[i] for i in used]
        else:
            params += members
            gradients += found
        group_of += [index] * (len(params) - len(group_of))
    if known is not None and identical(params, known):
        return known, gradients, group_of
    if len(set(map(id, params))) != len(params):
        check_one_group(optimizer, params, group_of)  # type: ignore[arg-type]
        first = {id(p): i for i, p in reversed(list(enumerate(params)))}
        keep = sorted(first.values())
        params = [params[i] for i in keep]
        gradients = [gradients[i] for i in keep]
        group_of = [group_of[i] for i in keep]
    return params, gradients, group_of


def _listed(members: Any) -> Any:
    """Return what a group has for its parameters as it can be read again."""
    if isinstance(members, Tensor):
        return [members]
    return members if hasattr(members, "__getitem__") else list(members)


def _or_not_finite(found_inf: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Set the overflow flag where another input has overflowed, though no gradient has."""
    # The largest element of none is an error.
    local = [x for x in others if x.numel()]
    largest = torch.nn.utils.get_total_norm(local, float("inf"))
    return torch.maximum(found_inf, (~largest.isfinite()).to(found_inf))


def _overflowed(
    optimizer: Steps, params: Sequence[Tensor], group_of: Sequence[int], found_inf: Tensor
) -> bool:
    """Whether to skip the step on the host: the flag is there, or state is yet to be made."""
    # A skipped step leaves no trace, so no state may be created by it. Reading the flag then
    # waits for the device, at the first steps only.
    rule = optimizer.rule
    keeps = [keeps_state(rule, group) for group in optimizer.param_groups]
    creates_state = any(
        keeps[index] and p not in optimizer.state for p, index in zip(params, group_of, strict=True)
    )
    source = optimizer.statistics
    # Which steps have squares goes by counts on the host.
    counts = source is not None and source.every > 1
    if found_inf.device.type == "cpu" or creates_state or counts:
        return bool(found_inf.item())
    return False
