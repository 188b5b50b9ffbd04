"""Uses of a parameter in one call of the model, and how several become one.

The square comes after the sum over uses, so uses are combined first: what several linear layers
(or calls of one) contribute to a sample is one product over their concatenated rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ...memory.dtypes import compute_dtype
from ..ops.samples import Samples, packed
from .tied import add_cross_terms

Pair = tuple[int, int]


@dataclass(frozen=True)
class LinearUse:
    """``y = x W^T``: canonical input and error, and the rows of W that were used.

    Of ``y = x W``, input and error change places. Rows of a parameter of more dimensions are those
    of all but its last one, and samples are those of the call where none are given.
    """

    ops: ModuleType
    activations: Tensor
    grad_output: Tensor
    rows: slice | None = None
    samples: Samples | None = None


@dataclass(frozen=True)
class VectorUse:
    """``y = x + b``: the error, and the elements of b that were used."""

    ops: ModuleType
    grad_output: Tensor
    rows: slice | None = None
    samples: Samples | None = None
    tolerance: float = 0.0


@dataclass(frozen=True)
class GainUse:
    """``y = (x - mean) rstd * w``: input, its statistics and the error.

    Attributes:
        tolerance: as that of ``FallbackUse``, where the module reads its parameter by itself.
    """

    ops: ModuleType
    grad_output: Tensor
    x: Tensor
    mean: Tensor | None
    rstd: Tensor
    samples: Samples | None = None
    tolerance: float = 0.0


@dataclass(frozen=True)
class EmbeddingUse:
    """``y = W[ids]``."""

    ops: ModuleType
    ids: Tensor
    grad_output: Tensor
    padding_idx: int | None
    samples: Samples | None = None


@dataclass(frozen=True)
class ConvolutionUse:
    """A convolution in two dimensions."""

    ops: ModuleType
    x: Tensor
    grad_output: Tensor
    kernel_size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int


class Fallback(Protocol):
    """Squares that are formed for a whole module at once: the way of last resort."""

    def squares_of(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of the contributions to one of the module's parameters, and of squares."""

    def rows_of(self, parameter: Tensor, samples: slice) -> Tensor:
        """Return what some samples contribute to one parameter, ``[samples, *parameter]``."""

    def done(self, parameter: Tensor) -> None:
        """Note that no more rows of a parameter are asked for."""


@dataclass(frozen=True)
class FallbackUse:
    """Anything else: all uses by one module, which knows how to combine them.

    Attributes:
        source: the module.
        tolerance: how far the sum of contributions may be from autograd's, beside their size.
    """

    source: Fallback
    tolerance: float = 0.0


ParamUse = LinearUse | VectorUse | GainUse | EmbeddingUse | ConvolutionUse | FallbackUse
Reduced = tuple[Tensor | None, Tensor]


@dataclass(frozen=True)
class Target:
    """What a reduction is to produce.

    Attributes:
        parameter: whose shape and device results have.
        samples: which rows belong to which sample.
        dtype: type of the gradient, or None to leave it out.
        squares: what earlier calls gathered, accumulated into; or None.
    """

    parameter: Tensor
    samples: Samples
    dtype: torch.dtype | None
    squares: Tensor | None


def reduce_uses(uses: Sequence[ParamUse], target: Target) -> Reduced:
    """Reduce all uses of a parameter in one call of the model, of kinds that combine.

    Returns:
        The gradient, or None, and the squares, both of the parameter's shape.
    """
    kinds = {type(use) for use in uses}
    if len(uses) > 1 or getattr(uses[0], "rows", None) is not None:
        if kinds <= {VectorUse, GainUse}:
            return _reduce_vectors([_as_vector(use) for use in uses], target)  # type: ignore[arg-type]
        if kinds <= {LinearUse, EmbeddingUse}:
            return _reduce_matrices(uses, target)
        if kinds == {FallbackUse}:
            return _reduce_fallback(uses, target)
        return _shaped(_reduce_convolutions(uses, target), target)  # type: ignore[arg-type]
    return _shaped(_reduce_single(uses[0], target), target)


def samples_of(use: ParamUse, of_call: Samples) -> Samples:
    """Return which rows of a use belong to which sample."""
    return getattr(use, "samples", None) or of_call


