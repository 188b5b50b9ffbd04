"""The reference backend: every rule's PyTorch twin, tensor by tensor, on any device.

Large tensors go through the twin in pieces that stay in the processor's cache, so each byte is
read from memory once, not once an operation.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..coefficients import Table
from ..kernels.rule import Rule
from ..kernels.telemetry import COUNT, UNWRITTEN
from ..kernels.weight_average import follow_twin
from ..memory.dtypes import compute_dtype, decode, real_dtype
from ..memory.layout import is_dense, real_view
from .entry import Entries, Inputs
from .kept import PIECE_OF_THREAD, Kept, Piece
from .reference_guard import decide


class ReferenceExecutor:
    """The entries of one device; see ``fusedopt.backends.Executor``."""

    def __init__(
        self, rule: Rule, device: torch.device, entries: Sequence[Entries], measures: bool = False
    ) -> None:
        self.rule = rule
        self.device = device
        memories = [
            Kept(own, row, dtypes)
            for own in entries
            for row, dtypes in enumerate(own.dtypes)
            if own.params[row].numel()
        ]
        # Parameters that share memory are updated in the order in which they were given.
        self.memories = sorted(memories, key=operator.attrgetter("position"))
        # Of each entry, the squared norms of gradient, parameter and update.
        self._squares: Tensor | None = None
        if measures:
            count = sum(len(own.params) for own in entries)
            self._squares = torch.zeros(count, COUNT, dtype=torch.float64, device=device)
            for memory in self.memories:
                self._squares[memory.position].fill_(UNWRITTEN)

    def move_inputs(self, inputs: Inputs) -> None:
        pass

    def partial_norms(self, inputs: Inputs, inverse_scale: Tensor, infinity_norm: bool) -> Tensor:
        order = float("inf") if infinity_norm else 2.0
        norms = []
        for memory in self.memories:
            for piece in _pieces(real_view(inputs[0][memory.position])):
                gradient = decode(piece, memory.compute)
                norms.append(torch.linalg.vector_norm(gradient, order).double())
        if not norms:
            return torch.zeros(1, dtype=torch.float64, device=self.device)
        partials = torch.stack(norms) * inverse_scale
        return partials if infinity_norm else partials.square()

    def norm_weights(self, weights: Sequence[float]) -> Tensor:
        found = []
        for memory in self.memories:
            # A gradient has as many pieces as the parameter.
            found += [weights[memory.position]] * len(list(_pieces(memory.tensors[0])))
        return torch.tensor(found or [1.0], dtype=torch.float64, device=self.device)

    def clip_factor(
        self,
        partials: Tensor,
        inverse_scale: Tensor,
        max_norm: Tensor,
        control: Tensor,
        norm: Tensor,
        infinity_norm: bool,
    ) -> None:
        norm_of(partials, inverse_scale, max_norm, control, norm, infinity_norm)

    def guarded_factor(
        self,
        partials: Tensor,
        inverse_scale: Tensor,
        max_norm: Tensor,
        control: Tensor,
        norm: Tensor,
        infinity_norm: bool,
        record: Tensor,
        min_steps: int,
        scaled: bool,
    ) -> None:
        value = norm_of(partials, inverse_scale, max_norm, control, norm, infinity_norm)
        decide(value, control, record, min_steps, scaled)

    def memory(self) -> Iterator[Tensor]:
        # The allocator sees every use by PyTorch's own operations.
        return iter(())

    def release(self) -> None:
        pass

    def squares(self) -> Tensor:
        assert self._squares is not None
        return self._squares.clone()

    def update(self, inputs: Inputs, table: Table, control: Tensor, measured: bool = False) -> None:
        scale: Any
        skip: Any
        unclipped: Any
        if self.device.type == "cpu":
            scale, skip, unclipped = control.tolist()
            if skip:
                return
        else:
            scale, skip, unclipped = control[0], control[1] != 0, control[2]
        for memory in self.memories:
            row = table.rows[table.row_of[memory.position]]
            own = [real_view(kind[memory.position]) for kind in inputs]
            if memory.per_sample_inputs:
                own = list(reduce_samples(memory.tensors[0], own))
            memory.begin(row[-1])
            # With the weight of the average behind them.
            coefficients = row[: self.rule.n_coefficients + memory.averages]
            sums = torch.zeros(COUNT, dtype=torch.float64, device=self.device) if measured else None
            for piece, values in memory.pieces(own):
                if sums is not None:
                    gradient = _scaled(decode(values[0], memory.compute), unclipped, 1)
                    sums[0] += _sum_of_squares(gradient)
                self._update(memory, piece, values, coefficients, scale, skip, sums)
            if sums is not None and self._squares is not None:
                kept = self._squares[memory.position]
                kept.copy_(torch.where(skip, kept, sums) if isinstance(skip, Tensor) else sums)

    def _update(
        self,
        memory: Kept,
        piece: Piece,
        inputs: Sequence[Tensor],
        coefficients: tuple[Any, ...],
        scale: Any,
        skip: Any,
        sums: Tensor | None,
    ) -> None:
        # The twin may overwrite its arguments, which can be the memory itself.
        old = [t.clone() for t in piece.tensors] if isinstance(skip, Tensor) else []
        p, states = memory.load(piece)
        before = None if sums is None else p.clone()
        scaled = tuple(
            _scaled(decode(x, memory.compute), scale, degree)
            for x, degree in zip(inputs, self.rule.degrees, strict=True)
        )
        average: tuple[Tensor, ...] = ()
        if memory.averages:
            *own, last = states
            *of_rule, weight = coefficients
            p, new_states = self.rule.twin(p, scaled, tuple(own), tuple(of_rule), memory.options)
            average = (follow_twin(last, p, weight),)
        else:
            p, new_states = self.rule.twin(p, scaled, states, coefficients, memory.options)
        if sums is not None and before is not None:
            sums[1] += _sum_of_squares(p)
            sums[2] += _sum_of_squares(p - before)
        memory.store(piece, p, (*new_states, *average))
        for target, kept in zip(piece.tensors, old, strict=False):
            target.copy_(_chosen(skip, kept, target))


def norm_of(
    partials: Tensor,
    inverse_scale: Tensor,
    max_norm: Tensor,
    control: Tensor,
    norm: Tensor,
    infinity_norm: bool,
) -> Tensor:
    """Write the norm and the factor, as ``Executor.clip_factor``; return the norm in float64."""
    value = partials.max() if infinity_norm else partials.sum().sqrt()
    factor = torch.clamp(max_norm / (value + 1e-6), max=1.0)
    control[:1].copy_(factor * inverse_scale)
    norm.copy_(value)
    return value


class ReferenceSums:
    """See ``fusedopt.backends.Sums``."""

    def add(
        self, sums: Sequence[Tensor], gradients: Sequence[Tensor], begun: Sequence[bool]
    ) -> None:
        for total, gradient, old in zip(sums, gradients, begun, strict=True):
            if old:
                total.add_(gradient)
            else:
                total.copy_(gradient)


def _chosen(skip: Tensor, before: Tensor, after: Tensor) -> Tensor:
    if after.dtype != torch.float8_e4m3fn:
        return torch.where(skip, before, after)
    # torch has no choice between 8-bit floats.
    patterns = torch.where(skip, before.view(torch.uint8), after.view(torch.uint8))
    return patterns.view(after.dtype)


def _sum_of_squares(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float64).square()


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Cut what is to be summed in float32 on a processor.

    There torch adds so many squares to one number that, from ten million on, most of a square is
    rounded off: the norm of forty million is 0.3 % too small.
    """
    if tensor.device.type != "cpu" or tensor.numel() <= PIECE_OF_THREAD:
        yield tensor
        return
    flat = tensor.as_strided((tensor.numel(),), (1,)) if is_dense(tensor) else tensor.reshape(-1)
    for piece in flat.split(PIECE_OF_THREAD):
        # Of neighbours in memory, eight at a time are added to numbers of their own.
        yield piece.contiguous()


def reduce_samples(parameter: Tensor, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sum samples ``[batch, *param.shape]`` and their squares, never all of them at once."""
    compute = compute_dtype([real_dtype(t.dtype) for t in (parameter, *parts)])
    total = torch.zeros_like(parameter, dtype=parts[0].dtype if parts[0].is_complex() else compute)
    squares = torch.zeros_like(total)
    size = max(1, PIECE_OF_THREAD // max(1, parameter.numel()))
    for part in parts:
        for some in part.split(size):
            some = some.to(total.dtype)
            total.add_(some.sum(0))
            squares.add_(_squared(some).sum(0))
    return total, squares


def _squared(x: Tensor) -> Tensor:
    # Complex numbers are pairs of reals, each with a square of its own.
    if x.is_complex():
        return torch.complex(x.real.square(), x.imag.square())
    return x.square()


def _scaled(x: Tensor, scale: Any, degree: int) -> Tensor:
    if isinstance(scale, Tensor):
        return x * scale.to(x.dtype) ** degree
    return x if scale == 1.0 else x * scale**degree
