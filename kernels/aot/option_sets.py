"""Every set of compile-time options that a rule can have, for compilation ahead of time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from ..rule import Group, Rule

# Combinations of hyper-parameters that are tried for one rule, at most.
MAX_COMBINATIONS = 1 << 14


def option_sets(rule: Rule) -> list[Group]:
    """Hyper-parameters for every set of compile-time options and states that a rule can have.

    They are combinations of what the rule's example groups hold, since these need not show every
    set: a centred RMSprop with momentum and another denominator is one of them.
    """
    found: dict[Any, Group] = {}
    # Examples first: of a set that they show, theirs is the group that is known to work.
    for group in rule.example_groups:
        found.setdefault(_options_and_states(rule, group), group)
    for group in _combinations(rule.example_groups):
        try:
            own = _options_and_states(rule, group)
            rule.coefficients(group, 1)
        except Exception:  # noqa: BLE001 - a combination that the rule refuses, however
            continue
        found.setdefault(own, group)
    return list(found.values())


def _options_and_states(rule: Rule, group: Group) -> tuple[tuple[bool, ...], int]:
    return rule.options(group), len(rule.states(group))


def _combinations(groups: Sequence[Group]) -> Iterator[Group]:
    values: dict[str, list[Any]] = {}
    for group in groups:
        for name, value in group.items():
            known = values.setdefault(name, [])
            if value not in known:
                known.append(value)
    for chosen in itertools.islice(itertools.product(*values.values()), MAX_COMBINATIONS):
        yield dict(zip(values, chosen, strict=True))
