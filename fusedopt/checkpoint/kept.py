"""States that torch must not cast: in the form in which they are saved, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..completion import FORMAT, TORCHS
from ..formats import GroupFormat, check_parameters, format_of
from ..formats.convert import COMPANIONS, companion_problem, fit, is_compressed
from ..formats.group import SCALE
from ..formats.saved import PLAIN, name_of, restored, shown
from ..formats.tensors import problem
from ..step.checks import describe, placement_problem
from .aside import put_aside


def show_formats(optimizer: Any, saved: dict[str, Any]) -> None:
    """Put states into the form in which they are saved, and name the format of each group.

    A format that is not torch's is claimed: a file of another one lacks its name, and what is read
    into an optimizer that has torch's lacks an entry of torch's.

    Args:
        optimizer: whose states.
        saved: what torch's ``state_dict()`` returned, which is changed.

    Raises:
        ValueError: for codes without scales; the message names the parameter.
    """
    rule = optimizer.rule
    for own, group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        format = format_of(rule, own)
        for key, p in zip(group["params"], own["params"], strict=True):
            state = optimizer.state.get(p)
            if state and not (format.is_plain and not is_compressed(state)):
                # Options may have changed since the last step.
                state = dict(state)
                _fit(optimizer, p, state, format)
                saved["state"][key] = shown(p, state, rule)
        name = name_of(format, own["params"])
        if name != PLAIN:
            group[FORMAT] = {name: 1}
            put_aside(group, [TORCHS])


def kept_states(optimizer: Any, loaded: Mapping[str, Any]) -> list[tuple[Tensor, dict[str, Any]]]:
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
            if format.is_plain and not is_compressed(state):
                continue
            kept = {
                name: value.to(p.device)
                for name, value in state.items()
                if isinstance(value, Tensor) and name != "step"
            }
            for name, value in kept.items():
                wrong = placement_problem(p, name, value)
                if wrong is not None and name in _tensors_of(state, format):
                    raise ValueError(f"{describe(optimizer, p)}: {wrong}")
            restored(p, kept, optimizer.rule, format)
            # What is kept beside a parameter is the rest of it, which is yet to be loaded, perhaps.
            beside = {name: kept.pop(name) for name in COMPANIONS if name in kept}
            _fit(optimizer, p, kept, format)
            for name, value in (kept | beside).items():
                if name in beside:
                    wrong = companion_problem(p, name, value)
                else:
                    wrong = problem(p, name, value, format) if name in format.names else None
                if wrong is not None:
                    raise ValueError(
                        f"{describe(optimizer, p)}: its state {name!r} of the checkpoint {wrong}"
                    )
            kept |= beside
            found.append((p, kept))
    return found


def _tensors_of(state: Mapping[str, Any], format: GroupFormat) -> set[str]:
    """Return the keys of what is kept of a parameter: others are a user's own."""
    scales = {name for name in state if name.endswith(SCALE)}
    return {*format.names, *COMPANIONS, *scales}


def _fit(optimizer: Any, p: Tensor, state: dict[str, Any], format: GroupFormat) -> None:
    try:
        fit(p, state, format, optimizer.rule)
    except ValueError as error:
        raise ValueError(f"{describe(optimizer, p)}: {error}") from None
