"""A plan: the prepared launches of a step, and how to tell that they still fit.

Users replace gradients, swap ``p.data``, edit states and groups, and load checkpoints between
steps. Nothing is trusted to have stayed: every step compares what it sees (identities, addresses,
strides, shapes, types, options) with what the plan was made for, and makes a new plan where they
differ. Only new addresses of gradients, the common case, are taken into the old one.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import Draw, Entries, Executor, Inputs
from ..clipping import GlobalNorm
from ..coefficients import numbers_of
from ..formats import GroupFormat, format_of
from ..kernels.weight_average import DECAY
from ..memory.device import is_capturing
from ..memory.dtensor import are_same_specs
from ..memory.layout import Fingerprint
from ..memory.storage import PLAIN, chained, local_tensors
from ..memory.storage import addresses as addresses_of
from ..memory.walk import walk_of
from .alone import Alone
from .counts import State
from .device_group import DeviceGroup
from .norm import clip_by_norm
from .request import Known, Measures, Request, identical

_DEVICE = operator.attrgetter("device")


class Plan:
    """The device groups of a step, made for one set of tensors.

    Args:
        request: the step.
        states: the parameters' state dictionaries.
        created: for each parameter, the names of the states created just now.
        apart: whether no two tensors of the step reach into each other's memory.

    Attributes:
        device_groups: what runs it.
        known: what the next step is likely to find.
        span: the processes whose gradients are clipped together.
        created: parameters and names of the states created for the first step, until that is
            through.
        captured: whether a CUDA graph holds on to this plan's memory.
        samples: how many the latest step was of.
    """

    def __init__(
        self,
        request: Request,
        states: list[State],
        created: Sequence[Sequence[str]],
        apart: bool,
    ) -> None:
        groups, params, group_of = request.groups, request.params, request.group_of
        self.known = Known(params, request.specs)
        self._group_of = group_of
        self.samples = request.samples
        self.span = request.span
        self.created = [(p, names) for p, names in zip(params, created, strict=True) if names]
        self._settings = _settings(request)
        self._values = _values(request)
        self._group = groups[group_of[0]]
        formats = [format_of(request.rule, group) for group in groups]
        self._names = [formats[index].names for index in group_of]
        # By a parameter's number among these it is rounded; of a part, whoever steps it looks.
        self._numbered: list[Tensor] | None = None
        if request.groups is request.whole_groups and any(f.device.draws for f in formats):
            self._numbered = _everything(request)
        self._states = states
        self._all_params = list(request.state)
        self._all_states = list(request.state.values())
        self._columns = _columns(self._names, self._states)
        self._tensors = self._state_tensors()
        local_params = request.local_params
        local_inputs = request.local_inputs
        local_states = local_tensors(self._tensors)
        self._param_print = Fingerprint(local_params)
        self._input_print = Fingerprint(chained(local_inputs))
        # States are the same objects at every step: only a swapped .data can have moved them.
        self._state_addresses = addresses_of(local_states)
        # Where empty tensors are is nowhere.
        self._state_places = set(self._state_addresses) - {0}
        self._wrappings = request.wrappings

        places: dict[tuple[torch.device, bool], list[int]] = {}
        on_device = [request.on_device[index] for index in group_of]
        for k, place in enumerate(zip(map(_DEVICE, local_params), on_device, strict=True)):
            places.setdefault(place, []).append(k)
        columns = self._split(local_states)
        options_of = [request.rule.options(group) for group in groups]
        self.captured = False
        # What captured graphs write besides: they may be taken from the optimizer.
        self._held: list[Any] = []
        weights = None if self.span is None else self.span.weights(params)
        self.device_groups: list[DeviceGroup] = []
        self._positions: list[list[int]] = list(places.values())
        for (device, live), chosen in places.items():
            self.device_groups.append(
                DeviceGroup(
                    request.rule,
                    backends.choose(device, request.backend)[0],
                    device,
                    live,
                    _entries(request, chosen, options_of, formats, columns),
                    apart,
                    [states[k] for k in chosen],
                    [group_of[k] for k in chosen],
                    request.coefficient_groups,
                    [bool(created[k]) for k in chosen],
                    request.scale_for(device),
                    None if weights is None else [weights[k] for k in chosen],
                    request.telemetry is not None,
                )
            )

    def _split(self, listed: Sequence[Tensor]) -> dict[str, list[Tensor | None]]:
        """Make of what ``_state_tensors`` lists a column for each state, of all parameters."""
        found: dict[str, list[Tensor | None]] = {}
        rest = iter(listed)
        for name, states in self._columns.items():
            if len(states) == len(self._names):
                found[name] = list(islice(rest, len(states)))
            else:
                found[name] = [next(rest) if name in own else None for own in self._names]
        return found

    def _state_tensors(self) -> list[Tensor]:
        """List the state tensors, name by name."""
        tensors: list[Tensor] = []
        for name, states in self._columns.items():
            tensors += map(operator.itemgetter(name), states)
        return tensors

    def fits(self, request: Request) -> bool:
        """Whether this plan can run a step; inputs that have moved are taken in."""
        params = request.params
        if not (
            identical(params, self.known.params)
            and request.group_of == self._group_of
            and request.span == self.span
            and self._is_set(request)
        ):
            return False
        if self._numbered is not None and not identical(_everything(request), self._numbered):
            return False
        # Not a look-up a parameter: hashing a tensor is a call into Python.
        if not identical(request.state, self._all_params) or not identical(
            request.state.values(), self._all_states
        ):
            return False
        try:
            tensors = self._state_tensors()
            unchanged = identical(tensors, self._tensors) and all(
                group.owns_steps() for group in self.device_groups
            )
        except KeyError:
            return False
        if not unchanged:
            return False
        return (
            self._param_print.match(request.local_params) == self._param_print.addresses
            and list(map(Tensor.data_ptr, local_tensors(tensors))) == self._state_addresses
            and self._take_inputs(request)
        )

    def _is_set(self, request: Request) -> bool:
        # As at the step before, object by object: nothing that follows from them can differ.
        if self._values is not None and identical(_found(request), self._values):
            return True
        try:
            same = _settings(request) == self._settings
        except KeyError:  # an option was taken away: the checks say which
            return False
        if same:
            self._values = _values(request)
        return same

    def _take_inputs(self, request: Request) -> bool:
        if request.wrappings != self._wrappings or not (
            len(request.specs) == len(self.known.specs)
            and all(map(are_same_specs, request.specs, self.known.specs))
        ):
            return False
        tensors = chained(request.local_inputs)
        moved = False
        try:
            addresses = self._input_print.match(tensors)
            if addresses is None:
                return False
            moved = addresses != self._input_print.addresses
            # A gradient that has become a state, say: the checks say which. They alone see a part.
            if moved and not self._state_places.isdisjoint(addresses):
                return False
        except RuntimeError:  # sparse tensors have no address; the checks say so better
            return False
        # A replay writes the addresses that were captured, behind the host's back: from then on
        # neither side may rely on what the other has left in the table.
        self.captured = self.captured or (self.is_capturing() and self.is_on_device())
        if moved or self.captured:
            for group, own in zip(self.device_groups, self._inputs(request), strict=True):
                group.executor.move_inputs(own)
            self._input_print.addresses = addresses
        return True

    def alone(self, gradient: Tensor | None) -> Alone | None:
        """Return a quicker way to take steps like the latest one; None where there is none.

        Args:
            gradient: of the latest step, of one parameter.
        """
        (parameter,), (group,) = self.known.params, self.device_groups
        plain = type(parameter) in PLAIN and type(gradient) in PLAIN and self.span is None
        if self._values is None or self.captured or group.on_device or not plain:
            return None
        assert gradient is not None
        return Alone(
            group, parameter, gradient, self._group, numbers_of(group.rule, self._group),
            self._states[0], self._names[0], self._input_print,
        )  # fmt: skip

    def check_capture(self) -> None:
        """Raise RuntimeError where a CUDA graph would repeat frozen numbers."""
        if self.is_capturing() and not self.is_on_device():
            raise RuntimeError(
                "a CUDA graph would repeat this step with frozen numbers: pass capturable=True, so"
                " that step counts and hyper-parameters are read from the device"
            )

    def prepare(self, request: Request, clip: GlobalNorm | None) -> None:
        """Bring everything that the launches read to the device; this may raise."""
        self.samples = request.samples
        groups = request.coefficient_groups
        for group in self.device_groups:
            group.scale.load(
                request.grad_scale,
                request.found_inf,
                clip is not None,
                request.factor,
                request.guard is not None,
                self.is_measured(request.telemetry),
            )
            group.prepare(groups)
        if clip is not None:
            inputs, flag = self._inputs(request), request.found_inf
            clip_by_norm(clip, self.device_groups, inputs, self.span, flag, request.guard)
            if self.captured and self.is_capturing():
                self._held += [clip, request.guard]

    def is_skipped(self, request: Request) -> bool:
        """Whether a guard, or another process' overflow, skips what the host has to know of."""
        overflows = self.span is not None and request.found_inf is not None
        if not overflows and request.guard is None:
            return False
        # Counts on the host would go on, and a skipped step leaves no states behind.
        groups = self.device_groups
        known = bool(self.created) or not all(group.on_device for group in groups)
        return known and bool(groups[0].scale.values[1].item())

    def hold(self, request: Request) -> None:
        """Bring squares that were measured at this step into the unit of the update.

        Those that were not are in the one of their own step.
        """
        if request.measured is None or request.statistics is None:
            return
        measured = set(request.measured)
        for group, positions in zip(self.device_groups, self._positions, strict=True):
            squares = [request.local_inputs[1][k] for k in positions if k in measured]
            group.scale.square_into(squares)
        request.statistics.keep(request.params)

    def is_measured(self, telemetry: Measures | None) -> bool:
        """Whether norms are measured at this step: whenever a CUDA graph is to repeat it."""
        return telemetry is not None and (telemetry.is_due or self.is_capturing())

    @cached_property
    def _parts(self) -> list[tuple[list[Tensor], Executor]]:
        """The parameters of each executor: made once, where a step is measured."""
        params = self.known.params
        places = zip(self._positions, self.device_groups, strict=True)
        return [([params[k] for k in own], group.executor) for own, group in places]

    def took(self, telemetry: Measures | None, measured: bool, certain: bool = True) -> None:
        """Tell telemetry of the step that was taken, or that the device may have skipped."""
        if telemetry is not None:
            telemetry.took(self._parts if measured else (), measured, certain)

    def launch(self, request: Request) -> None:
        """Count the step, and update: nothing is checked any more."""
        groups, measured = request.coefficient_groups, self.is_measured(request.telemetry)
        # With an overflow of another process, where that was asked, and a guard's decision.
        decided = request.found_inf is not None or request.guard is not None
        for group, own in zip(self.device_groups, self._inputs(request), strict=True):
            flag = group.scale.values[1] if decided else None
            group.step(own, groups, flag, measured)
        self.took(request.telemetry, measured, not decided)
        self.created.clear()

    def is_capturing(self) -> bool:
        """Whether a CUDA graph is being captured."""
        return any(is_capturing(group.device) for group in self.device_groups)

    def release(self) -> None:
        """Let go of what is kept for captured CUDA graphs, of which there are none any more."""
        self.captured = False
        self._held.clear()
        for group in self.device_groups:
            group.executor.release()
            group.scale.release()

    def is_on_device(self) -> bool:
        """Whether a captured step would read its numbers from the device."""
        return all(group.on_device for group in self.device_groups)

    def _inputs(self, request: Request) -> list[Inputs]:
        """Deal the inputs out to the device groups."""
        local = request.local_inputs
        if len(self.device_groups) == 1:
            return [local]
        return [
            [[tensors[k] for k in positions] for tensors in local] for positions in self._positions
        ]


