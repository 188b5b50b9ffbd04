"""States that torch must not cast: in the form in which they are saved, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..completion import FORMAT, TORCHS
from ..formats import GroupFormat, check_parameters, format_of
from ..formats.convert import companion_problem, fit, is_compressed
from ..formats.group import CODED, COMPANIONS, SCALE
from ..formats.saved import PLAIN, name_of, restored, shown
from ..formats.tensors import begun, problem
from ..kernels.rule import Rule
from ..step.checks import describe, placement_problem
from ..step.counts import new_step
from .aside import Group, put_aside
from .complete import Place, beside, has_any, incomplete

State = dict[str, Any]


def show_formats(
    optimizer: Any, saved: dict[str, Any], known_of: Callable[[Tensor], frozenset[str]]
) -> None:
    """Put states into the form in which they are saved, and name the format of each group.

    A format that is not torch's is claimed: a file of another one lacks its name, and what is read
    into an optimizer that has torch's lacks an entry of torch's.

    Args:
        optimizer: whose states.
        saved: what torch's ``state_dict()`` returned, which is changed.
        known_of: tells which entries the state of a parameter has had.

    Raises:
        IncompleteState: for what was taken away of a state.
        ValueError: for codes without scales; the message names the parameter.
    """
    for own, group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        format = format_of(optimizer.rule, own)
        for key, p in zip(group["params"], own["params"], strict=True):
            state = optimizer.state.get(p)
            if state and _is_ours(state, format):
                state = dict(state)
                _begin(optimizer, p, state, own, known_of)
                saved["state"][key] = _shown(optimizer, p, state, format)
        name = name_of(format, own["params"])
        if name != PLAIN:
            group[FORMAT] = {name: 1}
            put_aside(group, [TORCHS])


def _is_ours(state: Mapping[str, Any], format: GroupFormat) -> bool:
    """Whether a state is not only torch's."""
    return not format.is_plain or is_compressed(state)


def _begin(
    optimizer: Any,
    p: Tensor,
    state: State,
    group: Group,
    known_of: Callable[[Tensor], frozenset[str]],
) -> None:
    """Add to a state what the next step would begin beside it.

    So that a file is whole, whatever was loaded, or which option was set, since the last step.
    """
    rule = optimizer.rule
    besides = beside(rule, group)
    missing = [name for name in besides if state.get(name) is None]
    if not missing or not has_any(state, (*rule.states(group), *COMPANIONS)):
        return
    known, format = known_of(p), format_of(rule, group)
    for name in missing:
        if name in known:
            raise incomplete(Place(optimizer, p), name, state)
        state[name] = new_step() if name == "step" else begun(p, name, format, state)


def _shown(optimizer: Any, p: Tensor, state: State, format: GroupFormat) -> State:
    """Return a state as it is saved, in the format that its options ask for by now."""
    try:
        fit(p, state, format, optimizer.rule)
    except ValueError as error:
        raise ValueError(f"{describe(optimizer, p)}: {error}") from None
    return shown(p, state, optimizer.rule)


def kept_states(optimizer: Any, loaded: Mapping[str, Any]) -> list[tuple[Tensor, State]]:
    """Return the states of a checkpoint that are not to be cast, as their groups have them kept.

    Args:
        optimizer: that loads it.
        loaded: what ``unpacked`` returned.

    Returns:
        Parameters, each with what its state is to have.

    Raises:
        ValueError: for what cannot be kept so; the message names the parameter.
    """
    found = []
    for own, saved in zip(optimizer.param_groups, loaded["param_groups"], strict=False):
        group = {**own, **saved, "params": own["params"]}
        check_parameters(group)
        format = format_of(optimizer.rule, group)
        for key, p in zip(saved["params"], own["params"], strict=False):
            state = loaded["state"].get(key, {})
            if not _is_ours(state, format):
                continue
            try:
                found.append((p, _kept(p, state, format, optimizer.rule)))
            except ValueError as error:
                raise ValueError(f"{describe(optimizer, p)}: {error}") from None
    return found


def _kept(p: Tensor, state: Mapping[str, Any], format: GroupFormat, rule: Rule) -> State:
    """Return the tensors of a saved state as they are to be kept."""
    kept = {
        name: value.to(p.device)
        for name, value in state.items()
        if isinstance(value, Tensor) and name != "step"
    }
    _check_placement(p, kept, format)
    _check_scales(kept)
    restored(p, kept, rule, format)
    # What is kept beside a parameter is the rest of it, which is yet to be loaded, perhaps.
    besides = {name: kept.pop(name) for name in COMPANIONS if name in kept}
    fit(p, kept, format, rule)
    for name in kept.keys() & set(format.names):
        if format.is_free(name) and p.is_floating_point():
            # As torch does where all is as it keeps it.
            kept[name] = kept[name].to(p.dtype)
        _refuse(name, problem(p, name, kept[name], format))
    for name, value in besides.items():
        _refuse(name, companion_problem(p, name, value))
    return kept | besides


def _check_placement(p: Tensor, kept: State, format: GroupFormat) -> None:
    for name, value in kept.items():
        # Others are a user's own.
        if name in format.names or name in COMPANIONS or name.endswith(SCALE):
            wrong = placement_problem(p, name, value)
            if wrong is not None:
                raise ValueError(wrong)


def _check_scales(kept: State) -> None:
    """Raise for codes that were converted to numbers on the way, whose scale still is there."""
    for name in kept:
        codes = kept.get(name.removesuffix(SCALE))
        if name.endswith(SCALE) and codes is not None and codes.dtype not in CODED:
            raise ValueError(
                f"its state {name.removesuffix(SCALE)!r} of the checkpoint is of {codes.dtype}, and"
                f" {name!r} is the scale of codes in 8 bits, which must not be converted"
            )


def _refuse(name: str, problem: str | None) -> None:
    if problem is not None:
        raise ValueError(f"its state {name!r} of the checkpoint {problem}")
