"""Which rows of a layer's input and error belong to which sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """How the rows of canonical tensors are divided into samples.

    Dense: tensors are ``[count, length, width]`` with any strides, and sample i is ``[i]``.
    Segmented: tensors are ``[tokens, width]``, and sample i is rows ``offsets[i]:offsets[i + 1]``
    (``cu_seqlens``, as packed attention has them); segments may be empty.

    Attributes:
        count: number of samples.
        offsets: integer tensor ``[count + 1]`` on the tensors' device, or None where dense.
    """

    count: int
    offsets: Tensor | None = None

    def of_rows(self, tokens: int) -> Tensor:
        """Return the sample of each row, int64 ``[tokens]``, without reading the device."""
        if self.offsets is None:
            raise ValueError("dense samples are a dimension, not a map of rows")
        rows = torch.arange(tokens, device=self.offsets.device)
        return torch.bucketize(rows, self.offsets[1:].to(torch.int64), right=True)


def packed(tensors: Sequence[Tensor], samples: Samples) -> tuple[Sequence[Tensor], Samples]:
    """Return canonical tensors and their samples in the segmented form."""
    if samples.offsets is not None:
        return tensors, samples
    length = tensors[0].shape[1]
    offsets = torch.arange(samples.count + 1, device=tensors[0].device) * length
    return [x.flatten(0, 1) for x in tensors], Samples(samples.count, offsets)


def segments(of_rows: Tensor, count: int) -> tuple[Tensor, Samples]:
    """Return the order in which rows of one sample lie next to each other, and their samples.

    Args:
        of_rows: the sample of each row, int64 ``[rows]``.
        count: number of samples.
    """
    order = torch.argsort(of_rows, stable=True)
    bounds = torch.arange(count + 1, device=of_rows.device)
    # Without a read of the device, which bincount would be.
    return order, Samples(count, torch.searchsorted(of_rows[order], bounds))
