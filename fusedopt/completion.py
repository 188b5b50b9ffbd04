"""Full state dicts, which torch completes by what the loading optimizer has, and writes into it.

``set_optimizer_state_dict`` with ``full_state_dict=True`` asks the loading optimizer for its state,
puts what the file has into that, and keeps the rest: a moment that the file lacks stays the loading
optimizer's in silence, and so does the whole state where the file is another algorithm's. With
``broadcast_from_rank0=True`` it writes into the live tensors before anybody can refuse, and what
this optimizer has not reaches rank 0 alone.

So torch is then handed copies of the tensors, and marks in place of numbers. Of what comes back,
what is still a copy or a mark was not in the file, and what was not handed out is left out: on
every rank alike.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

Group = dict[str, Any]
# An entry of every group of torch's that says nothing here, and to which torch's SGD does not look.
TORCHS = "differentiable"
# Entry of a saved group that names the format of its states, where that is not torch's.
FORMAT = "state_format"
_TORCH = "torch.distributed.checkpoint.state_dict"
_LOAD, _READ, _INIT = "_load_optim_state_dict", "_get_optim_state_dict", "_init_optim_state"
_FSDP = "torch.distributed.fsdp.fully_sharded_data_parallel"
_GATHER = ("optim_state_dict", "full_optim_state_dict", "sharded_optim_state_dict")
# Decorators of torch's lie between.
_DEPTH = 20


class _Mark(str):
    """Stands for a number. A string: torch refuses objects that it does not know."""

    __slots__ = ()


def is_completing() -> bool:
    """Whether torch asks for the state that it is about to complete a full one by."""
    return _are_calling((_READ, _LOAD))


def is_completed() -> bool:
    """Whether torch hands over what it was asked to load."""
    return _are_calling((_LOAD,))


def flat_state() -> Mapping[str, Any] | None:
    """Return the flattened state that torch hands over an extract of; None where it is another.

    It takes out what the state of the loading optimizer has by now, and drops the rest: what is
    kept beside a parameter in the file's format, but not in the optimizer's own.
    """
    frame = sys._getframe(1)
    for _ in range(_DEPTH):
        if frame is None:
            break
        if frame.f_globals.get("__name__") == _TORCH:
            state = frame.f_locals.get("state_dict") if frame.f_code.co_name == _LOAD else None
            return state if isinstance(state, Mapping) and "state" not in state else None
        frame = frame.f_back  # type: ignore[assignment]
    return None


def is_creating() -> bool:
    """Whether torch calls ``step()`` to have states created, which it then reads or replaces."""
    return _are_calling((_INIT,))


def is_gathering() -> bool:
    """Whether torch asks for a state that it gathers, of flat parameters if these are."""
    frame = sys._getframe(1)
    for _ in range(_DEPTH):
        if frame is None:
            break
        where, name = frame.f_globals.get("__name__"), frame.f_code.co_name
        if (where == _TORCH and name == _READ) or (where == _FSDP and name in _GATHER):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _are_calling(names: Iterable[str]) -> bool:
    """Whether these functions of torch's are the innermost ones around the caller, in order."""
    waiting = list(names)
    frame = sys._getframe(2)
    for _ in range(_DEPTH):
        if frame is None or not waiting:
            break
        if frame.f_globals.get("__name__") == _TORCH:
            if frame.f_code.co_name != waiting.pop(0):
                return False
        frame = frame.f_back  # type: ignore[assignment]
    return not waiting


class Lent:
    """What was handed out to be completed: copies and marks in the place of a state dict's values.

    Args:
        state_dict: the optimizer's own; it is changed to the one that is to be handed out.
    """

    def __init__(self, state_dict: dict[str, Any]) -> None:
        states = state_dict["state"]
        state_dict["state"] = {key: dict(map(_copied, s.items())) for key, s in states.items()}
        self._states = dict(state_dict["state"])
        self._versions = {
            id(value): (value, _version(value))
            for state in self._states.values()
            for value in state.values()
            if isinstance(value, Tensor)
        }
        for group in state_dict["param_groups"]:
            kept = {key: group[key] for key in ("params", "param_names") if key in group}
            group.update({key: _marked(value) for key, value in group.items()} | kept)
        self._groups = [dict(group) for group in state_dict["param_groups"]]

    def returned(self, state_dict: Mapping[str, Any], form: str | None) -> dict[str, Any]:
        """Return what the file had of what was handed out.

        Args:
            state_dict: as completed by torch.
            form: an option that decides what the states mean, or None.

        Raises:
            ValueError: for states of another form or format than the optimizer's.
        """
        groups, states = [], {}
        numbers = iter(range(sum(len(group["params"]) for group in self._groups)))
        for own, completed in zip(self._groups, state_dict["param_groups"], strict=True):
            group = {key: x for key, x in completed.items() if key in own and not _has_mark(x)}
            for key, kind in ((TORCHS, _Mark), (form, Mapping), (FORMAT, Mapping)):
                value = own.get(key)
                # What is put aside is an empty mapping; a mark is an empty string.
                if isinstance(value, kind) and value != {} and key not in group:
                    raise ValueError(_of_another(form, key == FORMAT or FORMAT in completed))
            groups.append(group)
            for key in group["params"]:
                lent = self._states.get(next(numbers), {})
                if key not in state_dict["state"]:
                    continue
                found = state_dict["state"][key]
                states[key] = {n: x for n, x in found.items() if n in lent and self._is_new(x)}
        return {**state_dict, "param_groups": groups, "state": states}

    def _is_new(self, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return not isinstance(value, _Mark)
        lent, version = self._versions.get(id(value), (None, 0))
        # Written into, where it is the one that was handed out.
        return value is not lent or _version(value) != version


def _of_another(form: str | None, kept_otherwise: bool) -> str:
    if form is not None and not kept_otherwise:
        return (
            f"the checkpoint is one of an optimizer with another {form}, completed by this one's:"
            f" make this one with the {form} of the optimizer that saved it"
        )
    return (
        "the checkpoint is one of an optimizer that keeps its states otherwise (state_dtype,"
        f" master, rounding{'' if form is None else f', {form}'}), or in rows that are cut"
        " elsewhere, completed by this one's: make this one with the options of the optimizer that"
        " saved it, or load the file as docs/checkpoints.md says of other formats"
    )


def _copied(entry: tuple[str, Any]) -> tuple[str, Any]:
    name, value = entry
    return name, value.detach().clone() if isinstance(value, Tensor) else value


def _version(tensor: Any) -> int:
    # Torch writes into what lies in this process' memory.
    local = getattr(tensor, "_local_tensor", tensor)
    return int(local._version)


def _marked(value: Any) -> Any:
    """Replace what a container holds, whose form torch completes entry by entry."""
    if isinstance(value, Mapping):
        # What is put aside has no entries, and stays what it is.
        return {key: _marked(x) for key, x in value.items()} if value else value
    if isinstance(value, (list, tuple)):
        return type(value)(map(_marked, value))
    return _Mark()


def _has_mark(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_mark, value.values()))
    return any(map(_has_mark, value)) if isinstance(value, (list, tuple)) else type(value) is _Mark
