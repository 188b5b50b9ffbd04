"""One parameter of an optimizer, which an engine steps as if it were a whole one.

Each released parameter has an engine of its own, whose plan is made once: stepping one parameter
through the optimizer's would look at all of them, and make a plan for each anew.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..engine import Engine
from ..memory.device import is_capturing
from ..step.alone import Alone
from ..step.options import complete
from ..step.plan import Plan
from ..step.scale import GradScale

_NOTHING: dict[str, Any] = {}


class Single:
    """A parameter with its group and its state; what ``Engine`` asks of an optimizer.

    Args:
        optimizer: that has the parameter; it is not kept.
        parameter: the parameter.
        scale_for: what launches on a device are to read besides coefficients.

    Attributes:
        param_groups: one group, a copy of the parameter's own that ``refresh`` brings up to date.
        state: of this parameter; what is added or taken away, is in the optimizer's, too.
        round: the latest of the handle's rounds in which it was stepped.
    """

    step_norm = None
    guard = None
    wrapper_group = None

    def __init__(
        self,
        optimizer: Any,
        parameter: Tensor,
        scale_for: Callable[[torch.device], GradScale] = GradScale,
    ) -> None:
        self._whole = weakref.ref(optimizer)
        self.parameter = parameter
        self.scale_for = scale_for
        self.engine = Engine()
        self.round = -1
        self.state = OwnState(parameter)
        self._params = [parameter]
        self._own: Any = None
        self._alone: Alone | None = None
        self._made_for: tuple[Any, ...] = ()
        self._group: dict[str, Any] = {}
        self.param_groups = [self._group]
        self._place = (0, 0)
        self.locate()

    @property
    def whole(self) -> Any:
        """The optimizer."""
        return self._whole()

    @property
    def telemetry(self) -> Any:
        """What measures the optimizer's steps."""
        return self.whole.telemetry

    @property
    def decided_on_device(self) -> bool:
        """Whether the device alone knows of a step that it is skipped."""
        return self.scaler_on_device

    @property
    def choices(self) -> Any:
        """As of the optimizer, as what follows."""
        return self.whole.choices

    @property
    def extra_options(self) -> Any:  # noqa: D102
        return self.whole.extra_options

    @property
    def defaults(self) -> Any:  # noqa: D102
        return self.whole.defaults

    def check_group(self, group: dict[str, Any]) -> None:  # noqa: D102
        self.whole.check_group(group)

    def locate(self) -> None:
        """Find the parameter's group, and prepare its step anew.

        Raises:
            RuntimeError: where the optimizer does not have it any more.
        """
        for index, group in enumerate(self.whole.param_groups):
            for place, p in enumerate(group["params"]):
                if p is self.parameter:
                    self._place = index, place
                    # By its number among all, which may be another, is it rounded.
                    self.engine.drop()
                    return
        raise RuntimeError(
            f"a parameter of shape {tuple(self.parameter.shape)} was taken out of the optimizer"
            " that releases its gradient: call remove() of what gradient_release() returned, and"
            " gradient_release() again"
        )

    def step(self, optimizer: Any) -> None:
        """Update the parameter by its gradient."""
        self._refresh(optimizer)
        if self._has_stepped():
            return
        self._alone = None
        self.engine.step(self)
        plan, gradient = self.engine.plan, self.parameter.grad
        self._own = self.state.get(self.parameter)
        if plan is not None and gradient is not None and self.statistics is None:
            self._alone = plan.alone(gradient)
            self._made_for = self._makes_for(plan)

    def _has_stepped(self) -> bool:
        """Take the step in the quicker way, if there is one for what is there now."""
        alone, gradient = self._alone, self.parameter.grad
        if alone is None or gradient is None or self.statistics is not None:
            return False
        plan, telemetry = self.engine.plan, self.telemetry
        if plan is None or not all(map(operator.is_, self._made_for, self._makes_for(plan))):
            return False
        if self.scaler_on_device or is_capturing(self.parameter.device):
            return False
        measured = plan.is_measured(telemetry)
        if not alone.step(self._group, self._own, gradient, measured):
            return False
        plan.took(telemetry, measured)
        return True

    def _makes_for(self, plan: Plan) -> tuple[Any, ...]:
        """List what the quicker way is made for."""
        return plan, self.rule, self.backend, self.telemetry is None

    def push(self, optimizer: Any) -> None:
        """Send hyper-parameters to captured CUDA graphs."""
        self._refresh(optimizer)
        self.engine.push(self)

    def reset(self, optimizer: Any) -> None:
        """Forget what was known of the state: another is loaded."""
        self._refresh(optimizer)
        self.engine.reset()
        self.engine.look_at_states(self)

    def _refresh(self, optimizer: Any) -> None:
        """Take what the optimizer has now: users edit groups, and replace states."""
        self.rule = optimizer.rule
        self.backend = optimizer.backend
        self.statistics = optimizer.statistics
        self.scaler_on_device = optimizer.scaler_on_device
        index, place = self._place
        groups = optimizer.param_groups
        if not (
            index < len(groups)
            and place < len(groups[index]["params"])
            and groups[index]["params"][place] is self.parameter
        ):
            self.locate()
            index, place = self._place
        self._take_group(optimizer, groups[index])
        state = self.state
        state.all = optimizer.state
        own = state.all.get(self.parameter)
        if own is not self._own or (own is not None) != len(state):
            state.take(own)
        self._own = own

    def _take_group(self, optimizer: Any, group: dict[str, Any]) -> None:
        own = self._group
        own.update(group)
        own["params"] = self._params
        # A list, of which a plan would have to be asked whether it has changed.
        named = own.pop("param_names", None) is not None
        if len(own) + named != len(group):
            # An entry was taken away, or is one that was filled in here.
            complete(optimizer, group)
            own.clear()
            own.update(group)
            own["params"] = self._params
            own.pop("param_names", None)


class OwnState(dict[Tensor, Any]):
    """The state of one parameter, under the parameter: read as a dictionary, written through.

    Args:
        parameter: whose.

    Attributes:
        all: the optimizer's states.
    """

    def __init__(self, parameter: Tensor) -> None:
        super().__init__()
        self._parameter = parameter
        self.all: Any = _NOTHING

    def take(self, own: Any) -> None:
        """Hold what the optimizer has; None for nothing."""
        super().clear()
        if own is not None:
            super().__setitem__(self._parameter, own)

    def update(self, items: Iterable[tuple[Tensor, Any]]) -> None:  # type: ignore[override]
        """Add a state, to the optimizer's, too."""
        items = list(items)
        self.all.update(items)
        super().update(items)

    def __delitem__(self, parameter: Tensor) -> None:
        del self.all[parameter]
        super().__delitem__(parameter)
