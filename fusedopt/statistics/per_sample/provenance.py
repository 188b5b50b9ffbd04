"""Which sample each row of a layer's input comes from, read off autograd's graph.

Models flatten ``[batch, length, width]`` to rows, and route rows to experts by an index. The graph
of the input says so: it is followed back, over operations that keep rows apart, to an output of an
observed layer, or to a tensor that has the batch where the model keeps it. What the operations on
the way did to rows is then done to the samples.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# How many operations are looked at.
MOST_NODES = 100
_KEY = "fusedopt_rows"
# Row by row: an index of a dimension of the output depends on that index of the operands.
_ELEMENTWISE = frozenset(
    f"{name}Backward0"
    for name in (
        "Abs", "Add", "Alias", "Clone", "Div", "Elu", "Erf", "Exp", "Gelu", "Hardswish",
        "LeakyRelu", "MaskedFill", "Mul", "NativeDropout", "Neg", "Pow", "Relu", "Rsqrt",
        "Sigmoid", "Silu", "Softplus", "Sqrt", "Sub", "Tanh", "ToCopy",
    )
)  # fmt: skip
_ELEMENTWISE |= {"AddBackward1", "MulBackward1", "DivBackward1", "SubBackward1", "_ObserveBackward"}
_VIEWS = frozenset({"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"})


@dataclass(frozen=True)
class Rows:
    """Which sample each index of one dimension of a tensor belongs to.

    Attributes:
        dim: the dimension.
        each: how many indices every sample has, one after the other.
        of: or the sample of each index, int64.
    """

    dim: int
    each: int = 1
    of: Tensor | None = None


class Independent(Exception):
    """The input is computed from parameters alone."""


def note(output: Tensor, rows: Rows) -> None:
    """Note the rows of a layer's output, for the layers behind it."""
    node: Any = output.grad_fn
    if node is not None:
        node.metadata[_KEY] = rows


def rows_of(x: Tensor, count: int, batch_dim: int) -> Rows | None:
    """Follow a layer's input back to where its samples are known.

    Args:
        x: the input.
        count: the number of samples.
        batch_dim: where tensors of three and more dimensions keep the batch.

    Returns:
        The rows, or None where the graph does not tell.

    Raises:
        Independent: where it is made of parameters alone.
    """
    if x.grad_fn is None:
        if isinstance(x, nn.Parameter):
            raise Independent
        return _of_base(x, count, batch_dim)
    node: Any = x.grad_fn
    # Most layers stand right behind another.
    return node.metadata.get(_KEY) or _Search(count, batch_dim).run(x)


def _of_base(x: Tensor, count: int, batch_dim: int) -> Rows | None:
    """Return the rows of a tensor without a graph that is another one flattened."""
    base = x._base
    if base is None or base.dim() < 2 or batch_dim != 0 or base.shape[0] != count or not count:
        return None
    same = base.is_contiguous() and x.is_contiguous() and base.numel() == x.numel()
    if not same or x.shape[0] == count or x.shape[0] % count:
        return None
    # Rows must not be cut in the middle: as many as the leading dimensions of the base have.
    leading = 1
    for size in base.shape[:-1]:
        leading *= size
        if leading == x.shape[0]:
            return Rows(0, leading // count)
    return None


@dataclass(frozen=True)
class _Place:
    """An operation's output, and what of it leads to the tensor that was asked for."""

    node: Any
    index: int
    towards: _Place | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.node._input_metadata[self.index].shape)


