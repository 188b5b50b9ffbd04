"""What is gathered for all parameters of a model, and how many samples it is of."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...memory.dtypes import compute_dtype
from ...tracing import untraced
from .record import Record, follow, measure, settle_deviations
from .sample_count import SampleCount


class Records:
    """The records of a model's parameters.

    Args:
        model: whose they are.
        unknown: says why a parameter has none.

    Attributes:
        ranks: over how many processes squares have been added up.
    """

    def __init__(self, model: nn.Module, unknown: Callable[[Tensor], str]) -> None:
        self._unknown = unknown
        # Samples of all backward passes there have been.
        self._total = 0
        self.ranks = 1
        self._lock = threading.RLock()
        # What has arrived, by backward pass: one that failed never comes to its end, and one within
        # another (reentrant checkpoints) has an end of its own.
        self._arrived: dict[int, list[Record]] = {}
        self._of = {id(p): Record(p, name, self._commit) for name, p in model.named_parameters()}

    def __iter__(self) -> Iterator[Record]:
        """Go through all of them, whether or not anything was gathered."""
        return iter(self._of.values())

    def of(self, parameter: Tensor) -> Record:
        """Return where a parameter's squares are gathered; raise RuntimeError if it is unknown."""
        record = self._of.get(id(parameter))
        if record is None:
            raise RuntimeError(self._unknown(parameter))
        return record

    def find(self, parameter: Tensor) -> Record | None:
        """Return a parameter's record; a gradient that has just arrived is counted."""
        record = self._of.get(id(parameter))
        if record is not None:
            record.settle()
        return record

    def gathered(self) -> list[Record]:
        """List those that something was gathered for."""
        return [r for r in self if r.squares is not None]

    def count_of(self, parameter: Tensor) -> int:
        """Return how many samples were gathered for a parameter."""
        record = self.find(parameter)
        if record is None or record.squares is None:
            return 0
        return record.reduced_count or self._total - record.start

    def follow_changes(self, parameters: Iterable[Tensor]) -> None:
        """Bring what is known of gradients up to date with what was done to them since."""
        parameters = list(parameters)
        known = self._known(parameters)
        if 0 < len(known) < len(parameters):
            # Layers that this step does not use, behind zero_grad(set_to_none=False).
            for p in parameters:
                if id(p) in self._of:
                    self._of[id(p)].take_zero(known[0].start)
        settle_deviations(known)
        # One factor on all gradients of the step; of some alone is more likely to be a mistake.
        if known and all(r.is_changed() for r in known):
            follow(known)

    def follow(self, parameters: Iterable[Tensor]) -> bool:
        """Follow one factor on all gradients, whether or not autograd knows of it."""
        return follow(self._known(parameters))

    def _known(self, parameters: Iterable[Tensor]) -> list[Record]:
        found = [self.find(p) for p in parameters]
        return [r for r in found if r is not None and r.squares is not None]

    def rescale(self, factor: float | Tensor) -> None:
        """Multiply all squares by the square of a factor, and take the gradients as they are."""
        for record in self:
            record.accept()
            record.altered = False
            if record.squares is not None:
                record.squares.mul_(factor**2)
        measure(self)

    def reset(self, parameters: Sequence[Tensor] | None, zero: bool = False) -> None:
        """Forget what was gathered.

        Args:
            parameters: for which; None for all.
            zero: whether their gradients are None or zero.
        """
        for key in list(self._of) if parameters is None else map(id, parameters):
            record = self._of.get(key)
            if record is not None:
                record.settle()
                record.reset(self._total)
                if zero:
                    record.cleared()

    def used(self, parameters: Iterable[Tensor]) -> None:
        """Note that a step has used what was gathered for some parameters."""
        for p in parameters:
            self._of[id(p)].stepped()

    def remove(self) -> None:
        """Take the hooks off the parameters."""
        for record in self:
            record.remove()

    def _commit(self, record: Record, calls: list[SampleCount]) -> None:
        """Count the samples of calls whose first gradients arrive, and see what was cleared."""
        # Backward runs on a thread for each device.
        with self._lock:
            for call in calls:
                if call.base is None:
                    call.base = self._total
                    self._total += call.samples.count
                    self._restart(record, call.base)
            base = calls[0].base
            if record.restarts and base is not None:
                record.reset(base)
            backward = torch._C._current_graph_task_id()
            if backward not in self._arrived:
                self._arrived[backward] = []
                engine = torch.autograd.Variable._execution_engine
                engine.queue_callback(partial(self._measure, backward))  # type: ignore[attr-defined]
            self._arrived[backward].append(record)

    @untraced
    def _measure(self, backward: int) -> None:
        """Run at the end of a backward pass: see ``factors``."""
        with self._lock:
            arrived = self._arrived.pop(backward)
        measure(arrived)

    def _restart(self, arriving: Record, start: int) -> None:
        """Forget what belongs to gradients that were set to None or zero."""
        others = [r for r in self if r is not arriving]
        cleared = [r for r in others if r.is_cleared()]
        if any(r.reduced_count and r not in cleared for r in others):
            raise RuntimeError("backward after all_reduce(): call optimizer.step() and zero_grad()")
        if cleared or arriving.restarts:
            # What has nothing yet belongs to the batch that now begins.
            for r in (*cleared, *(r for r in self if r.squares is None)):
                r.reset(start)

    @torch.no_grad()
    def all_reduce(self, group: Any) -> None:
        """Add up the squares of all processes, whose gradients have been averaged."""
        distributed = torch.distributed
        ranks = self.ranks = distributed.get_world_size(group)
        # The same parameters in the same order everywhere, whichever of them were used here.
        records = [r for r in self if r.parameter.requires_grad]
        # Done already, or nothing is trained.
        if all(r.reduced_count for r in records):
            return
        counts = torch.tensor([self._total - r.start for r in records], dtype=torch.int64)
        counts = counts.to(records[0].parameter.device)
        distributed.all_reduce(counts, group=group)
        for record, count in zip(records, counts.tolist(), strict=True):
            if record.squares is None:
                dtype = compute_dtype([record.parameter.dtype])
                record.squares = torch.zeros_like(record.parameter, dtype=dtype)
            distributed.all_reduce(record.squares, group=group)
            record.squares.div_(ranks**2)
            record.reduced_count = count
            # The processes' gradients have been averaged in place.
            record.accept()
        measure(records)

    def check_ranks(self) -> None:
        """Raise RuntimeError where squares of several processes are to be added up first."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        reduced = all(r.reduced_count for r in self.gathered())
        if distributed.get_world_size() > 1 and not reduced:
            raise RuntimeError(
                "there are several processes, and each has seen its own samples alone: call"
                " statistics.all_reduce() between backward and step()"
            )
