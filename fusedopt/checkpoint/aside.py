"""Options of fusedopt's own in a saved group, which torch's files do not have.

Distributed checkpoint demands every entry of the loading optimizer's from the file. Options of
fusedopt alone are therefore saved aside: under their name stands an empty ``OrderedDict`` that
carries the value as an attribute. ``torch.save`` (also for ``weights_only=True``), pickle and
``copy.deepcopy`` keep it; distributed checkpoint, which flattens containers, finds nothing to
write, and asks for nothing. What it leaves out stays what the constructor was given, on every rank
alike.

An option that decides what the states mean must not be left out. ``claim`` makes distributed
checkpoint ask for it, and keeps it from finding what torch's optimizer would ask for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from ..completion import TORCHS

Group = dict[str, Any]
# Neither is absent: None is a value of some options.
ABSENT = object()
_CLAIM = "form"


def put_aside(group: Group, names: Iterable[str]) -> None:
    """Replace options of a saved group, in place, by empty containers that carry them."""
    for name in names:
        # What is put aside for one reason is not to be again for another.
        if name in group and not is_carrier(group[name]):
            group[name] = _carrier(group[name])


def _carrier(value: Any) -> OrderedDict[str, Any]:
    carrier: OrderedDict[str, Any] = OrderedDict()
    carrier.value = value  # type: ignore[attr-defined]
    return carrier


def is_carrier(value: Any) -> bool:
    """Whether a value of a saved group is one that was put aside."""
    return isinstance(value, OrderedDict) and hasattr(value, "value")


def carried(value: Any) -> Any:
    """Return what was saved, plainly or aside, or ``ABSENT`` where distributed checkpoint was."""
    if isinstance(value, Mapping):
        if not value:
            return getattr(value, "value", ABSENT)
        if value.keys() == {_CLAIM}:
            return value[_CLAIM]
    return value


def claim(group: Group, name: str) -> None:
    """Make a saved group one for optimizers with this option alone, in place.

    Distributed checkpoint then refuses a file without the option, and refuses this group's file for
    an optimizer that has torch's entries: either way a key is missing.
    """
    group[name] = {_CLAIM: carried(group[name])}
    put_aside(group, [TORCHS])


def saved_form(group: Mapping[str, Any], name: str) -> Any:
    """Return an option that decides what the states of a saved group mean; None where it is not.

    Raises:
        ValueError: for a group that was put together of two, as torch completes full state dicts by
            what the loading optimizer has.
    """
    value = group.get(name, ABSENT)
    claimed = isinstance(value, Mapping) and bool(value)
    if claimed and not isinstance(group.get(TORCHS, {}), Mapping):
        raise ValueError(
            f"the checkpoint is one of an optimizer with another {name}, completed by this one's:"
            f" make this one with the {name} of the optimizer that saved it"
        )
    form = carried(value)
    return None if form is ABSENT else form
