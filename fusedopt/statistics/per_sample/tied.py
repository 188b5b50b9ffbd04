"""The cross term of a weight that is both an embedding table and an output head.

Let h_b be sample b's contribution through the head, k_b the one through the embedding. The square
of their sum holds 2 h_b k_b, and k_b has rows only for the tokens of the sample. So h_b is formed
for those rows alone: at most as many rows as tokens, never the table's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..ops.samples import Samples, packed

Packed = tuple[Tensor, Tensor, Samples]

# Elements formed at once, for as many samples as fit.
CHUNK_ELEMENTS = 1 << 22


def add_cross_terms(squares: Tensor, head: Packed, lookup: Packed) -> None:
    """Add ``2 sum_b h_b k_b`` to the squares of a tied weight.

    Args:
        squares: ``[vocabulary, width]``, accumulated into.
        head: inputs ``[batch, length, width]`` and errors ``[batch, length, vocabulary]`` of the
            output head, with their samples.
        lookup: ids ``[batch, tokens]`` and errors ``[batch, tokens, width]`` of the embedding.
    """
    for a, e, ids, looked in _pieces(head, lookup):
        wanted = ids.to(torch.int64).unsqueeze(1).expand(-1, e.shape[1], -1)
        # Row p of h: the head's contribution to the row of the table that token p looked up.
        h = e.gather(2, wanted).to(squares.dtype).transpose(1, 2) @ a.to(squares.dtype)
        # Tokens of equal id add up to k, which multiplies the same row of h.
        products = (2 * h * looked).flatten(0, 1)
        squares.index_add_(0, ids.reshape(-1), products)


def _pieces(head: Packed, lookup: Packed) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    a, e, samples = head
    ids, looked, own = lookup
    if samples.offsets is None and own.offsets is None:
        length, tokens = a.shape[1], ids.shape[1]
        size = max(1, CHUNK_ELEMENTS // max(1, tokens * (length + looked.shape[2])))
        for start in range(0, samples.count, size):
            piece = slice(start, start + size)
            yield a[piece], e[piece], ids[piece], looked[piece]
        return
    (a, e), samples = packed((a, e), samples)
    (ids, looked), own = packed((ids, looked), own)
    assert samples.offsets is not None and own.offsets is not None
    # Ragged: one by one. On a GPU this waits for the offsets.
    bounds = zip(samples.offsets.tolist(), own.offsets.tolist(), strict=True)
    start, own_start = next(bounds)
    for stop, own_stop in bounds:
        rows, own_rows = slice(start, stop), slice(own_start, own_stop)
        yield a[None, rows], e[None, rows], ids[None, own_rows], looked[None, own_rows]
        start, own_start = stop, own_stop
