"""Materialised per-sample gradients: one launch for all tensors that share types and counts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import multi_tensor
from ..kernels.launch import TRITON_DTYPES, launch
from ..kernels.per_sample import materialised
from ..memory.device import upload
from ..memory.dtypes import compute_dtype, real_dtype
from ..memory.layout import ALIGNMENT, is_dense, is_plain, stacked_buffer, stacked_order
from ..memory.storage import addresses as addresses_of
from .triton import chunk_map, device_vector

Key = tuple[tuple[torch.dtype, ...], tuple[int, ...], bool]


def reduce_samples(
    device: torch.device, parameters: Sequence[Tensor], columns: Sequence[Sequence[Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Do what ``fusedopt.backends.reduce_samples`` does, for tensors of one device."""
    sums: list[Tensor] = []
    squares: list[Tensor] = []
    buckets: dict[Key, list[list[Tensor]]] = defaultdict(list)
    for p, parts in zip(parameters, columns, strict=True):
        compute = compute_dtype([real_dtype(t.dtype) for t in (p, *parts)])
        # In a dense order, the parameter's where it has one.
        total = torch.empty_like(p, dtype=compute)
        sums.append(total)
        squares.append(torch.empty_like(total))
        own = [total, squares[-1], *(_stacked(total, part) for part in parts)]
        aligned = all(t.data_ptr() % ALIGNMENT == 0 for t in own) and p.numel() % ALIGNMENT == 0
        key = tuple(t.dtype for t in own), tuple(map(len, parts)), aligned
        buckets[key].append(own)
    for key, members in buckets.items():
        _launch(device, key, members)
    return sums, squares


def _stacked(parameter: Tensor, samples: Tensor) -> Tensor:
    """Bring samples into the order of elements that results have."""
    if is_dense(parameter) and is_plain(samples) and stacked_order(parameter, samples):
        return samples
    return stacked_buffer(parameter, samples).copy_(samples)


def _launch(device: torch.device, key: Key, members: Sequence[Sequence[Tensor]]) -> None:
    dtypes, counts, aligned = key
    numels = [own[0].numel() for own in members]
    addresses = [addresses_of(row) for row in zip(*members, strict=True)]
    rows = torch.tensor([numels, numels, *addresses], dtype=torch.int64, device="cpu")
    table = torch.empty(rows.shape, dtype=torch.int64, device=device)
    upload(table, rows)
    types = tuple(TRITON_DTYPES[t] for t in dtypes)
    constants = materialised.reduce_samples_constants(types, aligned)
    chunk_tensor, chunk_index = chunk_map(numels, multi_tensor.block_size(aligned), device)
    launch(
        materialised.reduce_samples, len(chunk_tensor), multi_tensor.THREADS, device,
        table, len(members), chunk_tensor, chunk_index, device_vector(counts, device),
        **constants,
    )  # fmt: skip
