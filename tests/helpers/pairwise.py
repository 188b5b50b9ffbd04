"""Covering arrays: few cases in which each pair of values of any two factors meets."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairs_of(case: Case) -> set[Pair]:
    """The pairs of factors with their values that meet in a case, perhaps of a part of them."""
    return set(itertools.combinations(sorted(case.items(), key=lambda item: item[0]), 2))


def covering(
    factors: Mapping[str, Sequence[Any]], sound: Callable[[Case], bool], seed: int = 0
) -> list[Case]:
    """Choose cases so that every pair that any sound case has is in one of them.

    Greedily: each begins with a pair that is missing, and takes for one factor after another the
    value that adds most pairs.

    Args:
        factors: values by name.
        sound: whether a case, perhaps of a part of the factors, may be completed to one.
        seed: of the order in which factors are filled in.
    """
    draw = random.Random(seed)
    names = list(factors)
    missing = []
    for a, b in itertools.combinations(sorted(names), 2):
        for x, y in itertools.product(factors[a], factors[b]):
            if sound({a: x, b: y}):
                missing.append(((a, x), (b, y)))
    left, cases = dict.fromkeys(missing), []
    while left:
        first = next(iter(left))
        case = _complete(dict(first), factors, sound, left, draw)
        if case is None:
            # No case has it.
            del left[first]
            continue
        cases.append(case)
        for pair in pairs_of(case):
            left.pop(pair, None)
    return cases


def _complete(
    case: Case,
    factors: Mapping[str, Sequence[Any]],
    sound: Callable[[Case], bool],
    left: Mapping[Pair, None],
    draw: random.Random,
) -> Case | None:
    open_ = [name for name in factors if name not in case]
    if not open_:
        return case
    name = draw.choice(open_)
    values = [value for value in factors[name] if sound({**case, name: value})]
    draw.shuffle(values)
    values.sort(key=lambda value: -sum(p in left for p in pairs_of({**case, name: value})))
    for value in values:
        found = _complete({**case, name: value}, factors, sound, left, draw)
        if found is not None:
            return found
    return None
