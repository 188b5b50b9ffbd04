"""Operands as the update kernel sees them: in place, or through a staging buffer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.codecs.format import PLAIN, Format
from ..kernels.codecs.place import DRAW_ROWS, GROUP, ROWWISE_ROWS
from ..memory.layout import (
    ALIGNMENT,
    are_in_one_order,
    is_dense,
    is_plain,
    real_view,
    same_order,
    stacked_buffer,
    stacked_order,
    staging_buffer,
)
from ..memory.storage import addresses as addresses_of
from .entry import Entries


class BucketKey(NamedTuple):
    """What tensors must share to be updated by the same launch."""

    dtypes: tuple[torch.dtype, ...]
    options: tuple[bool, ...]
    aligned: bool
    launch_order: int  # parameters that share memory are updated one after the other
    counts: tuple[int, ...] | None = None  # samples in each input, where inputs are samples
    format: Format = PLAIN
    rowwise: bool = False


class Operands:
    """The operands of entries, a column for each kind, and where they are.

    Attributes:
        positions: of the parameters in the lists of inputs.
        numels: how many real numbers each parameter is.
        columns: parameters, inputs and states, or the buffers that stand for them.
        addresses: of these, int64 ``[operands, parameters]`` on the host.
    """

    def __init__(self, entries: Entries) -> None:
        self._entries = entries
        self.positions = entries.positions
        self.columns: list[Sequence[Tensor]] = list(entries.columns)
        # For each row that has some, the operands that go through a buffer, with the original.
        self._originals: dict[int, dict[int, Tensor]] = {}
        if entries.per_sample_inputs or not all(map(are_in_one_order, self.columns)):
            self._stage()
        if any(map(torch.is_complex, entries.params)):
            self.numels = [real_view(p).numel() for p in entries.params]
        else:
            self.numels = list(map(Tensor.numel, entries.params))
        found = [addresses_of(column) for column in self.columns]
        self.addresses = torch.tensor(found, dtype=torch.int64, device="cpu")

    def _stage(self) -> None:
        """Put buffers in the place of what is not laid out as its parameter, or has gaps.

        Where codecs draw or have groups, of what is not in row-major order.
        """
        entries, columns = self._entries, [list(column) for column in self.columns]
        inputs = range(1, 1 + len(entries.inputs))
        scales = entries.format.scales(len(inputs))
        for row, p in enumerate(entries.params):
            if not entries.per_sample_inputs and are_in_one_order([c[row] for c in columns]):
                continue
            if entries.draws:
                p = torch.empty(p.shape, device="meta")
            dense = is_dense(p)
            for i, column in enumerate(columns):
                if i in scales:
                    continue
                samples = entries.per_sample_inputs and i in inputs
                fits = stacked_order if samples else same_order
                tensor = column[row]
                if not (dense and fits(p, tensor) and is_plain(tensor)):
                    buffer = stacked_buffer if samples else staging_buffer
                    column[row] = buffer(p, tensor)
                    self._originals.setdefault(row, {})[i] = tensor
        self.columns = list(columns)

    def rows_by_key(self, orders: Mapping[int, int] | None) -> dict[BucketKey, list[int]]:
        """Deal the rows of parameters that have elements out to launches.

        Args:
            orders: for each position, when it is to be updated; None for all at once.
        """
        entries = self._entries
        aligned = ~(self.addresses % ALIGNMENT).any(0)
        counts: list[tuple[int, ...] | None] = [None] * len(self.numels)
        if entries.per_sample_inputs:
            counts = [tuple(map(len, own)) for own in zip(*entries.inputs, strict=True)]
            aligned &= torch.tensor(self.numels, device="cpu") % ALIGNMENT == 0
        launches = repeat(0) if orders is None else map(orders.__getitem__, self.positions)
        rowwise: Iterable[bool] = repeat(False)
        if entries.draws:
            pairs = zip(entries.draws, self.numels, strict=True)
            rowwise = [draw.walk.is_rowwise(numel) for draw, numel in pairs]
        traits = zip(entries.dtypes, aligned.tolist(), launches, counts, rowwise, strict=False)
        found: dict[tuple[Any, ...], list[int]] = {}
        for row, (own, numel) in enumerate(zip(traits, self.numels, strict=True)):
            if numel:
                found.setdefault(own, []).append(row)
        buckets = {}
        for (dtypes, is_aligned, order, samples, walk), rows in found.items():
            key = BucketKey(
                dtypes, entries.options, is_aligned, order, samples, entries.format, walk
            )
            buckets[key] = rows
        return buckets

    def draw_rows(self, rows: Sequence[int], rowwise: bool) -> Tensor:
        """Return for some rows what ``kernels/codecs/place.py`` reads, int64 ``[kinds, rows]``."""
        found = []
        for row in rows:
            seed, number, walk = self._entries.draws[row]
            follow = walk.whole // walk.inner
            found.append((seed, number, walk.first, walk.inner, follow, walk.apart))
        count = ROWWISE_ROWS if rowwise else DRAW_ROWS
        return torch.tensor(found, dtype=torch.int64, device="cpu").T[:count]

    def groups(self, rows: Sequence[int]) -> list[int]:
        """Return for some rows that are walked row by row how many groups they have."""
        walks = [self._entries.draws[row].walk for row in rows]
        return [
            self.numels[row] // walk.inner * -(-walk.inner // GROUP)
            for row, walk in zip(rows, walks, strict=True)
        ]

    def staged(
        self, rows: Sequence[int]
    ) -> tuple[list[dict[int, Tensor]], list[tuple[Tensor, Tensor]]]:
        """Return the buffers of some rows.

        Returns:
            For each input, the buffers by place among the rows; and parameters and states that go
            through a buffer, each with it.
        """
        n_inputs = len(self._entries.inputs)
        inputs: list[dict[int, Tensor]] = [{} for _ in range(n_inputs)]
        memory: list[tuple[Tensor, Tensor]] = []
        if self._originals:
            for place, row in enumerate(rows):
                for i, tensor in self._originals.get(row, {}).items():
                    if 1 <= i <= n_inputs:
                        inputs[i - 1][place] = self.columns[i][row]
                    else:
                        memory.append((tensor, self.columns[i][row]))
        return inputs, memory