def _entries(
    request: Request,
    chosen: list[int],
    options_of: Sequence[tuple[bool, ...]],
    formats: Sequence[GroupFormat],
    states: Mapping[str, Sequence[Tensor | None]],
) -> list[Entries]:
    """Bring chosen parameters of a step into columns, one set for all of the same format.

    Args:
        request: the step.
        chosen: which of its parameters.
        options_of: of each group.
        formats: of each group.
        states: a column for each state, of all parameters.
    """
    numbers: dict[int, int] = {}
    if any(format.device.draws for format in formats):
        numbers = {id(p): i for i, p in enumerate(_everything(request))}
    alike = list(zip(options_of, formats, strict=True))
    places: dict[Any, list[int]] = {}
    for place, k in enumerate(chosen):
        places.setdefault(alike[request.group_of[k]], []).append(place)
    found = []
    for (options, format), own in places.items():
        rows = [chosen[place] for place in own]
        draws = []
        if format.device.draws:
            params = [request.params[row] for row in rows]
            draws = [_draw(p, numbers[id(p)], format) for p in params]
        found.append(
            Entries(
                positions=own,
                params=_picked(request.local_params, rows),
                inputs=[_picked(column, rows) for column in request.local_inputs],
                states=[_picked(states[name], rows) for name in format.names],
                options=options,
                per_sample_inputs=request.per_sample,
                format=format.device,
                draws=draws,
            )
        )
    return found


