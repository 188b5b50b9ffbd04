"""Coefficients of a step whose numbers live on the device: one launch, with the counts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..coefficients import LiveTable
from ..kernels import live_coefficients
from ..kernels.launch import TRITON_DTYPES, launch
from ..memory.device import upload
from ..memory.storage import addresses as addresses_of


class TritonCoefficients:
    """Advances counts of steps and forms the rows of a table, of groups of one formula at a time.

    Args:
        table: the rows.
        counts: for each tensor, its count of steps on the device; nothing where none are kept. They
            stay where they are.
    """

    def __init__(self, table: LiveTable, counts: Sequence[Tensor] = ()) -> None:
        self._table = table
        # Groups whose formulas differ in numbers alone take one launch.
        alike: dict[Any, list[int]] = defaultdict(list)
        for row, part in enumerate(table.part_of):
            alike[table.formulas[part].shape].append(row)
        addresses = addresses_of(counts) if counts else [0] * len(table.part_of)
        count_type = TRITON_DTYPES[counts[0].dtype] if counts else None
        self._launches: list[tuple[Tensor, Mapping[str, Any]]] = []
        for rows in alike.values():
            parts = [table.part_of[row] for row in rows]
            numbers = [rows, [addresses[row] for row in rows], parts]
            host = torch.tensor(numbers, dtype=torch.int64, device="cpu")
            on_device = torch.empty(host.shape, dtype=torch.int64, device=table.device)
            upload(on_device, host)
            constants = live_coefficients.live_coefficients_constants(
                table.formulas[parts[0]],
                table.values.shape[1],
                count_type,
                table.rule.counts_steps,
                table.with_step,
            )
            self._launches.append((on_device, constants))

    def memory(self) -> Iterator[Tensor]:
        """List the tensors that launches read besides the table's and the counts."""
        for on_device, _ in self._launches:
            yield on_device

    def step(self, groups: Sequence[Mapping[str, Any]], control: Tensor) -> None:
        """Count one step more, unless ``control[1]`` is set, and form every row.

        Args:
            groups: whose hyper-parameters are read.
            control: float64 ``[2]``, what the update kernel reads besides coefficients.
        """
        table = self._table
        table.read(groups)
        for on_device, constants in self._launches:
            count = on_device.shape[1]
            launch(
                live_coefficients.live_coefficients, -(-count // live_coefficients.BLOCK),
                live_coefficients.THREADS, table.device,
                on_device, count, table.inputs, table.inputs.shape[1], table.steps, control,
                table.values,
                exact=True, **constants,
            )  # fmt: skip
