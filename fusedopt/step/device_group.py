"""The tensors of one device, with what they need at every step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..backends import Coefficients, Entries, Inputs, coefficients_on, prepare
from ..coefficients import Groups, HostTable, LiveTable, Table
from ..kernels.rule import Rule
from ..memory.streams import Readers, readers
from .counts import State, StepCounter, new_step
from .scale import GradScale


class DeviceGroup:
    """Entries of one device whose step counts are kept in the same place.

    Args:
        rule: the update.
        backend: name of a backend, as chosen by ``fusedopt.backends.choose``.
        device: where the tensors live.
        on_device: whether step counts and hyper-parameters are kept on the device.
        entries: what to update; positions count within the group.
        apart: whether no two of the tensors reach into each other's memory.
        states: the parameters' state dictionaries.
        group_of: for each entry, the index of its parameter group.
        groups: all parameter groups.
        fresh: for each entry, whether its state was created just now.
        scale: what launches read besides coefficients.
        weights: for each entry, what its part of the norm over several processes counts; None for
            1 each.
        measures: whether some steps are measured.
    """

    def __init__(
        self,
        rule: Rule,
        backend: str,
        device: torch.device,
        on_device: bool,
        entries: Sequence[Entries],
        apart: bool,
        states: Sequence[State],
        group_of: list[int],
        groups: Groups,
        fresh: Sequence[bool],
        scale: GradScale,
        weights: Sequence[float] | None = None,
        measures: bool = False,
    ) -> None:
        self.rule = rule
        self.device = device
        self.on_device = on_device
        self.executor = prepare(backend, rule, device, entries, apart, measures)
        self.scale = scale
        self.norm_weights: Tensor | None = None
        if weights is not None and any(weight != 1.0 for weight in weights):
            self.norm_weights = self.executor.norm_weights(weights)
        self._readers = readers(device)
        # The user's tensor for the norm, and who has written it.
        self._norm: tuple[Tensor, Readers | None] | None = None
        self.counter: StepCounter | None = None
        # Whether what is stored depends on the step, and so has to be told it.
        counts = any(own.format.counts for own in entries)
        averages = any(own.format.average for own in entries)
        if rule.counts_steps or counts:
            # Of a group that keeps no counts beside one that does, they are counted all the same.
            counted = [own if "step" in own else {"step": new_step()} for own in states]
            self.counter = StepCounter(
                counted, device if on_device else torch.device("cpu"), on_device
            )
        # Where a rule counts none, 1 is the step that creates the state, 2 any later one.
        self._stages = [1.0 if new else 2.0 for new in fresh]
        self._partitioned = False
        self.table: Table
        self._coefficients: Coefficients | None = None
        if on_device:
            self.table = LiveTable(rule, device, group_of, groups, counts, averages)
            self.table.steps.copy_(torch.tensor(self._stages, dtype=torch.float64, device="cpu"))
            own_counts = () if self.counter is None else self.counter.steps
            self._coefficients = coefficients_on(backend, self.table, own_counts)
        else:
            wide = _are_wide(entries, len(group_of))
            self.table = HostTable(rule, device, group_of, wide, counts, averages)

    def owns_steps(self) -> bool:
        """Whether nobody has replaced the step counts."""
        return self.counter is None or self.counter.owned()

    def prepare(self, groups: Groups) -> None:
        """Read the hyper-parameters. This may raise; nothing has changed then."""
        if isinstance(self.table, LiveTable):
            self.table.push(groups)
            return
        # Equal counts stay equal while all advance together; an edit of one shows here.
        if self.counter is not None and not self.counter.as_expected():
            self._partitioned = False
        if not self._partitioned:
            steps: Sequence[float] = self._stages
            counts = None
            if self.counter is not None:
                counts = (self.counter.buffer + 1).tolist()
                self.counter.accept()
                steps = counts if self.rule.counts_steps else steps
            self.table.partition(steps, counts)
        self.table.refresh(groups)

    def step(
        self, inputs: Inputs, groups: Groups, found_inf: Tensor | None, measured: bool = False
    ) -> None:
        """Advance the step counts and update."""
        if self._coefficients is not None:
            self._coefficients.step(groups, self.scale.values)
        else:
            self._count_and_form(groups, found_inf)
        self.executor.update(inputs, self.table, self.scale.values, measured)
        if self._readers is not None:
            self._readers.note(self.memory)
        self._partitioned = True
        if not self.rule.counts_steps and 1.0 in self._stages:
            self._age()

    def _count_and_form(self, groups: Groups, found_inf: Tensor | None) -> None:
        """Count one step more, and form its coefficients where these are not yet."""
        if self.counter is not None:
            self.counter.advance(found_inf)
        if isinstance(self.table, LiveTable):
            if self.counter is not None:
                self.table.count(self.counter.buffer)
            self.table.refresh(groups)
        elif self.counter is not None:
            self.table.advance(self.counter.next_step)

    def _age(self) -> None:
        """What was created has had its first step."""
        self._stages = [2.0] * len(self._stages)
        self._partitioned = False
        if isinstance(self.table, LiveTable):
            self.table.steps.fill_(2.0)

    def note_norm(self, norm: Tensor) -> None:
        """Note that the current stream writes the norm, which the user may let go at any time."""
        if self._norm is None or self._norm[0] is not norm:
            self._norm = norm, readers(self.device)
        by = self._norm[1]
        if by is not None:
            by.note(lambda: (norm,))

    def memory(self) -> Iterator[Tensor]:
        """List what launches read besides parameters, states and inputs; all of it after a step."""
        yield from self.executor.memory()
        yield from self.scale.memory()
        if self.norm_weights is not None:
            yield self.norm_weights
        yield from self.table.memory()
        if self._coefficients is not None:
            yield from self._coefficients.memory()
        if self.counter is not None:
            yield from self.counter.memory()


def _are_wide(entries: Sequence[Entries], count: int) -> list[bool]:
    """For each position, whether its arithmetic is done in float64."""
    wide = [False] * count
    for own in entries:
        if any(torch.float64 in dtypes for dtypes in set(own.dtypes)):
            for position, dtypes in zip(own.positions, own.dtypes, strict=True):
                wide[position] = torch.float64 in dtypes
    return wide