def _everything(request: Request) -> list[Tensor]:
    """List the parameters of the whole optimizer, with a gradient or without."""
    return [p for group in request.whole_groups for p in group["params"]]


def _draw(p: Tensor, number: int, format: GroupFormat) -> Draw:
    return Draw(format.seed, number, walk_of(p, format.device.has_codes))


def _picked(column: Sequence[Any], rows: Sequence[int]) -> Sequence[Any]:
    return column if len(rows) == len(column) else [column[row] for row in rows]


def _columns(names_of: Sequence[Sequence[str]], states: Sequence[State]) -> dict[str, list[State]]:
    """For each state name, list the state dictionaries that must have it."""
    columns: dict[str, list[State]] = {}
    for names, state in zip(names_of, states, strict=True):
        for name in names:
            columns.setdefault(name, []).append(state)
    return columns


def _found(request: Request) -> list[Any]:
    """List what settings follow from: the optimizer's, and of each group the names and values."""
    found: list[Any] = [request.backend, request.clips, request.per_sample]
    found += [request.decided_on_device, request.telemetry]
    found += request.groups
    for group in request.groups:
        found += group
        found += group.values()
    return found


def _values(request: Request) -> list[Any] | None:
    """Return what settings follow from; None where a value may change and stay the same object."""
    for group in request.groups:
        # Of lists the parameters alone, which are compared by themselves.
        kinds = [type(value) for value in group.values()]
        if kinds.count(list) != 1 or type(group["params"]) is not list:
            return None
        for kind, value in zip(kinds, group.values(), strict=True):
            if kind not in _CONSTANT and not _is_constant_tuple(value):
                return None
    return _found(request)


def _is_constant_tuple(value: Any) -> bool:
    return type(value) is tuple and _NUMBERS.issuperset(map(type, value))


def _settings(request: Request) -> list[Any]:
    """Collect what the plan takes from the groups besides numbers."""
    rule = request.rule
    skip = {"params", "param_names", "virtual_batch_size", DECAY, *rule.hyper}
    settings: list[Any] = [request.backend, request.clips, request.per_sample, request.on_device]
    settings.append(request.telemetry is not None)
    for group in request.groups:
        settings.append(format_of(rule, group))
        settings.append(rule.options(group))
        settings.append({k: v for k, v in group.items() if k not in skip and _is_setting(v)})
    return settings


# The parameters, and types of which a changed value is another object.
_CONSTANT = frozenset({list, bool, int, float, str, type(None), torch.dtype})
_NUMBERS = _CONSTANT - {list}


def _is_setting(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
