"""Groups of a checkpoint: completed by the optimizer's own options, and checked."""

from __future__ import annotations

from typing import Any

from ..completion import TORCHS
from ..step.options import check_numbers
from .aside import ABSENT, Group, carried, is_carrier
from .complete import IncompleteState

# How apex and deepspeed spell ``bias_correction``.
_SWITCH = {True: "adam", False: None}


def complete_groups(optimizer: Any, groups: list[Group]) -> None:
    """Give saved groups the optimizer's own options where they lack them, and check the groups."""
    for index, (saved, group) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        for name in {*optimizer.choices, *optimizer.extra_options, TORCHS}:
            value = carried(saved.get(name, ABSENT))
            if value is not ABSENT:
                saved[name] = value
            elif name in group:
                saved[name] = group[name]
            else:
                saved.pop(name, None)
        for name in [n for n, value in saved.items() if is_carrier(value)]:
            # An option of another class of ours, which torch's would not look at either.
            del saved[name]
        allowed = optimizer.choices.get("bias_correction", ())
        if "adam" in allowed and isinstance(saved["bias_correction"], bool):
            saved["bias_correction"] = _SWITCH[saved["bias_correction"]]
        missing = [n for n in optimizer.rule.hyper if n in optimizer.defaults and n not in saved]
        if missing:
            raise IncompleteState(
                f"param_groups[{index}] of the checkpoint has no {missing[0]!r}, so it is not"
                f" one of {type(optimizer).__name__}: load it into the optimizer that saved it,"
                " or fill in what is missing"
            )
    # Of all groups: numbers that are put aside have to be back in each.
    check_numbers(optimizer, groups, " of the checkpoint")
    for saved in groups:
        # A checkpoint may be older than an option of torch's, too.
        optimizer.check_group({**optimizer.defaults, **saved})
