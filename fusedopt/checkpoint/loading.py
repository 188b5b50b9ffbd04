"""A checkpoint looked at before it is loaded: whether it fits, in the form that torch loads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..clipping import GlobalNorm
from ..completion import FORMAT
from ..guard import SpikeGuard
from .aside import ABSENT, carried, is_carrier
from .complete import IncompleteState
from .groups import complete_groups
from .states import check_states, with_dropped, with_steps, without_gaps


def unpacked(
    optimizer: Any, state_dict: Mapping[str, Any], flat: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check a checkpoint, and return it in the form that torch loads.

    Args:
        optimizer: that is to load it.
        state_dict: what its own or torch's ``state_dict()`` returned; it is not changed.
        flat: the flattened file that torch has made this of, or None.

    Returns:
        The state, and what is said of ``"clip"``, its arguments or None for no clip, and of
        ``"guard"``, one like the saved.

    Raises:
        IncompleteState: for a state that is partly there, or another algorithm's.
        ValueError: for what has no meaning otherwise.
    """
    check_form(state_dict)
    groups = [dict(group) for group in state_dict["param_groups"]]
    # They span groups: a checkpoint holds one of each, written into all of them.
    beside: dict[str, Any] = {}
    for group in groups:
        for name in ("clip", "guard"):
            found = carried(group.pop(name, ABSENT))
            if found is not ABSENT:
                beside.setdefault(name, found)
    if beside.get("clip") is not None:
        GlobalNorm(**beside["clip"])
    if "guard" in beside:
        beside["guard"] = SpikeGuard.from_state(beside["guard"])
    loaded = {**state_dict, "param_groups": groups}
    if _sizes(groups) == _sizes(optimizer.param_groups):
        # Otherwise torch's error says so.
        ours = [is_carrier(group.get("master")) for group in groups]
        complete_groups(optimizer, groups)
        states = state_dict["state"]
        if flat is not None:
            states = with_dropped(optimizer, groups, states, flat)
        loaded["state"] = with_steps(optimizer, groups, states)
        for own, saved, is_ours in zip(optimizer.param_groups, groups, ours, strict=True):
            check_states(optimizer, own, saved, loaded["state"], is_ours)
        loaded["state"] = without_gaps(optimizer, loaded["state"])
    for group in groups:
        group.pop(FORMAT, None)
    return loaded, beside


def check_form(state_dict: Any) -> None:
    """Raise for what is no optimizer's ``state_dict()``.

    Raises:
        IncompleteState: without ``"state"`` or ``"param_groups"``.
        ValueError: where they, or the entries of a state, are of another kind.
    """
    for name, kind in (("state", Mapping), ("param_groups", (list, tuple))):
        if name not in state_dict:
            raise IncompleteState(
                f"the checkpoint has no {name!r}, but {', '.join(map(repr, state_dict))}: it is not"
                " what an optimizer's state_dict() returns"
            )
        if not isinstance(state_dict[name], kind):
            what = "dictionary" if kind is Mapping else "list"
            raise ValueError(f"{name!r} of the checkpoint is no {what}, but {state_dict[name]!r}")
    for index, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, Mapping) or "params" not in group:
            raise ValueError(
                f"param_groups[{index}] of the checkpoint is no dictionary with 'params', but"
                f" {group!r}"
            )


def _sizes(groups: Iterable[Mapping[str, Any]]) -> list[int]:
    return [len(group["params"]) for group in groups]
