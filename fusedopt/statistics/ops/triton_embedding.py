"""Embedding tables in Triton, without atomics and without a read by the host; see ``reference``."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.launch import launch
from ...kernels.per_sample import embedding as kernels
from .samples import Samples


def embedding(
    ids: Tensor,
    e: Tensor,
    samples: Samples,
    vocabulary: int,
    padding_idx: int | None,
    dtype: torch.dtype | None,
    squares: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Reduce an embedding table; see ``reference.embedding``."""
    _check(ids, e, samples)
    tokens, width, device = ids.numel(), e.shape[-1], e.device
    shape = (vocabulary, width)
    gradient = torch.zeros(shape, dtype=dtype, device=device) if dtype is not None else None
    # The kernels write contiguous squares in place; others are added to afterwards.
    in_place = squares is not None and squares.is_contiguous()
    result = squares if in_place else torch.zeros(shape, dtype=torch.float32, device=device)
    assert result is not None
    if tokens > 0 and width > 0:
        keys, order = _sorted_keys(ids, samples, vocabulary, padding_idx)
        segmented = samples.offsets is not None
        chunks = _ceil(tokens, kernels.CHUNK)
        partials = torch.empty(chunks, 2, 2, width, dtype=torch.float32, device=device)
        strides = (0, *e.stride()) if segmented else e.stride()
        block = min(kernels.BLOCK, _power_of_two(width))
        launch(
            kernels.sum_chunks, chunks * _ceil(width, block), kernels.THREADS, device,
            keys, order, e, *strides, gradient, result, partials,
            tokens, 0 if segmented else ids.shape[1], vocabulary, width,
            **kernels.sum_chunks_constants(in_place, segmented, block),
        )  # fmt: skip
        block = min(kernels.JOIN_BLOCK, _power_of_two(width))
        launch(
            kernels.join, chunks * _ceil(width, block), kernels.THREADS, device,
            keys, partials, gradient, result, tokens, chunks, vocabulary, width,
            **kernels.join_constants(in_place, block),
        )  # fmt: skip
    if squares is not None and not in_place:
        return gradient, squares.add_(result)
    return gradient, result


def _sorted_keys(
    ids: Tensor, samples: Samples, vocabulary: int, padding_idx: int | None
) -> tuple[Tensor, Tensor]:
    """Sort the positions by (id, sample): int64 keys, and where each was.

    Padding becomes an id behind the last one, which the kernels leave out.
    """
    if samples.offsets is None:
        sample = torch.arange(samples.count, device=ids.device).unsqueeze(1)
    else:
        sample = samples.of_rows(len(ids))
    keys = ids.to(torch.int64)
    if padding_idx is not None:
        keys = torch.where(keys == padding_idx, vocabulary, keys)
    keys = (keys << kernels.SAMPLE_BITS) | sample
    # Stable: the order within a key is the order of its sum.
    return torch.sort(keys.flatten(), stable=True)


def _check(ids: Tensor, e: Tensor, samples: Samples) -> None:
    dimensions = 2 if samples.offsets is None else 1
    if ids.dim() != dimensions:
        raise ValueError(f"ids must have {dimensions} dimensions, got {tuple(ids.shape)}")
    if e.shape[:-1] != ids.shape:
        raise ValueError(f"errors {tuple(e.shape)} do not fit ids {tuple(ids.shape)}")
    if samples.offsets is None and ids.shape[0] != samples.count:
        raise ValueError(f"ids of {ids.shape[0]} samples, expected {samples.count}")


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(n: int) -> int:
    """The smallest that is not less than n."""
    return 1 << (n - 1).bit_length()
