"""States of a checkpoint: brought to torch's form, and checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..completion import FORMAT
from ..formats import format_of
from ..formats.group import COMPANIONS, SCALE
from ..formats.saved import PLAIN, companion_kinds, has_codes, kind_problem
from ..kernels.rule import Rule
from ..kernels.weight_average import NAME as AVERAGE
from ..step.checks import placement_problem
from .aside import Group
from .complete import Place, beside, check_complete, incomplete, is_gap, is_number


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


def with_dropped(
    optimizer: Any, groups: list[Group], states: Mapping[Any, Any], flat: Mapping[str, Any]
) -> dict[Any, Any]:
    """Put back what torch has left out of a flattened file, which the saved options ask for.

    Args:
        optimizer: that is to load it.
        groups: of the checkpoint, complete.
        states: what torch took of the file, for those entries that live states have.
        flat: the file.
    """
    states = dict(states)
    for own, saved in zip(optimizer.param_groups, groups, strict=True):
        names = (*format_of(optimizer.rule, {**own, **saved}).names, "step")
        for key in saved["params"]:
            state = states.get(key)
            if not isinstance(state, Mapping):
                continue
            places = {name: f"state.{key}.{name}" for name in names if name not in state}
            found = {name: flat[place] for name, place in places.items() if place in flat}
            states[key] = {**state, **found}
    return states


def without_gaps(optimizer: Any, states: Mapping[Any, Any]) -> dict[Any, Any]:
    """Leave out the gaps of what the saved options do not ask for."""
    groups = optimizer.rule.example_groups or optimizer.param_groups
    known = {name for group in groups for name in optimizer.rule.states(group)}
    known |= {"step", AVERAGE, *COMPANIONS, *(name + SCALE for name in known)}

    def present(state: Any) -> Any:
        if not isinstance(state, Mapping) or not any(map(is_gap, state.values())):
            return state
        return {n: v for n, v in state.items() if n not in known or not is_gap(v)}

    return {key: present(state) for key, state in states.items()}


def check_states(
    optimizer: Any, own: Group, saved: Group, states: Mapping[Any, Any], ours: bool
) -> None:
    """Raise where a saved state does not fit its parameter, by the options saved with it.

    Args:
        optimizer: that is to load it.
        own: a group of the optimizer.
        saved: the same of the checkpoint.
        states: of the checkpoint.
        ours: whether ``state_dict()`` here has written the options of precision in ``saved``.

    Raises:
        IncompleteState: for a state that is partly there.
        ValueError: for what has no meaning otherwise.
    """
    rule, group = optimizer.rule, {**own, **saved}
    names = rule.states(group)
    format = _format(saved)
    params = [
        (p, states.get(key, {})) for p, key in zip(own["params"], saved["params"], strict=True)
    ]
    for p, state in params:
        _check_entries(rule, group, state, Place(optimizer, p))
    if ours:
        # Whoever takes it apart by the entries of live states leaves out the name of its format.
        besides: Sequence[str] = beside(rule, group)
    else:
        besides = _besides(rule, group, format, [state for _, state in params])
    for p, state in params:
        place = Place(optimizer, p)
        check_complete(rule, names, besides, state, place)
        for name in (*names, AVERAGE):
            if state.get(name) is not None:
                _check_tensor(p, name, state[name], place)
        _check_kinds(companion_kinds(format), state, place)


def _format(saved: Group) -> str:
    """Return the name of the format of a saved group."""
    named = saved.get(FORMAT)
    return next(iter(named), PLAIN) if isinstance(named, Mapping) else PLAIN


def _check_entries(rule: Rule, group: Group, state: Any, place: Place) -> None:
    """Raise where a state is none, has a gap, or a step count that is no number."""
    if not isinstance(state, Mapping):
        raise ValueError(f"{place}: its state is no dictionary, but {state!r}")
    counts = ("step",) if rule.counts_steps else ()
    for name in (*counts, *rule.states(group), *beside(rule, group)):
        if is_gap(state.get(name)):
            raise incomplete(place, name, state)
    step = state.get("step", 0.0)
    # Also where the rule has none: torch and we make a tensor of what stands there.
    if not isinstance(step, Tensor) and not is_number(step) and not is_gap(step):
        raise ValueError(f"{place}: its state 'step' is no number, but {step!r}")


def _besides(
    rule: Rule, group: Group, format: str, states: Iterable[Mapping[str, Any]]
) -> list[str]:
    """Return what saved states must have besides what the rule keeps: what their format did."""
    found = [*companion_kinds(format)]
    # A count that the rule does not read has no other trace where nothing is in 8 bits.
    states = list(states)
    wanted = beside(rule, group)
    if AVERAGE in wanted and any(AVERAGE in state for state in states):
        found.append(AVERAGE)
    counted = has_codes(format) or any("step" in state for state in states)
    return [*found, "step"] if counted and "step" in wanted else found


def _check_kinds(kinds: Mapping[str, str], state: Mapping[str, Any], place: Place) -> None:
    """Raise where what is kept beside a parameter is not as the format of the file says."""
    for name, kind in kinds.items():
        value = state.get(name)
        wrong = kind_problem(name, kind, value) if isinstance(value, Tensor) else None
        if wrong is not None:
            raise ValueError(f"{place}: its state {name!r} of the checkpoint {wrong}")


def _check_tensor(p: Tensor, name: str, value: Any, place: Place) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{place}: its state {name!r} is no tensor, but {value!r}")
    if value.shape != p.shape:
        raise ValueError(
            f"{place}: its state {name!r} in the checkpoint has shape"
            f" {tuple(value.shape)}. Load the optimizer's state after the model's"
            " parameters have their final shape, in the order in which they were saved"
        )
    problem = placement_problem(p, name, value)
    if problem is not None:
        raise ValueError(f"{place}: {problem}")