def _shaped(reduced: Reduced, target: Target) -> Reduced:
    gradient, squares = reduced
    shape = target.parameter.shape
    return (None if gradient is None else gradient.view(shape)), squares.view(shape)


def _reduce_single(use: ParamUse, target: Target) -> Reduced:
    """Reduce the common case: one use of the whole parameter, by one kernel."""
    samples, dtype, squares = samples_of(use, target.samples), target.dtype, target.squares
    if isinstance(use, LinearUse):
        return use.ops.linear(use.activations, use.grad_output, samples, dtype, squares)
    if isinstance(use, EmbeddingUse):
        rows = len(target.parameter)
        return use.ops.embedding(
            use.ids, use.grad_output, samples, rows, use.padding_idx, dtype, squares
        )
    if isinstance(use, ConvolutionUse):
        flat = squares if squares is None else squares.view(*squares.shape[:2], *use.kernel_size)
        return use.ops.convolution(
            use.x, use.grad_output, use.kernel_size, use.stride, use.padding, use.dilation,
            use.groups, dtype, flat,
        )  # fmt: skip
    if isinstance(use, FallbackUse):
        return _reduce_fallback([use], target)
    flat = squares if squares is None else squares.view(-1)
    if isinstance(use, GainUse):
        return use.ops.affine(use.grad_output, use.x, use.mean, use.rstd, samples, dtype, flat)
    return use.ops.vector(use.grad_output, samples, dtype, flat)


def _reduce_fallback(uses: Sequence[ParamUse], target: Target) -> Reduced:
    """Reduce the calls of one module."""
    (source,) = {id(use.source): use.source for use in uses}.values()  # type: ignore[union-attr]
    total, made = source.squares_of(target.parameter)
    return total, made if target.squares is None else target.squares.add_(made)


