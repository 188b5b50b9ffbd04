"""What is gathered for all parameters of a model, and how many samples it is of."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...memory.storage import local_tensors
from ...tracing import untraced
from ..replicas import Averages
from . import causes
from .across import Totals, add_up, count
from .managed import Managed, managed
from .record import Record, follow, look_at_shards, measure, settle_deviations
from .sample_count import SampleCount


class Records:
    """The records of a model's parameters.

    Args:
        model: whose they are.
        unknown: says why a parameter has none.
    """

    def __init__(self, model: nn.Module, unknown: Callable[[Tensor], str]) -> None:
        self._unknown = unknown
        # What processes the last gradients were added up over, by the caller.
        self._given: tuple[Any, ...] = ()
        # Samples of all backward passes there have been.
        self._total = 0
        self._averages = Averages(model)
        self._lock = threading.RLock()
        # What has arrived, by backward pass: one that failed never comes to its end, and one within
        # another (reentrant checkpoints) has an end of its own.
        self._arrived: dict[int, list[Record]] = {}
        # Whether the model has been called since gradients were last reduced into shards.
        self._called = False
        # Shards whose gradients have been reduced in the backward pass under way.
        self._reduced: list[Record] = []
        found = managed(model)
        self._of = {
            id(p): self._record(p, n, found.get(id(p))) for n, p in model.named_parameters()
        }
        # Of shards by the whole parameters, which are made later.
        self._of_leaf: dict[int, Record] = {}

    def _record(self, parameter: Tensor, name: str, known: Managed | None) -> Record:
        if known is None:
            return Record(parameter, name, self._commit)
        # Imports what a torch without distributed lacks.
        from .sharded import ShardedRecord

        expects = partial(getattr, self, "_called")
        return ShardedRecord(parameter, name, self._commit, known, expects, self._is_reduced)

    def __iter__(self) -> Iterator[Record]:
        """Go through all of them, whether or not anything was gathered."""
        return iter(self._of.values())

    def of(self, parameter: Tensor) -> Record:
        """Return where a parameter's squares are gathered; raise RuntimeError if it is unknown."""
        record = self._of.get(id(parameter)) or self._of_leaf.get(id(parameter))
        if record is not None and record.leaf is parameter:
            return record
        self._of_leaf = {id(r.leaf): r for r in self if r.mesh is not None}
        record = self._of_leaf.get(id(parameter))
        if record is None or record.leaf is not parameter:
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
        if record is None or (record.squares is None and record.due):
            return 0
        return record.reduced() + self._total - record.start

    def count_everywhere(self, parameters: Iterable[Tensor]) -> int:
        """Return how many samples all processes have seen, where there are no squares.

        Raises:
            RuntimeError: where it is not known which processes, or parameters have seen others.
        """
        found = {self.count_of(p) for p in parameters}
        groups = self._groups()
        if len(found) != 1 or not groups:
            raise RuntimeError(causes.NOT_ADDED_UP if not groups else causes.NOT_ALIKE)
        totals = Totals(list(found), next(iter(self)).parameter.device)
        for group in groups:
            totals.add_up(group)
        return totals.after(_nothing, 0)()

    def _groups(self) -> tuple[Any, ...]:
        """Return the process groups, one after the other, that gradients are averaged over."""
        mesh = next((r.mesh for r in self if r.mesh is not None), None)
        if mesh is not None:
            return tuple(mesh.get_group(dim) for dim in range(mesh.ndim))
        return self._given or self._averages.groups()

    def follow_changes(self, parameters: Iterable[Tensor]) -> None:
        """Bring what is known of gradients up to date with what was done to them since."""
        parameters = list(parameters)
        known = self._known(parameters)
        if 0 < len(known) < len(parameters):
            # Layers that this step does not use, behind zero_grad(set_to_none=False).
            for p in parameters:
                if id(p) in self._of:
                    self._of[id(p)].take_zero(known[0])
        settle_deviations(known)
        look_at_shards(known)
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
                local_tensors([record.squares])[0].mul_(factor**2)
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
                self._count_call(call, record)
            base = calls[0].base
            if record.restarts and base is not None:
                record.reset(base)
            backward = torch._C._current_graph_task_id()
            if backward not in self._arrived:
                self._arrived[backward] = []
                engine = torch.autograd.Variable._execution_engine
                engine.queue_callback(partial(self._measure, backward))  # type: ignore[attr-defined]
            self._arrived[backward].append(record)

    def reach(self, call: SampleCount) -> None:
        """Count the samples of a call that a backward pass has reached, if they were not yet."""
        with self._lock:
            self._count_call(call, None)

    def _count_call(self, call: SampleCount, arriving: Record | None) -> None:
        if call.base is None:
            call.base = self._total
            self._total += call.samples.count
            self._restart(arriving, call.base)

    def begin(self) -> None:
        """Forget what belongs to gradients that are gone, none of which need be looked at."""
        if all(r.parameter.grad is None and r.mesh is None and r.squares is None for r in self):
            self.reset(None)

    @untraced
    def _measure(self, backward: int) -> None:
        """Run at the end of a backward pass: see ``factors``."""
        with self._lock:
            # Shards are measured where they are counted.
            arrived = [r for r in self._arrived.pop(backward) if r.mesh is None]
        if not self._averages.expected:
            measure(arrived)
            return
        # What DistributedDataParallel has queued since goes first.
        engine = torch.autograd.Variable._execution_engine
        engine.queue_callback(partial(self._average, arrived))  # type: ignore[attr-defined]

    def _is_reduced(self, record: Record) -> None:
        """Note a shard whose squares have been added up over processes."""
        self._reduced.append(record)
        if len(self._reduced) == 1:
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._count)  # type: ignore[attr-defined]

    @torch.no_grad()
    def _count(self) -> None:
        """Run at the end of a backward pass that has reduced gradients into shards."""
        reduced, self._reduced, self._called = self._reduced, [], False
        meshes = {r.mesh: None for r in reduced}
        for mesh in meshes:
            own = [r for r in self if r.mesh == mesh and r.is_to_be_counted()]
            count(own, self._total, mesh)
            measure(own)

    @torch.no_grad()
    def _average(self, arrived: list[Record]) -> None:
        """Add up squares of gradients that have been averaged since they arrived."""
        changed = {id(r): r for r in arrived}
        for module in self._averages.finished(within=bool(self._arrived)):
            own = set(map(id, module._module_parameters))
            records = [r for r in self if id(r.parameter) in own]
            changed |= {id(r): r for r in self._add_up(records, module.process_group)}
        measure(changed.values())

    def _restart(self, arriving: Record | None, start: int) -> None:
        """Forget what belongs to gradients that were set to None or zero."""
        others = [r for r in self if r is not arriving]
        cleared = [r for r in others if r.is_cleared()]
        if cleared or (arriving is not None and arriving.restarts):
            # What has nothing yet belongs to the batch that now begins.
            for r in (*cleared, *(r for r in self if r.squares is None)):
                # Gradients of others that are not looked at may be of this batch.
                if r.due or r.parameter.grad is None or r in cleared:
                    r.reset(start)

    def called(self) -> None:
        """Note a call of the model, in the midst of which this is."""
        self._called = True
        self._averages.called()
        # What is added now would hide it.
        cleared = look_at_shards(self)
        if cleared:
            self.reset([r.parameter for r in cleared], zero=True)

    @torch.no_grad()
    def all_reduce(self, group: Any) -> None:
        """Add up the squares of all processes, whose gradients have been averaged."""
        self._given = (group,)
        measure(self._add_up(list(self), group))

    def _add_up(self, records: Sequence[Record], group: Any) -> Sequence[Record]:
        # The same parameters in the same order everywhere, whichever of them were used here.
        records = [r for r in records if r.parameter.requires_grad and r.mesh is None and r.due]
        if all(r.is_shared for r in records):
            return []
        add_up(records, self._total, group)
        return records

    def divisor(self) -> float:
        """Return what the sum over processes of their gradients was divided by.

        Raises:
            RuntimeError: where it is not the same for all.
        """
        found = {r.divisor for r in self.gathered() if r.divisor is not None}
        if len(found) > 1:
            raise RuntimeError(
                f"gradients of parameters were divided by {sorted(found)} when processes reduced"
                " them, so that with loss_reduction='sum' they are of several losses: give"
                " set_gradient_divide_factor() one number for all modules"
            )
        return found.pop() if found else 1.0

    def check_ranks(self) -> None:
        """Raise RuntimeError where squares of several processes are to be added up first."""
        for record in self.gathered():
            if record.mesh is not None and record.local:
                raise RuntimeError(causes.not_reduced(record.name))
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        if distributed.get_world_size() > 1 and not all(r.is_shared for r in self.gathered()):
            raise RuntimeError(self._averages.problem or causes.NOT_ADDED_UP)


def _nothing() -> int:
    return 0
