"""States of a checkpoint: brought to torch's form, and checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..step.checks import placement_problem
from .aside import Group
from .complete import Place, check_complete, incomplete, is_gap, is_number


def with_steps(optimizer: Any, groups: list[Group], states: Mapping[Any, Any]) -> dict[Any, Any]:
    """Move step counts that a group holds for all of its parameters, as apex's do, to each."""
    states = dict(states)
    if not optimizer.rule.counts_steps:
        return states
    for group in groups:
        if "step" not in group or "step" in optimizer.defaults:
            continue
        step = group.pop("step")
        for key in group["params"]:
            state = states.get(key)
            if isinstance(state, Mapping) and state and "step" not in state:
                number = float(step) if is_number(step) else step
                states[key] = {**state, "step": number}
    return states


def without_gaps(optimizer: Any, states: Mapping[Any, Any]) -> dict[Any, Any]:
    """Leave out the gaps of what the saved options do not ask for."""
    groups = optimizer.rule.example_groups or optimizer.param_groups
    known = {name for group in groups for name in optimizer.rule.states(group)}

    def present(state: Any) -> Any:
        if not isinstance(state, Mapping) or not any(map(is_gap, state.values())):
            return state
        return {n: v for n, v in state.items() if n not in known or not is_gap(v)}

    return {key: present(state) for key, state in states.items()}


def check_states(optimizer: Any, own: Group, saved: Group, states: Mapping[Any, Any]) -> None:
    """Raise where a saved state does not fit its parameter, by the options saved with it."""
    names = optimizer.rule.states({**own, **saved})
    for key, parameter in zip(saved["params"], own["params"], strict=True):
        state = states.get(key, {})
        place = Place(optimizer, parameter)
        if not isinstance(state, Mapping):
            raise ValueError(f"{place}: its state is no dictionary, but {state!r}")
        asked = ("step", *names) if optimizer.rule.counts_steps else names
        for name in asked:
            if is_gap(state.get(name)):
                raise incomplete(place, name, state)
        step = state.get("step", 0.0)
        # Also where the rule has none: torch and we make a tensor of what stands there.
        if not isinstance(step, Tensor) and not is_number(step):
            raise ValueError(f"{place}: its state 'step' is no number, but {step!r}")
        check_complete(optimizer.rule, names, state, place)
        for name in names:
            value = state.get(name)
            if value is None:
                continue
            if not isinstance(value, Tensor):
                raise ValueError(f"{place}: its state {name!r} is no tensor, but {value!r}")
            if value.shape != parameter.shape:
                raise ValueError(
                    f"{place}: its state {name!r} in the checkpoint has shape"
                    f" {tuple(value.shape)}. Load the optimizer's state after the model's"
                    " parameters have their final shape, in the order in which they were saved"
                )
            problem = placement_problem(parameter, name, value)
            if problem is not None:
                raise ValueError(f"{place}: {problem}")
