"""A plan of one parameter, and a quicker way to tell that it still fits than ``Plan.fits``.

That looks at many tensors at a time, a trait after the other; of one alone, most of its time goes
into calls. What is compared here is the same, and whatever is out of the ordinary is left to it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..memory.layout import Fingerprint
from ..memory.storage import PLAIN
from .counts import State
from .device_group import DeviceGroup

_NUMBERS = (float, int)


class Alone:
    """The step of one plain parameter whose options are constants, on plain numbers.

    Args:
        device_group: the parameter's, prepared, with its counts on the host.
        parameter: the parameter.
        gradient: that the plan was last used with.
        group: of the parameter; its values may be replaced, not changed.
        hyper: names of its numbers.
        state: of the parameter.
        names: of the tensors that it has.
        input_print: of the plan, which is told where the gradient is.
    """

    def __init__(
        self,
        device_group: DeviceGroup,
        parameter: Tensor,
        gradient: Tensor,
        group: Mapping[str, Any],
        hyper: Sequence[str],
        state: State,
        names: Sequence[str],
        input_print: Fingerprint,
    ) -> None:
        self._device_group = device_group
        self._parameter = parameter
        self._print = Fingerprint([parameter, gradient])
        self._input_print = input_print
        self._values = list(group.values())
        self._is_number = [name in hyper for name in group]
        self._state = state
        self._names = names
        self._tensors = [state[name] for name in names]
        self._addresses = list(map(Tensor.data_ptr, self._tensors))

    def step(
        self, group: Mapping[str, Any], state: Any, gradient: Tensor, measured: bool = False
    ) -> bool:
        """Update the parameter, if nothing has changed but numbers and the gradient's address.

        Args:
            group: of the parameter, as it is now, the same object as at first.
            state: of the parameter.
            gradient: the gradient.
            measured: whether its norms are, by a plan made for that.

        Returns:
            False where nothing was done.
        """
        if not self._is_as_before(group, state, gradient):
            return False
        groups = (group,)
        try:
            self._device_group.prepare(groups)
        except Exception:  # noqa: BLE001 - it is raised again, and explained, by who does all of it
            return False
        self._device_group.step(((gradient,),), groups, None, measured)
        torch.autograd.graph.increment_version((self._parameter,))
        return True

    def _is_as_before(self, group: Mapping[str, Any], state: Any, gradient: Tensor) -> bool:
        if type(gradient) not in PLAIN or not self._has_settings(group):
            return False
        # Nothing is kept of a parameter whose rule needs nothing.
        if state is not self._state and (state is not None or self._state):
            return False
        try:
            tensors = [self._state[name] for name in self._names]
            if not all(map(operator.is_, tensors, self._tensors)):
                return False
            if not self._device_group.owns_steps():
                return False
            if list(map(Tensor.data_ptr, tensors)) != self._addresses:
                return False
            found = self._print.match((self._parameter, gradient))
        except (KeyError, RuntimeError):  # one was taken away, or has no address
            return False
        before = self._print.addresses
        if found is None or found[0] != before[0] or found[1] in self._addresses:
            return False
        if found[1] != before[1]:
            self._device_group.executor.move_inputs(((gradient,),))
            self._print.addresses = found
            self._input_print.addresses = found[1:]
        return True

    def _has_settings(self, group: Mapping[str, Any]) -> bool:
        now = list(group.values())
        if len(now) == len(self._values) and all(map(operator.is_, now, self._values)):
            return True
        if len(now) != len(self._values):
            return False
        for old, new, is_number in zip(self._values, now, self._is_number, strict=True):
            # A number that is a tensor may be on the device.
            if new is not old and not (is_number and type(new) in _NUMBERS):
                return False
        self._values = now
        return True