def _start(target: Target, like: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return memory for gradient and squares, to be filled part by part."""
    parameter, squares = target.parameter, target.squares
    if squares is None:
        compute = compute_dtype([like.dtype])
        squares = torch.zeros(parameter.shape, dtype=compute, device=parameter.device)
    gradient = None
    if target.dtype is not None:
        gradient = torch.zeros(parameter.shape, dtype=target.dtype, device=parameter.device)
    return gradient, squares


def _parts(uses: Sequence[Any], rows: int) -> Iterator[tuple[slice, list[Any]]]:
    """Cut the parameter so that every use covers a part wholly or not at all.

    Args:
        uses: of some of its rows, or all.
        rows: how many there are.

    Yields:
        Each part that is used, and the uses of it alone.
    """
    spans = [(0, rows) if use.rows is None else (use.rows.start, use.rows.stop) for use in uses]
    cuts = sorted({cut for span in spans for cut in span})
    for start, stop in zip(cuts, cuts[1:], strict=False):
        own = [
            # Rows of the weight are columns of the error.
            replace(
                use,
                grad_output=use.grad_output[..., start - first : stop - first],
                rows=slice(start, stop),
            )
            for use, (first, last) in zip(uses, spans, strict=True)
            if first <= start and stop <= last
        ]
        if own:
            yield slice(start, stop), own


def _reduce_vectors(uses: Sequence[VectorUse], target: Target) -> Reduced:
    gradient, squares = _start(target, uses[0].grad_output)
    for place, own in _parts(uses, target.parameter.numel()):
        (e,), samples = _join([(use.grad_output,) for use in own], own, target.samples)
        made, _ = own[0].ops.vector(e, samples, target.dtype, squares.view(-1)[place])
        if gradient is not None:
            gradient.view(-1)[place] = made
    return gradient, squares


def _as_vector(use: VectorUse | GainUse) -> VectorUse:
    """Multiply a gain's error by the normalised input: what is left is a sum over rows."""
    if isinstance(use, VectorUse):
        return use
    normal = use.x.to(use.rstd.dtype)
    if use.mean is not None:
        normal = normal - use.mean.unsqueeze(-1)
    normal = normal * use.rstd.unsqueeze(-1)
    return VectorUse(use.ops, normal * use.grad_output, None, use.samples, use.tolerance)


def _reduce_matrices(uses: Sequence[ParamUse], target: Target) -> Reduced:
    """Linear layers, embeddings, and both at once: a tied embedding and output head.

    With g = h + k, the contributions of a sample by head and embedding, g^2 = h^2 + k^2 + 2 h k.
    """
    linear = [use for use in uses if isinstance(use, LinearUse)]
    lookups = [use for use in uses if isinstance(use, EmbeddingUse)]
    gradient, squares = _start(target, (linear or lookups)[0].grad_output)
    # Views: what is put into them is in the parameter's shape, too.
    flat = squares.flatten(0, -2)
    rows = len(flat)
    for place, own in _parts(linear, rows):
        pairs = [(use.activations, use.grad_output) for use in own]
        (a, e), samples = _join(pairs, own, target.samples)
        made, _ = own[0].ops.linear(a, e, samples, target.dtype, flat[place])
        if gradient is not None:
            gradient.flatten(0, -2)[place] = made
        if lookups:
            if place.stop - place.start < rows:
                raise RuntimeError("an embedding tied to a part of a weight is not supported")
            (ids, looked), joined = _join(list(map(_unpadded, lookups)), lookups, target.samples)
            add_cross_terms(squares, (a, e, samples), (ids, looked, joined))
    if lookups:
        (ids, e), samples = _join(list(map(_unpadded, lookups)), lookups, target.samples)
        made, _ = lookups[0].ops.embedding(ids, e, samples, rows, None, target.dtype, squares)
        if gradient is not None:
            gradient += made
    return gradient, squares


def _unpadded(use: EmbeddingUse) -> tuple[Tensor, Tensor]:
    """Clear the errors of padding, which may be another id for each use."""
    if use.padding_idx is None:
        return use.ids, use.grad_output
    return use.ids, torch.where((use.ids == use.padding_idx).unsqueeze(-1), 0.0, use.grad_output)


def _reduce_convolutions(uses: Sequence[ConvolutionUse], target: Target) -> Reduced:
    """Unfold the inputs: then the positions of all uses are rows of one linear layer."""
    groups = uses[0].groups
    gradient, squares = _start(target, uses[0].grad_output)
    patches = [_unfold(use) for use in uses]
    errors = [use.grad_output.flatten(2).unflatten(1, (groups, -1)).transpose(2, 3) for use in uses]
    width = len(target.parameter) // groups
    for g in range(groups):
        place = slice(g * width, (g + 1) * width)
        own = [(a[:, g], e[:, g]) for a, e in zip(patches, errors, strict=True)]
        (a, e), samples = _join(own, uses, target.samples)
        # A view: the operation adds to it in place.
        flat = squares[place].view(width, -1)
        made, _ = uses[0].ops.linear(a, e, samples, target.dtype, flat)
        if gradient is not None:
            gradient[place] = made.view(gradient[place].shape)
    return gradient, squares


def _unfold(use: ConvolutionUse, samples: slice = slice(None)) -> Tensor:
    """Return the pixels under the kernel, ``[batch, groups, positions, channels * kernel]``."""
    patches = F.unfold(use.x[samples], use.kernel_size, use.dilation, use.padding, use.stride)
    return patches.unflatten(1, (use.groups, -1)).transpose(2, 3)


def _join(
    parts: Sequence[tuple[Tensor, ...]], uses: Sequence[Any], of_call: Samples
) -> tuple[Sequence[Tensor], Samples]:
    """Concatenate the rows that each sample has in several sets of canonical tensors.

    Args:
        parts: the tensors of each use.
        uses: which these are of.
        of_call: the samples of uses that have none of their own.
    """
    samples = [samples_of(use, of_call) for use in uses]
    if len(parts) == 1:
        return parts[0], samples[0]
    if all(own.offsets is None for own in samples):
        columns = list(zip(*parts, strict=True))
        return [torch.cat(column, 1) for column in columns], of_call
    flat = [packed(part, own) for part, own in zip(parts, samples, strict=True)]
    columns = list(zip(*(part for part, _ in flat), strict=True))
    # Rows of one sample have to lie next to each other again.
    rows = zip(columns[0], (own for _, own in flat), strict=True)
    of_rows = torch.cat([own.of_rows(len(x)) for x, own in rows])
    order = torch.argsort(of_rows, stable=True)
    offsets = torch.stack([own.offsets for _, own in flat if own.offsets is not None]).sum(0)
    return [torch.cat(column)[order] for column in columns], Samples(of_call.count, offsets)
