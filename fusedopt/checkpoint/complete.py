"""Whether a state has all that its rule keeps: what is partly there is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..formats import format_of
from ..kernels.rule import Group, Rule
from ..step.checks import describe


class IncompleteState(KeyError, ValueError):
    """A state that is partly there, or another algorithm's.

    torch's optimizers raise KeyError for it at the step, and ValueError for what does not fit at
    ``load_state_dict``: code that expects either catches this.
    """

    def __str__(self) -> str:
        # A KeyError alone shows its text in quotes.
        return str(self.args[0])


class Place:
    """A parameter's name, looked up only for a message."""

    def __init__(self, optimizer: Any, parameter: Tensor) -> None:
        self._of = optimizer, parameter

    def __str__(self) -> str:
        return describe(*self._of)


def is_gap(value: Any) -> bool:
    """Whether torch found nothing for an entry of a flattened state: it fills in an empty dict."""
    return isinstance(value, Mapping) and not value


def is_number(step: Any) -> bool:
    """Whether something can be a step count."""
    if isinstance(step, Tensor):
        return step.numel() == 1 and not step.is_complex()
    # Also as a tensor's value.
    return isinstance(step, float) or (isinstance(step, int) and abs(step) < 1 << 63)


def beside(rule: Rule, group: Group) -> tuple[str, ...]:
    """Return the entries of a state that its format asks for and its rule does not.

    The rest of the parameter, the average of the weights, and the count that random bits and the
    average depend on.
    """
    format = format_of(rule, group)
    found = [] if format.companion is None else [format.companion]
    if format.average is not None:
        found.append(format.average.name)
    if format.device.counts and not rule.counts_steps:
        found.append("step")
    return tuple(found)


def has_any(state: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether a state has some of what is kept: else nothing yet, or only what users keep there."""
    return any(state.get(name) is not None for name in (*names, "step"))


def check_complete(
    rule: Rule, names: Sequence[str], besides: Sequence[str], state: Mapping[str, Any], who: Any
) -> None:
    """Raise where a state has some of what is kept, but not all of it.

    Args:
        rule: that keeps it.
        names: of its entries.
        besides: those that the format keeps.
        state: of a parameter.
        who: the parameter, for messages.

    Raises:
        IncompleteState: naming the parameter and the first key that is missing.
        ValueError: for a step count that is no number.
    """
    if not has_any(state, (*names, *besides)):
        return
    missing = [name for name in names if state.get(name) is None]
    if rule.counts_steps:
        if state.get("step") is None:
            missing.insert(0, "step")
        elif not is_number(state["step"]):
            raise ValueError(f"{who}: its state 'step' is no number, but {state['step']!r}")
    elif len(missing) == len(names):
        # As torch's SGD, whose buffers begin with the first step that has momentum.
        missing = []
    missing += [name for name in besides if state.get(name) is None]
    if missing:
        raise incomplete(who, missing[0], state)


def incomplete(who: Any, name: str, state: Mapping[str, Any]) -> IncompleteState:
    """Make the error for an entry that a state lacks."""
    found = ", ".join(repr(n) for n, value in state.items() if not is_gap(value))
    return IncompleteState(
        f"{who}: its state has no {name!r}, but {found or 'nothing'}."
        " Going on would start that one from zero beside the others: complete the state, or"
        " remove all of it (optimizer.state.pop(parameter)) to start afresh"
    )
