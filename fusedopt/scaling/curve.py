"""A scheduler of torch's run by itself, for the learning rates that it gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from .checks import finite, saved

SchedulerFactory = Callable[[Optimizer], LRScheduler]

_LEARNING_RATES = ("lr", "initial_lr")
# What OneCycleLR and CyclicLR leave in a group when they are to change the momentum.
_MOMENTUM_BOUNDS = ("base_momentum", "max_momentum")


class PastEnd(ValueError):
    """The scheduler has no learning rate for a base step."""


class Curve:
    """The learning rates of a schedule, one base step after another.

    The scheduler acts on a stand-in for the optimizer, which has the same groups without their
    parameters. Only the current base step is kept.

    Args:
        factory: makes the scheduler on the optimizer that it is given.
        optimizer: whose groups the stand-in takes.

    Attributes:
        index: the base step that ``lrs`` is of, from 0.

    Raises:
        TypeError: where the factory returns no scheduler of torch's, or one that needs metrics.
        ValueError: where the scheduler acts on another optimizer, or changes more than lr.
    """

    def __init__(self, factory: SchedulerFactory, optimizer: Optimizer) -> None:
        self.index = 0
        self._shadow = _Shadow(optimizer)
        # Compared by identity: whoever replaces an entry, if by an equal one, acts on it.
        self._found = [dict(group) for group in self._shadow.param_groups]
        self._scheduler = factory(self._shadow)
        self._check_scheduler()
        self._check_changes()

    def lrs(self) -> list[float]:
        """Return the learning rate of each group at the current base step."""
        return [float(group["lr"]) for group in self._shadow.param_groups]

    def advance(self) -> None:
        """Go on to the next base step.

        Raises:
            PastEnd: where the scheduler says so, by a ValueError.
            ValueError: where it changes more than lr.
        """
        # A scheduler warns where no step of the optimizer came before its own.
        self._shadow.step()
        try:
            self._scheduler.step()
        except ValueError as error:
            raise PastEnd(str(error)) from error
        self._check_changes()
        self.index += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the place on the curve, as copies."""
        groups = [
            {name: value for name, value in group.items() if _is_written(name, found)}
            for group, found in zip(self._shadow.param_groups, self._found, strict=True)
        ]
        state = {"index": self.index, "scheduler": self._scheduler.state_dict(), "groups": groups}
        return copy.deepcopy(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a place on the curve of a scheduler made alike.

        Raises:
            ValueError: for what is no such place. Then this is where it was.
        """
        saved(state_dict, "index", _checked_index)
        saved(state_dict, "scheduler", _checked_mapping)
        saved(state_dict, "groups", self._checked_groups)
        before = self.state_dict()
        try:
            self._load(state_dict)
        except Exception as error:
            self._load(before)
            kind = type(self._scheduler).__name__
            raise ValueError(
                f"state_dict['scheduler'] is no state of {kind}, which says {error!r}"
            ) from error

    def _load(self, state_dict: dict[str, Any]) -> None:
        state = copy.deepcopy(state_dict)
        self._scheduler.load_state_dict(state["scheduler"])
        for group, entries in zip(self._shadow.param_groups, state["groups"], strict=True):
            group.update(entries)
        self.index = state["index"]

    def _checked_groups(self, name: str, groups: Any) -> None:
        ours = len(self._shadow.param_groups)
        if not isinstance(groups, list | tuple) or len(groups) != ours:
            raise ValueError(f"{name} must be a list of {ours} groups, got {groups!r}")
        for i, group in enumerate(groups):
            _checked_mapping(f"{name}[{i}]", group)
            for key in _LEARNING_RATES:
                if key in group:
                    finite(f"{name}[{i}][{key!r}]", group[key])

    def _check_scheduler(self) -> None:
        scheduler = self._scheduler
        if isinstance(scheduler, ReduceLROnPlateau):
            raise TypeError(
                "ReduceLROnPlateau follows a metric, so that there is no curve over samples: use it"
                " as it is"
            )
        if not isinstance(scheduler, LRScheduler):
            raise TypeError(
                "scheduler_factory must return a torch.optim.lr_scheduler.LRScheduler, got"
                f" {scheduler!r}"
            )
        if scheduler.optimizer is not self._shadow:
            raise ValueError(
                f"scheduler_factory made a {type(scheduler).__name__} for another optimizer than"
                " the one that it was given: write lambda o: ...LR(o, ...)"
            )

    def _check_changes(self) -> None:
        for group, found in zip(self._shadow.param_groups, self._found, strict=True):
            changed = [k for k in found if k not in _LEARNING_RATES and group[k] is not found[k]]
            changed += [k for k in _MOMENTUM_BOUNDS if k in group and k not in found]
            if changed:
                raise ValueError(
                    f"{type(self._scheduler).__name__} also changes {', '.join(changed)}, and only"
                    " learning rates can follow the samples: pass cycle_momentum=False, where it"
                    " has that"
                )


class _Shadow(Optimizer):
    """An optimizer of the same groups that has nothing to optimize."""

    def __init__(self, optimizer: Optimizer) -> None:
        skip = {"params", "param_names"}
        groups = [
            {
                "params": [torch.zeros((), device="cpu")],
                **{name: _host_copy(x) for name, x in group.items() if name not in skip},
            }
            for group in optimizer.param_groups
        ]
        super().__init__(groups, dict(optimizer.defaults))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing."""


def _host_copy(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _is_written(name: str, found: dict[str, Any]) -> bool:
    """Whether the scheduler may have written an entry of a group."""
    return name in _LEARNING_RATES or name not in found


def _checked_index(name: str, index: Any) -> None:
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        raise ValueError(f"{name} must be an integer, at least 0, got {index!r}")


def _checked_mapping(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dictionary, got {value!r}")
