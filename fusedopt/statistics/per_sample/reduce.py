"""One parameter used by layers of different kinds: contributions are formed and added.

What kinds have in common is the contribution itself. It is formed for a few samples at a time, one
kind after the other, and squared once all are added.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...memory.dtypes import compute_dtype
from ..ops.samples import Samples
from .uses import (
    ConvolutionUse,
    EmbeddingUse,
    FallbackUse,
    GainUse,
    LinearUse,
    ParamUse,
    Target,
    VectorUse,
    _as_vector,
    _unfold,
    _unpadded,
    reduce_uses,
    samples_of,
)

# Gradient elements formed at once.
CHUNK_ELEMENTS = 1 << 20
_TOGETHER = ({VectorUse, GainUse}, {LinearUse, EmbeddingUse}, {ConvolutionUse})

Known = LinearUse | VectorUse | GainUse | EmbeddingUse | ConvolutionUse


def reduce(uses: Sequence[ParamUse], target: Target) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Reduce all uses of a parameter in one call of the model, of whatever kinds.

    Returns:
        The gradient, or None; the squares; and where modules of unknown kind take part, the sum of
        all contributions, else None. The gradient is that of known layers: what others contribute
        to it goes past the tap.
    """
    sources = {id(use.source): use.source for use in uses if isinstance(use, FallbackUse)}
    known: list[Known] = [use for use in uses if not isinstance(use, FallbackUse)]
    kinds = {type(use) for use in known}
    alone = not sources and any(kinds <= together for together in _TOGETHER)
    if alone or (len(sources) == 1 and not known):
        made, reduced = reduce_uses(uses, target)
        return (None, reduced, made) if sources else (made, reduced, None)
    parameter, squares = target.parameter, target.squares
    compute = compute_dtype([parameter.dtype])
    if squares is None:
        squares = torch.zeros(parameter.shape, dtype=compute, device=parameter.device)
    fused = target.dtype is not None and bool(known)
    gradient = torch.zeros_like(squares) if fused else None
    total = torch.zeros_like(squares) if sources else None
    for piece in pieces(target.samples.count, parameter.numel()):
        rows = squares.new_zeros(piece.stop - piece.start, *parameter.shape)
        for use in known:
            _add(rows, use, target.samples, piece)
        if gradient is not None:
            gradient += rows.sum(0)
        for source in sources.values():
            rows += source.rows_of(parameter, piece).to(rows.dtype)
        if total is not None:
            total += rows.sum(0)
        squares += rows.square_().sum(0)
    for source in sources.values():
        source.done(parameter)
    return None if gradient is None else gradient.to(target.dtype), squares, total


def pieces(count: int, numel: int) -> Iterator[slice]:
    """Cut samples into pieces whose contributions, ``numel`` elements each, are formed at once."""
    # Never the whole batch, except where it is one sample.
    size = max(1, min(count // 2, CHUNK_ELEMENTS // max(1, numel)))
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _add(rows: Tensor, use: Known, samples: Samples, piece: slice) -> None:
    """Add what some samples contribute through one use to ``rows``, ``[samples, *parameter]``."""
    samples = samples_of(use, samples)
    if samples.offsets is None or isinstance(use, ConvolutionUse):
        _add_dense(rows, use, piece)
        return
    # Ragged: one by one. On a GPU this waits for the offsets.
    bounds = samples.offsets[piece.start : piece.stop + 1].tolist()
    for i, own in enumerate(zip(bounds, bounds[1:], strict=False)):
        _add_dense(rows[i : i + 1], use, slice(*own), packed=True)


def _add_dense(rows: Tensor, use: Known, piece: slice, packed: bool = False) -> None:
    def cut(x: Tensor) -> Tensor:
        return x[piece].unsqueeze(0) if packed else x[piece]

    if isinstance(use, LinearUse):
        matrices = rows.flatten(1, -2)
        own = matrices if use.rows is None else matrices[:, use.rows]
        own += cut(use.grad_output).to(rows.dtype).transpose(1, 2) @ cut(use.activations).to(
            rows.dtype
        )
    elif isinstance(use, EmbeddingUse):
        ids, errors = (cut(x) for x in _unpadded(use))
        ids = ids.to(torch.int64)
        first = torch.arange(len(rows), device=ids.device).unsqueeze(1) * rows.shape[1]
        flat = errors.to(rows.dtype).flatten(0, 1)
        rows.view(-1, rows.shape[2]).index_add_(0, (ids + first).flatten(), flat)
    elif isinstance(use, ConvolutionUse):
        e = use.grad_output[piece].flatten(2).unflatten(1, (use.groups, -1)).to(rows.dtype)
        rows += (e @ _unfold(use, piece).to(rows.dtype)).reshape(rows.shape)
    else:
        vector = _as_vector(use)
        flat = rows.view(len(rows), -1)
        own = flat if vector.rows is None else flat[:, vector.rows]
        own += cut(vector.grad_output).to(rows.dtype).sum(1)
