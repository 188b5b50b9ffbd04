"""The reference backend: every rule's PyTorch twin, tensor by tensor, on any device.

Large tensors go through the twin in pieces that stay in the processor's cache, so each byte is
read from memory once, not once an operation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..codecs import decode, encode
from ..coefficients import Table
from ..kernels.rule import Rule
from ..layout import is_dense, real_view, same_order
from . import Inputs, Slot

# Elements a piece: half a dozen float32 temporaries of this size fit into a second-level cache,
# and it is large enough for PyTorch to use all threads.
PIECE = 1 << 18


class ReferencePart:
    """The slots of one device; see ``fusedopt.backends.Part``."""

    def __init__(self, rule: Rule, device: torch.device, slots: Sequence[Slot]) -> None:
        self.rule = rule
        self.device = device
        self.slots = [(replace(slot, inputs=()), slot.compute) for slot in slots]

    def move_inputs(self, inputs: Inputs) -> None:
        pass

    def partial_norms(self, inputs: Inputs, inverse_scale: Tensor, infinity_norm: bool) -> Tensor:
        order = float("inf") if infinity_norm else 2.0
        norms = []
        for slot, compute in self.slots:
            if slot.param.numel() == 0:
                continue
            gradient = decode(real_view(inputs[0][slot.position]), compute)
            norms.append(torch.linalg.vector_norm(gradient, order).double())
        if not norms:
            return torch.zeros(1, dtype=torch.float64, device=self.device)
        partials = torch.stack(norms) * inverse_scale
        return partials if infinity_norm else partials.square()

    def clip_factor(
        self,
        partials: Tensor,
        inverse_scale: Tensor,
        max_norm: Tensor,
        control: Tensor,
        norm: Tensor,
        infinity_norm: bool,
    ) -> None:
        value = partials.max() if infinity_norm else partials.sum().sqrt()
        factor = torch.clamp(max_norm / (value + 1e-6), max=1.0)
        control[:1].copy_(factor * inverse_scale)
        norm.copy_(value)

    def update(self, inputs: Inputs, table: Table, control: Tensor) -> None:
        scale: Any
        skip: Any
        if self.device.type == "cpu":
            scale, skip = control.tolist()
            if skip:
                return
        else:
            scale, skip = control[0], control[1] != 0
        for slot, compute in self.slots:
            coefficients = table.rows[table.row_of[slot.position]]
            full = replace(slot, inputs=tuple(kind[slot.position] for kind in inputs))
            for operands in _pieces(full):
                self._update(operands, full, compute, coefficients, scale, skip)

    def _update(
        self,
        operands: Sequence[Tensor],
        slot: Slot,
        compute: torch.dtype,
        coefficients: tuple[Any, ...],
        scale: Any,
        skip: Any,
    ) -> None:
        n_inputs = len(slot.inputs)
        values = [decode(x, compute) for x in operands]
        memory = (operands[0], *operands[1 + n_inputs :])
        # The twin may overwrite its arguments, which can be the memory itself.
        old = [x.clone() for x in memory] if isinstance(skip, Tensor) else []
        inputs = tuple(
            _scaled(x, scale, degree)
            for x, degree in zip(values[1 : 1 + n_inputs], self.rule.degrees, strict=True)
        )
        states = tuple(values[1 + n_inputs :])
        p, states = self.rule.twin(values[0], inputs, states, coefficients, slot.options)
        for target, new in zip(memory, (p, *states), strict=True):
            encode(target, new)
        for target, before in zip(memory, old, strict=False):
            torch.where(skip, before, target, out=target)


def _scaled(x: Tensor, scale: Any, degree: int) -> Tensor:
    if isinstance(scale, Tensor):
        return x * scale.to(x.dtype) ** degree
    return x if scale == 1.0 else x * scale**degree


def _pieces(slot: Slot) -> Iterator[Sequence[Tensor]]:
    """Yield the operands, whole or cut into pieces where they lie in the same order."""
    if slot.param.numel() == 0:
        return
    views = [real_view(t) for t in slot.operands]
    param = views[0]
    cuttable = is_dense(param) and all(same_order(param, t) for t in views[1:])
    if param.numel() <= PIECE or not cuttable:
        yield views
        return
    flat = [t.as_strided((t.numel(),), (1,)) for t in views]
    for start in range(0, param.numel(), PIECE):
        yield [t[start : start + PIECE] for t in flat]