class _Search:
    """A search through the graph, nearest operations first."""

    def __init__(self, count: int, batch_dim: int) -> None:
        self._count = count
        self._batch_dim = batch_dim

    def run(self, x: Tensor) -> Rows | None:
        waiting = deque([_Place(x.grad_fn, x.output_nr, None)])
        seen: set[Any] = set()
        alone, assumed = True, None
        while waiting and len(seen) < MOST_NODES:
            place = waiting.popleft()
            if (place.node, place.index) in seen:
                continue
            seen.add((place.node, place.index))
            variable = getattr(place.node, "variable", None)
            if isinstance(variable, nn.Parameter) or place.node.name() == "_EnterBackward":
                continue
            noted: Rows | None = place.node.metadata.get(_KEY)
            found = noted or self._assumed(place, variable)
            if found is not None:
                alone = False
                rows = self._along(found, place)
                if rows is not None and noted is not None:
                    return rows
                assumed = assumed or rows
                continue
            operands = _operands(place)
            if not operands or any(node is None for node, _ in operands):
                alone = False
            waiting.extend(_Place(node, i, place) for node, i in operands if node is not None)
        if alone and not waiting:
            raise Independent
        # Where the input has the batch as usual, what is assumed elsewhere has nothing to add.
        usual = self._batch_dim if x.dim() > 2 else 0
        return None if x.shape[usual] == self._count else assumed

    def _assumed(self, place: _Place, variable: Any) -> Rows | None:
        """Return the rows of an output at the end of the way, of which nothing is known."""
        name = place.node.name()
        known = name in _ELEMENTWISE or name in _VIEWS or name in _STEPS
        if known and name != "_ObserveBackward":
            return None
        # The batch is where it should be, if it can be nowhere else.
        shape = tuple(variable.shape) if isinstance(variable, Tensor) else place.shape
        certain = len(shape) > 2 and shape.count(self._count) == 1
        return Rows(self._batch_dim) if certain and shape[self._batch_dim] == self._count else None

    def _along(self, rows: Rows | None, place: _Place) -> Rows | None:
        """Do to the rows what the operations did between their tensor and the one asked for."""
        source = place
        while rows is not None and source.towards is not None:
            target = source.towards
            rows = self._step(rows, source.shape, target)
            source = target
        return rows

    def _step(self, rows: Rows, shape: tuple[int, ...], target: _Place) -> Rows | None:
        name = target.node.name()
        if name in _VIEWS:
            return self._viewed(rows, shape, target)
        if name in _STEPS:
            return _STEPS[name](rows, shape, target, self._count)
        # Broadcast against dimensions in front, or not at all.
        dim = rows.dim + len(target.shape) - len(shape)
        same = dim < len(target.shape) and target.shape[dim] == shape[rows.dim]
        return Rows(dim, rows.each, rows.of) if same else None

    def _viewed(self, rows: Rows, shape: tuple[int, ...], target: _Place) -> Rows | None:
        """Find the dimension of a view that holds the same indices, or several of each."""
        to = target.shape
        before, size = _product(shape[: rows.dim]), shape[rows.dim]
        passed = 1
        for dim, length in enumerate(to):
            if passed == before and length != 1 or (passed == before and size == 1):
                return self._resized(rows, shape, dim, to)
            passed *= length
        flattened = _leading(to[0], shape) if to else 0
        if flattened <= rows.dim:
            return None
        # Together with dimensions in front: an index of these has no sample of its own.
        device = target.node._input_metadata[target.index].device
        of = torch.arange(size, device=device) // rows.each if rows.of is None else rows.of
        behind = [1] * (flattened - rows.dim - 1)
        return Rows(0, of=of.view(-1, *behind).expand(shape[:flattened]).flatten())

    def _resized(
        self, rows: Rows, shape: tuple[int, ...], dim: int, to: tuple[int, ...]
    ) -> Rows | None:
        size, length = shape[rows.dim], to[dim]
        if length == size:
            return Rows(dim, rows.each, rows.of)
        if length > size and length % size == 0 and size:
            # Flattened with what follows.
            factor = length // size
            if not _ends_at(factor, shape[rows.dim + 1 :]):
                return None
            if rows.of is None:
                return Rows(dim, rows.each * factor)
            return Rows(dim, 1, rows.of.repeat_interleave(factor))
        if rows.of is None and length == self._count and size == self._count * rows.each:
            # Unflattened into samples and what each has.
            return Rows(dim) if _ends_at(rows.each, to[dim + 1 :]) else None
        return None


