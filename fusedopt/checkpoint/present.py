"""What was there of each state when it was last looked at, so that what is lost is missed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .complete import Place, beside, check_complete


def check_present(
    optimizer: Any,
    parameters: Iterable[Tensor],
    group_of: Iterable[int],
    present: Present,
) -> None:
    """Raise before a step for a state that is partly there.

    Args:
        optimizer: that is to step.
        parameters: that take part.
        group_of: for each, the index of its group.
        present: what was there when it was last looked at.

    Raises:
        IncompleteState: naming the parameter and the key.
        ValueError: for a step count that is no number.
    """
    if not optimizer.state:
        return
    # Not what an option switched on since asks for: that starts at zero, unless it was there.
    rule = optimizer.rule
    # A rule of a user's own need not have examples.
    groups = rule.example_groups or optimizer.param_groups
    base = set.intersection(*(set(rule.states(group)) for group in groups))
    names_of = [rule.states(group) for group in optimizer.param_groups]
    besides_of = [beside(rule, group) for group in optimizer.param_groups]
    for p, index in zip(parameters, group_of, strict=True):
        if p in optimizer.state:
            was = present.names(p)
            names = [name for name in names_of[index] if name in base or name in was]
            besides = [name for name in besides_of[index] if name in was]
            check_complete(rule, names, besides, optimizer.state[p], Place(optimizer, p))


class Present:
    """Which entries that its options ask for the state of each parameter had when last looked at.

    What is missing later, though its option is still on, was taken away in between.
    """

    def __init__(self) -> None:
        self._names: dict[Tensor, frozenset[str]] = {}
        self._noted: list[tuple[list[Tensor], list[tuple[str, ...]], list[int]]] = []

    def names(self, p: Tensor) -> frozenset[str]:
        """Return the entries of a parameter's state."""
        for params, names_of, group_of in self._noted:
            sets = list(map(frozenset, names_of))
            self._names.update(zip(params, [sets[index] for index in group_of], strict=True))
        self._noted.clear()
        return self._names.get(p, frozenset())

    def note(
        self, params: list[Tensor], names_of: list[tuple[str, ...]], group_of: list[int]
    ) -> None:
        """Note that the states of parameters have all that their groups ask for.

        Looked through when asked for, which is seldom: hashing a tensor is a call into Python.

        Args:
            params: the parameters.
            names_of: for each group, the entries.
            group_of: for each parameter, the index of its group.
        """
        self._noted.append((params, names_of, group_of))

    def forget(self, p: Tensor, names: Iterable[str]) -> None:
        """Leave out entries of a parameter's state."""
        self._names[p] = self.names(p) - set(names)

    def look(self, optimizer: Any) -> None:
        """Look at all states; one that has lost an entry need not have stepped since."""
        found: dict[Tensor, frozenset[str]] = {}
        for group in optimizer.param_groups:
            names = frozenset(optimizer.rule.states(group))
            besides = frozenset(beside(optimizer.rule, group))
            for p in group["params"] if isinstance(group["params"], (list, tuple)) else ():
                state = optimizer.state.get(p)
                if isinstance(state, Mapping) and state:
                    old = self.names(p)
                    there = {n for n in names | besides if state.get(n) is not None}
                    # A checkpoint may be one of torch's, without what is beside the parameter.
                    found[p] = frozenset(there | (names & old))
        self._names = found
