"""Parameter groups that are given new hyper-parameters in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

Groups = Sequence[dict[str, Any]]

_WRITTEN = ("lr", "initial_lr", "alpha", "momentum", "eps", "weight_decay")


def check_tensors(groups: Groups, scaled: Groups) -> None:
    """Raise ValueError for tensors of the groups that cannot be given their new values."""
    values: dict[int, float] = {}
    for name, old, new in _tensors(groups, scaled):
        value = float(new)
        if values.setdefault(id(old), value) != value:
            if name in ("lr", "initial_lr"):
                sharers = "groups of different momentum share one lr tensor"
            else:
                sharers = f"{name} and another entry of the groups share one tensor"
            raise ValueError(
                f"{sharers}, and need different values of it: give each group a tensor of its own"
            )
        if not old.is_floating_point() and not value.is_integer():
            raise ValueError(f"{name} is a tensor of type {old.dtype}, which cannot hold {value}")


def _tensors(groups: Groups, scaled: Groups) -> Iterator[tuple[str, Tensor, Any]]:
    """Yield the tensors that will be written, and what to."""
    for group, new in zip(groups, scaled, strict=True):
        entries = [(name, group[name], new[name]) for name in _WRITTEN if name in group]
        if "betas" in group and new["betas"] is not group["betas"]:
            pairs = zip(group["betas"], new["betas"], strict=True)
            entries += [("betas", *pair) for pair in pairs]
        yield from (entry for entry in entries if isinstance(entry[1], Tensor))


def write(groups: Groups, scaled: Groups) -> None:
    """Write the new hyper-parameters, into the tensors that hold the old ones."""
    for group, new in zip(groups, scaled, strict=True):
        for name in _WRITTEN:
            if name in group:
                group[name] = _written(group[name], new[name])
        if "betas" in group and new["betas"] is not group["betas"]:
            pairs = zip(group["betas"], new["betas"], strict=True)
            group["betas"] = tuple(_written(old, value) for old, value in pairs)


def hand_down(groups: Groups, inner: Groups) -> None:
    """Give the groups of a wrapped optimizer what the wrapper's have.

    A wrapper does it at its next step; whoever reads them before finds them as they will be.
    """
    for group, below in zip(groups, inner, strict=False):
        below.update({name: group[name] for name in (*_WRITTEN, "betas") if name in group})


def _written(old: Any, new: Any) -> Any:
    """Return the new value, in the old tensor if it is one: others may hold on to that."""
    if isinstance(old, Tensor):
        return old.copy_(new)
    return new