def _product(sizes: tuple[int, ...]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _leading(indices: int, sizes: tuple[int, ...]) -> int:
    """Return how many of the first dimensions together have so many indices; 0 if none do."""
    product = 1
    for i, size in enumerate(sizes):
        product *= size
        if product == indices:
            return i + 1
    return 0


def _ends_at(indices: int, sizes: tuple[int, ...]) -> bool:
    """Whether the first of some dimensions together have so many indices."""
    return _leading(indices, sizes) > 0


def _operands(place: _Place) -> list[tuple[Any, int]]:
    """Return those inputs of an operation that give it its rows."""
    inputs = list(place.node.next_functions)
    name = place.node.name()
    if name == "_ObserveBackward":
        return [inputs[place.index]]
    if name in ("AddmmBackward0", "LinearBackward0"):
        return [inputs[1] if name == "AddmmBackward0" else inputs[0]]
    if name in ("MmBackward0", "NativeLayerNormBackward0"):
        return inputs[:1]
    if name in _ELEMENTWISE or name in _VIEWS or name in _STEPS:
        return inputs
    return []


# What known operations do to the rows of their first operand.


def _signed(dim: int, dims: int) -> int:
    """Make a dimension that was saved without its sign a usual one."""
    return dim if dim < dims else dim - 2**64 + dims


def _kept(rows: Rows, shape: tuple[int, ...], target: _Place, count: int) -> Rows | None:
    """Products and norms over the last dimension."""
    return rows if rows.dim < len(shape) - 1 else None


def _transposed(rows: Rows, shape: tuple[int, ...], target: _Place, count: int) -> Rows:
    a, b = (_signed(d, len(shape)) for d in (target.node._saved_dim0, target.node._saved_dim1))
    return Rows({a: b, b: a}.get(rows.dim, rows.dim), rows.each, rows.of)


def _permuted(rows: Rows, shape: tuple[int, ...], target: _Place, count: int) -> Rows:
    dims = [_signed(dim, len(shape)) for dim in target.node._saved_dims]
    return Rows(dims.index(rows.dim), rows.each, rows.of)


def _unsqueezed(rows: Rows, shape: tuple[int, ...], target: _Place, count: int) -> Rows:
    dim = _signed(target.node._saved_dim, len(shape) + 1)
    return Rows(rows.dim + (dim <= rows.dim), rows.each, rows.of)


def _along_another(rows: Rows, shape: tuple[int, ...], target: _Place, count: int) -> Rows | None:
    """Cuts, joins and softmax along a dimension."""
    dim = _signed(target.node._saved_dim, len(shape))
    return rows if dim != rows.dim or target.shape == shape else None


def _selected(rows: Rows, shape: tuple[int, ...], target: _Place, count: int) -> Rows | None:
    """One index of a dimension, which is gone."""
    dim = _signed(target.node._saved_dim, len(shape))
    return None if dim == rows.dim else Rows(rows.dim - (dim < rows.dim), rows.each, rows.of)


def _looked_up(rows: Rows, shape: tuple[int, ...], target: _Place, count: int) -> Rows | None:
    """``index_select``."""
    if _signed(target.node._saved_dim, len(shape)) != rows.dim:
        return rows
    if _is_hooked():
        return None
    return Rows(rows.dim, 1, _taken(rows, target.node._saved_index, shape[rows.dim]))


def _indexed(rows: Rows, shape: tuple[int, ...], target: _Place, count: int) -> Rows | None:
    """``x[index]``: vectors of indices, or a mask, of dimensions that follow each other."""
    if _is_hooked():
        return None
    vectors: list[Tensor | None] = []
    for index in target.node._saved_indices:
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            vectors.append(index)
        else:
            vectors.extend(index.nonzero().unbind(1))
    used = [dim for dim, index in enumerate(vectors) if index is not None]
    if rows.dim not in used or used != list(range(used[0], used[-1] + 1)):
        return None
    own = vectors[rows.dim]
    if own is None or any(v is not None and v.shape != own.shape for v in vectors) or own.dim() > 1:
        return None
    return Rows(used[0], 1, _taken(rows, own, shape[rows.dim]))


def _taken(rows: Rows, index: Tensor, size: int) -> Tensor:
    # Negative ones count from the end.
    index = index.to(torch.int64).remainder(size)
    return rows.of[index] if rows.of is not None else index // rows.each


def _is_hooked() -> bool:
    """Whether what autograd saves is hooked (an activation checkpoint), and cannot be read."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


_STEPS: dict[str, Any] = {
    "AddmmBackward0": _kept,
    "MmBackward0": _kept,
    "LinearBackward0": _kept,
    "NativeLayerNormBackward0": _kept,
    "TransposeBackward0": _transposed,
    "PermuteBackward0": _permuted,
    "UnsqueezeBackward0": _unsqueezed,
    "SplitBackward0": _along_another,
    "SplitWithSizesBackward0": _along_another,
    "SliceBackward0": _along_another,
    "SoftmaxBackward0": _along_another,
    "SelectBackward0": _selected,
    "IndexSelectBackward0": _looked_up,
    "IndexBackward0": _indexed,
}
