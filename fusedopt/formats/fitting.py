"""States of an optimizer brought to the formats of its groups, as these are now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .convert import fit, is_compressed
from .group import format_of


def fit_states(
    optimizer: Any,
    params: Sequence[Tensor],
    group_of: Sequence[int],
    describe: Callable[[Any, Tensor], str],
) -> None:
    """Bring the states of parameters to the formats of their groups, in place.

    Args:
        optimizer: whose states.
        params: the parameters.
        group_of: for each, the index of its group.
        describe: names a parameter, for messages.

    Raises:
        ValueError: for codes without scales, or scales of another shape.
    """
    if not optimizer.state:
        return
    rule = optimizer.rule
    formats = [format_of(rule, group) for group in optimizer.param_groups]
    kinds: dict[tuple[Any, ...], bool] = {}
    for p, index in zip(params, group_of, strict=True):
        state = optimizer.state.get(p)
        if type(state) is not dict:
            continue
        kind = tuple(state)
        if kind not in kinds:
            kinds[kind] = is_compressed(state)
        if kinds[kind] or not formats[index].is_plain:
            try:
                fit(p, state, formats[index], rule)
            except ValueError as error:
                raise ValueError(f"{describe(optimizer, p)}: {error}") from None
