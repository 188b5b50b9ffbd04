"""A plan: the prepared launches of a step, and how to tell that they still fit.

Users replace gradients, swap ``p.data``, edit states and groups, and load checkpoints between
steps. Nothing is trusted to have stayed: every step compares what it sees (identities, addresses,
strides, shapes, types, options) with what the plan was made for, and makes a new plan where they
differ. Only new addresses of gradients, the common case, are taken into the old one.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import backends
from ..backends import Inputs, Slot
from ..coefficients import is_capturing
from ..memory.layout import Fingerprint
from ..memory.storage import addresses as addresses_of
from ..memory.storage import local_tensors, wrappings
from .counts import State
from .device_group import Lane

if TYPE_CHECKING:
    from ..optimizer import FusedOptimizer


class Plan:
    """The lanes of a step, made for one set of tensors.

    Args:
        optimizer: whose step this is.
        params: parameters with a gradient, ordered by group.
        inputs: for each input of the rule, the tensors of all parameters: the gradients first.
        group_of: for each parameter, the index of its group.
        created: for each parameter, the names of the states created just now.
    """

    def __init__(
        self,
        optimizer: FusedOptimizer,
        params: list[Tensor],
        inputs: list[list[Tensor]],
        group_of: list[int],
        created: Sequence[Sequence[str]],
    ) -> None:
        groups = optimizer.param_groups
        self._params = params
        self._group_of = group_of
        # Until the first step is through.
        self.created = [(p, names) for p, names in zip(params, created, strict=True) if names]
        self._config = _config(optimizer)
        names_of = [optimizer.rule.states(group) for group in groups]
        options_of = [optimizer.rule.options(group) for group in groups]
        self._names = [names_of[index] for index in group_of]
        self._states: list[State] = [optimizer.state.get(p, {}) for p in params]
        self._all_params = list(optimizer.state)
        self._all_states = list(optimizer.state.values())
        self._columns = _columns(self._names, self._states)
        self._tensors = self._state_tensors()
        local_params = local_tensors(params)
        local_inputs = [local_tensors(tensors) for tensors in inputs]
        local_states = local_tensors(self._tensors)
        self._param_print = Fingerprint(local_params)
        self._input_print = Fingerprint(_chained(local_inputs))
        # States are the same objects at every step: only a swapped .data can have moved them.
        self._state_addresses = addresses_of(local_states)
        # Where empty tensors are is nowhere.
        self._state_places = set(self._state_addresses) - {0}
        self._wrappings = wrappings(_chained(inputs))

        materialised = _is_materialised(optimizer)
        slots: dict[tuple[torch.device, bool], list[int]] = {}
        rest = {
            name: iter(local_tensors([state[name] for state in states]))
            for name, states in self._columns.items()
        }
        states_of = [tuple(next(rest[name]) for name in names) for names in self._names]
        for position, (p, index) in enumerate(zip(local_params, group_of, strict=True)):
            slots.setdefault((p.device, optimizer.is_live(groups[index])), []).append(position)

        # Whether a CUDA graph holds on to this plan's memory.
        self.captured = False
        coefficient_groups = optimizer.coefficient_groups()
        self.lanes: list[Lane] = []
        self._positions: list[list[int]] = list(slots.values())
        for (device, live), positions in slots.items():
            self.lanes.append(
                Lane(
                    optimizer.rule,
                    backends.choose(device, optimizer.backend)[0],
                    device,
                    live,
                    [
                        Slot(
                            position=i,
                            param=local_params[k].detach(),
                            inputs=tuple(tensors[k] for tensors in local_inputs),
                            states=states_of[k],
                            options=options_of[group_of[k]],
                            materialised=materialised,
                        )
                        for i, k in enumerate(positions)
                    ],
                    [self._states[k] for k in positions],
                    [group_of[k] for k in positions],
                    coefficient_groups,
                    [bool(created[k]) for k in positions],
                )
            )

    def _state_tensors(self) -> list[Tensor]:
        """List the state tensors, name by name."""
        tensors: list[Tensor] = []
        for name, states in self._columns.items():
            tensors += map(operator.itemgetter(name), states)
        return tensors

    def fits(
        self,
        optimizer: FusedOptimizer,
        params: list[Tensor],
        inputs: list[list[Tensor]],
        group_of: list[int],
    ) -> bool:
        """Whether this plan can run a step on these tensors; moved inputs are taken in."""
        if not (
            _identical(params, self._params)
            and group_of == self._group_of
            and self._is_configured(optimizer)
        ):
            return False
        # Not a look-up a parameter: hashing a tensor is a call into Python.
        if not _identical(optimizer.state, self._all_params) or not _identical(
            optimizer.state.values(), self._all_states
        ):
            return False
        try:
            tensors = self._state_tensors()
            unchanged = _identical(tensors, self._tensors) and all(
                lane.owns_steps() for lane in self.lanes
            )
        except KeyError:
            return False
        if not unchanged:
            return False
        local_params = local_tensors(params)
        addresses = list(map(Tensor.data_ptr, local_params))
        return (
            addresses == self._param_print.addresses
            and self._param_print.fits(local_params, addresses)
            and list(map(Tensor.data_ptr, local_tensors(tensors))) == self._state_addresses
            and self._take_inputs(inputs)
        )

    def _is_configured(self, optimizer: FusedOptimizer) -> bool:
        try:
            return _config(optimizer) == self._config
        except KeyError:  # an option was taken away: the checks say which
            return False

    def _take_inputs(self, inputs: list[list[Tensor]]) -> bool:
        tensors = _chained(inputs)
        if wrappings(tensors) != self._wrappings:
            return False
        tensors = local_tensors(tensors)
        try:
            addresses = list(map(Tensor.data_ptr, tensors))
            if not self._input_print.fits(tensors, addresses):
                return False
            # A gradient that has become a state, say: the checks say which. They alone see a part.
            if addresses != self._input_print.addresses and not (
                self._state_places.isdisjoint(addresses)
            ):
                return False
        except RuntimeError:  # sparse tensors have no address; the checks say so better
            return False
        # A replay writes the addresses that were captured, behind the host's back: from then on
        # neither side may rely on what the other has left in the table.
        self.captured = self.captured or (self.is_capturing() and self.is_live())
        if addresses != self._input_print.addresses or self.captured:
            for lane, own in zip(self.lanes, self.inputs(inputs), strict=True):
                lane.part.move_inputs(own)
            self._input_print.addresses = addresses
        return True

    def is_capturing(self) -> bool:
        """Whether a CUDA graph is being captured."""
        return any(is_capturing(lane.device) for lane in self.lanes)

    def release(self) -> None:
        """Let go of what is kept for captured CUDA graphs, of which there are none any more."""
        self.captured = False
        for lane in self.lanes:
            lane.part.release()

    def is_live(self) -> bool:
        """Whether a captured step would read its numbers from the device."""
        return all(lane.live for lane in self.lanes)

    def inputs(self, inputs: list[list[Tensor]]) -> list[Inputs]:
        """Deal the inputs out to the lanes."""
        local = [local_tensors(tensors) for tensors in inputs]
        if len(self.lanes) == 1:
            return [local]
        return [
            [[tensors[k] for k in positions] for tensors in local] for positions in self._positions
        ]


def _columns(names_of: Sequence[Sequence[str]], states: Sequence[State]) -> dict[str, list[State]]:
    """For each state name, list the state dictionaries that must have it."""
    columns: dict[str, list[State]] = {}
    for names, state in zip(names_of, states, strict=True):
        for name in names:
            columns.setdefault(name, []).append(state)
    return columns


def _chained(inputs: list[list[Tensor]]) -> list[Tensor]:
    return inputs[0] if len(inputs) == 1 else [tensor for kind in inputs for tensor in kind]


def _is_materialised(optimizer: FusedOptimizer) -> bool:
    return optimizer.statistics is not None and optimizer.statistics.materialised


def _identical(now: Collection[Any], then: Collection[Any]) -> bool:
    return len(now) == len(then) and all(map(operator.is_, now, then))


def _config(optimizer: FusedOptimizer) -> list[Any]:
    """Collect what the plan takes from the groups besides numbers."""
    skip = {"params", "param_names", "virtual_batch_size", *optimizer.rule.hyper}
    config: list[Any] = [optimizer.backend, optimizer.clip is not None]
    config.append(_is_materialised(optimizer))
    for group in optimizer.param_groups:
        config.append(optimizer.rule.states(group))
        config.append(optimizer.rule.options(group))
        config.append(optimizer.is_live(group))
        config.append({k: v for k, v in group.items() if k not in skip and _is_setting(v)})
    return config


def _is_setting(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
