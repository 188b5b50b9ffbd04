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

from . import backends
from .backends import Inputs, Slot
from .coefficients import is_capturing
from .lane import Lane
from .layout import Fingerprint
from .steps import State

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

_PLAIN = {Tensor, torch.nn.Parameter}


def local_tensors(tensors: list[Tensor]) -> list[Tensor]:
    """Replace DTensors by the tensors of this process."""
    if set(map(type, tensors)) <= _PLAIN:
        return tensors
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    # What a collective is still working on has no memory to point at.
    return [t.wait() if hasattr(t, "wait") else t for t in local]


class Plan:
    """The lanes of a step, made for one set of tensors.

    Args:
        optimizer: whose step this is.
        params: parameters with a gradient, ordered by group.
        gradients: their gradients.
        group_of: for each parameter, the index of its group.
        created: for each parameter, the names of the states created just now.
    """

    def __init__(
        self,
        optimizer: FusedOptimizer,
        params: list[Tensor],
        gradients: list[Tensor],
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
        local_params, local_gradients = local_tensors(params), local_tensors(gradients)
        local_states = local_tensors(self._tensors)
        self._param_print = Fingerprint(local_params)
        self._gradient_print = Fingerprint(local_gradients)
        # States are the same objects at every step: only a swapped .data can have moved them.
        self._state_addresses = list(map(Tensor.data_ptr, local_states))
        self._placements = _placements(gradients)

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
                            inputs=(local_gradients[k],),
                            states=states_of[k],
                            options=options_of[group_of[k]],
                        )
                        for i, k in enumerate(positions)
                    ],
                    [self._states[k] for k in positions],
                    [group_of[k] for k in positions],
                    groups,
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
        gradients: list[Tensor],
        group_of: list[int],
    ) -> bool:
        """Whether this plan can run a step on these tensors; moved gradients are taken in."""
        if not (
            _identical(params, self._params)
            and group_of == self._group_of
            and _config(optimizer) == self._config
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
            and self._take_gradients(gradients)
        )

    def _take_gradients(self, gradients: list[Tensor]) -> bool:
        if _placements(gradients) != self._placements:
            return False
        gradients = local_tensors(gradients)
        try:
            addresses = list(map(Tensor.data_ptr, gradients))
            if not self._gradient_print.fits(gradients, addresses):
                return False
        except RuntimeError:  # sparse tensors have no address; the checks say so better
            return False
        # A replay writes the addresses that were captured, behind the host's back: from then on
        # neither side may rely on what the other has left in the table.
        self.captured = self.captured or (self.is_capturing() and self.is_live())
        if addresses != self._gradient_print.addresses or self.captured:
            for lane, inputs in zip(self.lanes, self.inputs(gradients), strict=True):
                lane.part.move_inputs(inputs)
            self._gradient_print.addresses = addresses
        return True

    def is_capturing(self) -> bool:
        """Whether a CUDA graph is being captured."""
        return any(is_capturing(lane.device) for lane in self.lanes)

    def is_live(self) -> bool:
        """Whether a captured step would read its numbers from the device."""
        return all(lane.live for lane in self.lanes)

    def inputs(self, gradients: list[Tensor]) -> list[Inputs]:
        """Deal the gradients out to the lanes."""
        gradients = local_tensors(gradients)
        if len(self.lanes) == 1:
            return [(gradients,)]
        return [([gradients[k] for k in positions],) for positions in self._positions]

    def forget_created(self, state: dict[Tensor, Any]) -> None:
        """Remove the states that were created for this plan."""
        for p, names in self.created:
            for name in names:
                del state[p][name]
            if not state[p]:
                del state[p]


def _columns(names_of: Sequence[Sequence[str]], states: Sequence[State]) -> dict[str, list[State]]:
    """For each state name, list the state dictionaries that must have it."""
    columns: dict[str, list[State]] = {}
    for names, state in zip(names_of, states, strict=True):
        for name in names:
            columns.setdefault(name, []).append(state)
    return columns


def _identical(now: Collection[Any], then: Collection[Any]) -> bool:
    return len(now) == len(then) and all(map(operator.is_, now, then))


def _config(optimizer: FusedOptimizer) -> list[Any]:
    """Collect what the plan takes from the groups besides numbers."""
    skip = {"params", "param_names", *optimizer.rule.hyper}
    config: list[Any] = [optimizer.backend, optimizer.clip is not None]
    for group in optimizer.param_groups:
        config.append(optimizer.rule.states(group))
        config.append(optimizer.rule.options(group))
        config.append(optimizer.is_live(group))
        config.append({k: v for k, v in group.items() if k not in skip and _is_setting(v)})
    return config


def _is_setting(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _placements(gradients: list[Tensor]) -> list[Any]:
    """How DTensors are spread over processes; nothing for other tensors."""
    if set(map(type, gradients)) <= _PLAIN:
        return []
    return [getattr(gradient, "placements", None) for gradient in gradients]
