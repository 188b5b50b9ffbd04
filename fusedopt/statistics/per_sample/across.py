"""Squares of several processes, added up as their gradients are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed

from .record import Record


def add_up(records: Sequence[Record], seen: int, group: Any) -> None:
    """Add up the squares of all processes, whose gradients have been averaged.

    With R processes a sample's contribution to the average is its local one over R.

    Args:
        records: of the same parameters in the same order everywhere.
        seen: how many samples this process has seen.
        group: the process group; None for the default one.

    Raises:
        RuntimeError: where some were added up over another number of processes.
    """
    ranks = distributed.get_world_size(group)
    for record in records:
        if record.divisor not in (None, ranks):
            raise RuntimeError(
                f"the squares of {record.name!r} were added up over {record.divisor:g} processes,"
                f" and now are to be over {ranks}: give all_reduce() the group that gradients are"
                " averaged over"
            )
    device = records[0].parameter.device
    pending: list[Any] = []
    for record in records:
        record.to_share()
        if record.squares is None:
            record.squares = record.zeros()
        # Processes may have made them in other layouts, and what is added up is memory.
        record.squares = record.squares.contiguous()
        pending.append(distributed.all_reduce(record.squares, group=group, async_op=True))
    totals = Totals([seen - r.start for r in records], device)
    totals.add_up(group)
    for work in pending:
        work.wait()
    for index, record in enumerate(records):
        assert record.squares is not None
        record.squares.div_(ranks**2)
        record.share(totals.after(record.reduced, index), ranks, seen)


def count(records: Sequence[Record], seen: int, mesh: Any) -> None:
    """Count the samples of all processes, whose squares have been added up into shards.

    Args:
        records: of the same parameters in the same order everywhere.
        seen: how many samples this process has seen.
        mesh: the processes.
    """
    device = torch.device(mesh.device_type)
    totals = Totals([seen - r.start for r in records], device)
    for dim in range(mesh.ndim):
        totals.add_up(mesh.get_group(dim))
    for index, record in enumerate(records):
        reduced = totals.after(record.reduced, index)
        if record.divisor is not None and not record.local:
            record.share(reduced, record.divisor, seen)
        else:
            # No sample has used it, or this is a backward pass within the one that reduces it.
            record.reduced, record.start = reduced, seen


class Totals:
    """Numbers of samples, added up over processes, which nobody waits for before they are read.

    Args:
        counts: this process' own.
        device: where they are added up.
    """

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        self._counts: Tensor | list[int] = torch.tensor(counts, dtype=torch.int64).to(device)

    def add_up(self, group: Any) -> None:
        """Add up the numbers of the processes of a group."""
        distributed.all_reduce(self._counts, group=group)

    def after(self, before: Callable[[], int], index: int) -> Callable[[], int]:
        """Return what reads one number, added to what there was before."""
        return partial(self._sum, before, index)

    def _sum(self, before: Callable[[], int], index: int) -> int:
        if isinstance(self._counts, Tensor):
            self._counts = self._counts.tolist()
        return before() + self._counts[index]
