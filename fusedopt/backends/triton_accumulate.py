"""Gradients added to float32 sums by Triton: one launch for all tensors of the same types."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import accumulate, multi_tensor
from ..kernels.launch import TRITON_DTYPES, launch
from ..memory.device import upload
from ..memory.layout import ALIGNMENT, is_dense, is_plain, same_order
from ..memory.storage import addresses as addresses_of
from ..memory.streams import current, record
from .triton import chunk_map

# Types of sum and gradient, and whether addresses are aligned.
Key = tuple[torch.dtype, torch.dtype, bool]


class TritonSums:
    """See ``fusedopt.backends.Sums``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # By types and numbers of elements, the tables of launches.
        self._tables: dict[tuple[Key, tuple[int, ...]], tuple[Tensor, Tensor, Tensor]] = {}

    def add(
        self, sums: Sequence[Tensor], gradients: Sequence[Tensor], begun: Sequence[bool]
    ) -> None:
        """As ``fusedopt.backends.Sums``."""
        buckets: dict[Key, list[tuple[Tensor, Tensor, bool]]] = defaultdict(list)
        for total, gradient, old in zip(sums, gradients, begun, strict=True):
            if not total.numel():
                continue
            own = _ordered(total, gradient)
            aligned = all(t.data_ptr() % ALIGNMENT == 0 for t in (total, own))
            buckets[total.dtype, own.dtype, aligned].append((total, own, old))
        for key, members in buckets.items():
            self._launch(key, members)

    def _launch(self, key: Key, members: Sequence[tuple[Tensor, Tensor, bool]]) -> None:
        *types, aligned = key
        sums, gradients, begun = zip(*members, strict=True)
        numels = tuple(map(Tensor.numel, sums))
        if (key, numels) not in self._tables:
            table = torch.empty((4, len(numels)), dtype=torch.int64, device=self._device)
            block = multi_tensor.block_size(aligned)
            self._tables[key, numels] = (table, *chunk_map(numels, block, self._device))
        table, chunk_tensor, chunk_index = self._tables[key, numels]
        rows = [numels, begun, addresses_of(sums), addresses_of(gradients)]
        upload(table, torch.tensor(rows, dtype=torch.int64, device="cpu"))
        launch(
            accumulate.accumulate, len(chunk_tensor), multi_tensor.THREADS, self._device,
            table, len(numels), chunk_tensor, chunk_index,
            **accumulate.accumulate_constants(tuple(TRITON_DTYPES[t] for t in types), aligned),
        )  # fmt: skip
        if self._device.type != "cpu":
            # The memory may be given away, and the stream be another one by then.
            for tensor in (table, chunk_tensor, chunk_index):
                record(tensor, current(self._device))


def _ordered(total: Tensor, gradient: Tensor) -> Tensor:
    """Bring a gradient into the order of elements that its sum has."""
    if is_dense(gradient) and is_plain(gradient) and same_order(total, gradient):
        return gradient
    return torch.empty_like(total, dtype=gradient.dtype).copy_(gradient)
