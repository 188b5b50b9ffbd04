"""The Triton backend: one launch for all tensors that share types and alignment.

Everything that stays the same from step to step is prepared once: the address table, the map
from programs to chunks, staging buffers. A step refreshes the row of gradient addresses where
gradients moved, and launches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..coefficients import Table
from ..kernels import guard, launch_config, multi_tensor, norms, telemetry
from ..kernels import launch as launching
from ..kernels.codecs.format import PLAIN
from ..kernels.codecs.place import GROUP
from ..kernels.launch import TRITON_DTYPES, device_architecture, launch, settle
from ..kernels.per_sample import materialised
from ..kernels.rule import Rule
from ..memory.device import upload
from ..memory.dtypes import compute_dtype
from ..memory.layout import are_apart, byte_range
from ..memory.storage import chained
from .entry import Entries, Inputs
from .operands import BucketKey, Operands


class TritonExecutor:
    """The entries of one device; see ``fusedopt.backends.Executor``.

    Args:
        rule: the update.
        device: where the tensors live.
        entries: what to update.
        apart: whether no two of the tensors are known to reach into each other's memory.
        measures: whether some of the updates are measured.
    """

    def __init__(
        self,
        rule: Rule,
        device: torch.device,
        entries: Sequence[Entries],
        apart: bool,
        measures: bool = False,
    ) -> None:
        self.device = device
        self._count = sum(len(own.params) for own in entries)
        orders = None if apart else _launch_orders(entries)
        buckets = [
            (key, own, rows)
            for own in map(Operands, entries)
            for key, rows in own.rows_by_key(orders).items()
        ]
        buckets.sort(key=lambda bucket: bucket[0].launch_order)
        # As wide as the table is, which all buckets read.
        stride = rule.n_coefficients + any(own.format.average for own in entries)
        stride += any(own.format.counts for own in entries)
        self.buckets = [Bucket(rule, device, *bucket, stride, measures) for bucket in buckets]
        self._partials: Tensor | None = None
        # Sources of copies that a CUDA graph repeats.
        self._captured: list[Tensor] = []

    def move_inputs(self, inputs: Inputs) -> None:
        for bucket in self.buckets:
            bucket.move_inputs(inputs, self._captured)

    def partial_norms(self, inputs: Inputs, inverse_scale: Tensor, infinity_norm: bool) -> Tensor:
        # An even number of float64 for each bucket keeps all of them aligned; a spare one is 0.
        counts = [bucket.norm_programs + bucket.norm_programs % 2 for bucket in self.buckets]
        if self._partials is None:
            size = max(sum(counts), 1)
            self._partials = torch.zeros(size, dtype=torch.float64, device=self.device)
        start = 0
        for bucket, count in zip(self.buckets, counts, strict=True):
            partials = self._partials[start : start + count]
            bucket.partial_norms(inputs, inverse_scale, partials, infinity_norm)
            start += count
        return self._partials

    def norm_weights(self, weights: Sequence[float]) -> Tensor:
        found: list[float] = []
        for bucket in self.buckets:
            found += bucket.norm_weights(weights)
        return torch.tensor(found or [1.0], dtype=torch.float64, device=self.device)

    def clip_factor(
        self,
        partials: Tensor,
        inverse_scale: Tensor,
        max_norm: Tensor,
        control: Tensor,
        norm: Tensor,
        infinity_norm: bool,
    ) -> None:
        launch(
            norms.clip_factor, 1, norms.REDUCE_THREADS, self.device,
            partials, partials.numel(), inverse_scale, max_norm, control, norm,
            **norms.clip_factor_constants(infinity_norm),
        )  # fmt: skip

    def guarded_factor(
        self,
        partials: Tensor,
        inverse_scale: Tensor,
        max_norm: Tensor,
        control: Tensor,
        norm: Tensor,
        infinity_norm: bool,
        record: Tensor,
        min_steps: int,
        scaled: bool,
    ) -> None:
        launch(
            guard.guarded_factor, 1, norms.REDUCE_THREADS, self.device,
            partials, partials.numel(), inverse_scale, max_norm, control, norm,
            record, record.numel() - guard.HEADER, min_steps, int(scaled),
            **guard.guarded_factor_constants(infinity_norm),
        )  # fmt: skip

    def update(self, inputs: Inputs, table: Table, control: Tensor, measured: bool = False) -> None:
        for bucket in self.buckets:
            bucket.update(inputs, table, control, self._captured, measured)

    def squares(self) -> Tensor:
        totals = torch.zeros(self._count, telemetry.COUNT, dtype=torch.float64, device=self.device)
        for bucket in self.buckets:
            if bucket.measured is not None:
                totals[device_vector(bucket.positions, self.device)] = bucket.measured.totals()
        return totals

    def memory(self) -> Iterator[Tensor]:
        if self._partials is not None:
            yield self._partials
        for bucket in self.buckets:
            yield from bucket.memory()

    def release(self) -> None:
        self._captured.clear()


class Bucket:
    """Tensors of one launch: their address table and the map from programs to chunks."""

    def __init__(
        self,
        rule: Rule,
        device: torch.device,
        key: BucketKey,
        operands: Operands,
        rows: Sequence[int],
        stride: int,
        measures: bool,
    ) -> None:
        self.device = device
        self.key = key
        settle(rule.update)
        self.positions = [operands.positions[row] for row in rows]
        self.width = len(rows)
        # For each input, the columns of the table whose tensors go through a buffer.
        self._staged_inputs, self._staged_memory = operands.staged(rows)
        self._numels = [operands.numels[row] for row in rows]
        self._row_of = [0] * self.width
        self._dealt: Sequence[int] | None = None
        addresses = operands.addresses
        if self.width != addresses.shape[1]:
            addresses = addresses[:, _host(list(rows))]
        rows_of = [_host([self._numels, self._row_of]), addresses]
        if key.format.draws:
            rows_of.append(operands.draw_rows(rows, key.rowwise))
        shape = _launch_config(rule, device, key)
        walked = self._numels
        if key.rowwise:
            walked = [GROUP * groups for groups in operands.groups(rows)]
        self.measured: Measured | None = None
        if measures:
            shape = launch_config.measured(shape)
            chunks = [-(-n // shape.block) for n in walked]
            self.measured = Measured(chunks, compute_dtype(key.dtypes), device)
            rows_of.append(self.measured.addresses)
        host_table = torch.cat(rows_of)
        self.table = torch.empty(host_table.shape, dtype=torch.int64, device=device)
        upload(self.table, host_table)
        self._threads = shape.threads
        self.chunk_tensor, self.chunk_index = chunk_map(walked, shape.block, device)
        self._programs = len(self.chunk_tensor)
        self._norm_chunks: tuple[Tensor, Tensor] | None = None
        types = tuple(TRITON_DTYPES[t] for t in key.dtypes)
        kept = key.format, key.rowwise, stride
        self._kernel: Any = multi_tensor.update_tensors
        self._extra: tuple[Tensor, ...] = ()
        if key.counts is None:
            self._meta: dict[str, Any] = multi_tensor.update_constants(
                rule, key.options, types, key.aligned, shape.block, *kept,
                backend=launching.compiler(device),
            )  # fmt: skip
        else:
            # The reduction over samples comes first, in the same kernel.
            self._kernel = materialised.update_from_samples
            self._meta = materialised.update_from_samples_constants(
                rule, key.options, types, len(key.counts), key.aligned, shape.block, *kept
            )
            self._extra = (device_vector(key.counts, device),)
        self._measures = {**self._meta, "MEASURED": len(host_table) - 1} if measures else {}
        self._registers = multi_tensor.register_limit(key.format, measures)

    @cached_property
    def norm_programs(self) -> int:
        """Number of partial norms."""
        return sum(map(norms.partial_count, self._numels))

    @cached_property
    def _input_rows(self) -> Sequence[Tensor]:
        """The rows of the table that hold the addresses of inputs."""
        first = multi_tensor.HEADER_ROWS + 1
        return self.table[first : first + len(self._staged_inputs)].unbind()

    def norm_weights(self, weights: Sequence[float]) -> list[float]:
        """List the weight of each partial norm, and of what makes their number even."""
        found = []
        for position, numel in zip(self.positions, self._numels, strict=True):
            found += [weights[position]] * norms.partial_count(numel)
        return found + [1.0] * (len(found) % 2)

    def memory(self) -> Iterator[Tensor]:
        """List the tables, and the buffers that operands go through."""
        yield from (self.table, self.chunk_tensor, self.chunk_index, *self._extra)
        yield from self._norm_chunks or ()
        for buffers in self._staged_inputs:
            yield from buffers.values()
        for _, buffer in self._staged_memory:
            yield buffer
        if self.measured is not None:
            yield self.measured.sums

    def move_inputs(self, inputs: Inputs, captured: list[Tensor]) -> None:
        """Write the addresses of inputs into the table; those of buffers stay."""
        columns = zip(self._input_rows, inputs, self._staged_inputs, strict=True)
        for target, tensors, buffers in columns:
            # The plan has seen that none of them has lost its memory.
            row = [tensors[position].data_ptr() for position in self.positions]
            for column, buffer in buffers.items():
                row[column] = buffer.data_ptr()
            if len(row) == 1:
                # An argument of a launch, in a fraction of the time that a copy takes.
                target.fill_(row[0])
            else:
                upload(target, _host(row), captured)

    def _fill_buffers(self, inputs: Inputs) -> None:
        for tensors, buffers in zip(inputs, self._staged_inputs, strict=True):
            for column, buffer in buffers.items():
                buffer.copy_(tensors[self.positions[column]])

    def partial_norms(
        self, inputs: Inputs, inverse_scale: Tensor, partials: Tensor, infinity_norm: bool
    ) -> None:
        """Write the partial norms of the gradients, one a program."""
        if self._norm_chunks is None:
            self._norm_chunks = chunk_map(self._numels, norms.NORM_BLOCK, self.device)
        self._fill_buffers(inputs)
        launch(
            norms.partial_norms, self.norm_programs, norms.NORM_THREADS, self.device,
            self.table, self.width, *self._norm_chunks, inverse_scale, partials,
            **norms.partial_norms_constants(
                self._meta["DTYPES"][1], self._meta["COMPUTE"], self.key.aligned, infinity_norm
            ),
        )  # fmt: skip

    def update(
        self,
        inputs: Inputs,
        table: Table,
        control: Tensor,
        captured: list[Tensor],
        measured: bool,
    ) -> None:
        """Update every tensor of the bucket by one launch."""
        # A table that deals its rows anew has another list.
        if table.row_of is not self._dealt:
            self._dealt = table.row_of
            row_of = [table.row_of[p] for p in self.positions]
            if row_of != self._row_of:
                self._row_of = row_of
                upload(self.table[1], _host(row_of), captured)
        self._fill_buffers(inputs)
        for tensor, buffer in self._staged_memory:
            buffer.copy_(tensor)
        launch(
            self._kernel, self._programs, self._threads, self.device,
            self.table, self.width, self.chunk_tensor, self.chunk_index, table.values, control,
            *self._extra, registers=self._registers,
            **(self._measures if measured else self._meta),
        )  # fmt: skip
        for tensor, buffer in self._staged_memory:
            tensor.copy_(buffer)


class Measured:
    """The partial sums of squares of a bucket, below 0 until a step has written them.

    Args:
        chunks: of each tensor.
        dtype: of the sums.
        device: where they are.

    Attributes:
        sums: ``[chunks of all tensors, 3]``.
        addresses: of each tensor's sums, int64 ``[1, tensors]`` on the host.
    """

    def __init__(self, chunks: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        first = torch.zeros(len(chunks) + 1, dtype=torch.int64, device="cpu")
        first[1:] = _host(list(chunks)).cumsum(0)
        shape = int(first[-1]), telemetry.COUNT
        self.sums = torch.full(shape, telemetry.UNWRITTEN, dtype=dtype, device=device)
        begin, size = self.sums.data_ptr(), telemetry.COUNT * self.sums.element_size()
        self.addresses = (begin + size * first[:-1]).unsqueeze(0)
        self._first = torch.empty(len(first), dtype=torch.int64, device=device)
        upload(self._first, first)

    def totals(self) -> Tensor:
        """Add up the sums of each tensor: float64 ``[tensors, 3]``."""
        count = len(self._first) - 1
        device = self.sums.device
        totals = torch.empty(count, telemetry.COUNT, dtype=torch.float64, device=device)
        launch(
            telemetry.add_up, count, telemetry.THREADS, device, self.sums, self._first, totals,
            **telemetry.add_up_constants(),
        )  # fmt: skip
        return totals


def _launch_config(rule: Rule, device: torch.device, key: BucketKey) -> launch_config.LaunchConfig:
    if key.counts is not None or key.format != PLAIN:
        return launch_config.default(key.aligned, key.rowwise, key.format)
    names = [str(TRITON_DTYPES[t]) for t in key.dtypes]
    return launch_config.update_launch_config(
        device_architecture(device), rule.name, names, key.aligned
    )


def chunk_map(numels: Sequence[int], block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Map programs to chunks: the tensor's column, and the chunk's number within it."""
    counts = _host([-(-n // block) for n in numels])
    columns = torch.arange(len(numels), device="cpu").repeat_interleave(counts)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    index = torch.arange(len(columns), device="cpu") - first
    return device_vector(columns, device), device_vector(index, device)


def device_vector(values: Tensor | Sequence[int], device: torch.device) -> Tensor:
    """Copy integers to the device as int32."""
    values = values if isinstance(values, Tensor) else _host(list(values))
    # In memory of its own: Triton compiles anew for an address that is not aligned.
    on_device = torch.empty(len(values), dtype=torch.int32, device=device)
    upload(on_device, values.to(torch.int32))
    return on_device


def _host(values: list[Any]) -> Tensor:
    # Whatever torch.set_default_device says.
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def _launch_orders(entries: Sequence[Entries]) -> dict[int, int] | None:
    """Number the launches so that tensors sharing memory are never written by the same one.

    Two parameters over the same storage would race within a launch; torch updates them in turn.

    Returns:
        The number for each position; None where no memory is shared.
    """
    written = [(own, column) for own in entries for column in (own.params, *own.states)]
    if are_apart(chained([column for _, column in written])):
        return None
    orders = {position: 0 for own in entries for position in own.positions}
    ranges = []
    for own, column in written:
        for position, tensor in zip(own.positions, column, strict=True):
            start, stop = byte_range(tensor)
            if stop > start:
                ranges.append((start, stop, position))
    clashes: dict[int, set[int]] = defaultdict(set)
    open_ranges: list[tuple[int, int]] = []
    for start, stop, position in sorted(ranges):
        open_ranges = [r for r in open_ranges if r[0] > start]
        for _, other in open_ranges:
            if other != position:
                clashes[max(position, other)].add(min(position, other))
        open_ranges.append((stop, position))
    for position in sorted(clashes):
        orders[position] = 1 + max(orders[other] for other in clashes[position])
    return orders
