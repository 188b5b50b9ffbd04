"""How squares ride on autograd: taps in front of parameters, observers behind layers.

    parameter --> tap --+--> layer --> observer -->      one use of the parameter
                        +--> layer --> observer -->      another one, if it is shared

In backward an observer notes the layer's input and the gradient of its output. Autograd runs a
tap once, after everything behind it: at that moment all uses of the parameter have arrived, and
contributions of one sample can be summed over uses before they are squared. Nothing is kept that
autograd would not keep (saved tensors are saved by autograd, so that activation checkpointing and
offloading see them), and no hook has to guess when a parameter is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...memory.dtypes import compute_dtype
from ...tracing import untraced
from .record import Record
from .reduce import reduce as reduce_uses
from .sample_count import SampleCount
from .uses import ParamUse, Target

OnGrad = Callable[[Sequence[Tensor], Sequence[Tensor]], None]


class Mode(Enum):
    """How a parameter's gradient is made.

    ``FUSED``: by the kernel that makes the squares. The layer computes with a detached parameter,
    so that autograd neither makes the gradient nor keeps the layer's input for it.
    ``AUTOGRAD``: by autograd, through the tap.
    ``BESIDE``: by autograd, past the tap: the module reads its parameter itself.
    """

    FUSED = auto()
    AUTOGRAD = auto()
    BESIDE = auto()


class ParamTap:
    """One parameter in one call of the model.

    Args:
        record: where the parameter's squares are gathered.
        call: the samples of the call.
        mode: see ``Mode``.
        unplaced: whether it is not known which call of the model this is a part of.
    """

    def __init__(self, record: Record, call: SampleCount, mode: Mode, unplaced: bool) -> None:
        self.record = record
        self.call = call
        self.mode = mode
        self.uses: list[ParamUse] = []
        self._backward = -1
        self._unplaced = unplaced
        if record.due:
            record.watch()
        record.gated = True
        parameter = record.leaf
        assert parameter is not None
        alias, self.order_token = _Enter.apply(parameter, self)  # type: ignore[no-untyped-call]
        self.tensor: Tensor = parameter.detach() if mode is Mode.FUSED else alias

    def close(self) -> None:
        """Let go of the graph: no further use follows in this call of the model."""
        del self.order_token, self.tensor

    def begin(self) -> None:
        """Note that a layer behind this is about to add a use.

        Raises:
            RuntimeError: where it is not known of which call of the model.
        """
        if self._unplaced:
            raise RuntimeError(
                "an activation checkpoint with use_reentrant=True was run again while several calls"
                " of the model wait for their backward passes, and does not say of which it is a"
                " part: pass use_reentrant=False to torch.utils.checkpoint, or call backward (or"
                " let go of what the model returned) before the next call"
            )
        backward = torch._C._current_graph_task_id()
        self.call.backwards.add(backward)
        if backward != self._backward:
            # What is there was left by a backward pass that did not reach the parameter.
            self._backward, self.uses = backward, []

    def add(self, use: ParamUse) -> None:
        """Note a use whose gradient has arrived."""
        self.uses.append(use)

    def finish(self, gradient: Tensor | None) -> Tensor | None:
        """Reduce all uses: add to the squares, and return the parameter's gradient."""
        uses, self.uses = self.uses, []
        if not uses:
            return gradient
        self.call.finish(id(self.record), self.record.name)
        fused = self.mode is Mode.FUSED
        parameter = self.record.leaf
        assert parameter is not None
        dtype = parameter.dtype if fused else None
        tolerance = max(getattr(use, "tolerance", 0.0) for use in uses)
        if self.mode is Mode.BESIDE and tolerance > 0.0:
            # To be held against what autograd makes.
            dtype = compute_dtype([parameter.dtype])
        pending = self.record.pending()
        target = Target(parameter, self.call.samples, dtype, pending)
        made, squares, total = reduce_uses(uses, target)
        if not fused and dtype is not None and total is None:
            total = made
        gradient = made if fused else gradient
        if not self.record.due:
            # Another parameter of its layer is.
            return gradient
        self.record.propose(squares, self.call)
        if total is not None:
            # No sample's share is larger than the root of all squares.
            scale = (squares.sum() * target.samples.count).sqrt()
            self.record.expect_sum(total, scale * tolerance)
        else:
            self.record.expect(gradient, known=self.mode is not Mode.BESIDE)
        return gradient


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse ``create_graph=True``: what is handed on has no derivative that would be right."""
    once = once_differentiable(backward)

    @untraced
    def run(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "backward with create_graph=True through a call that PerSampleSquares observes:"
                " second derivatives are not known there. Call the model for it (a gradient"
                " penalty, a Hessian) within statistics.paused()"
            )
        return once(ctx, *gradients)

    return run


class _Enter(torch.autograd.Function):
    """Hand out an alias of the parameter, and a token that orders the graph."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, tap: ParamTap) -> tuple[Tensor, Tensor]:
        ctx.tap = tap
        ctx.set_materialize_grads(False)
        return parameter.view_as(parameter), parameter.new_zeros(())

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor | None, _: Tensor | None) -> Any:
        return ctx.tap.finish(gradient), None


def observe(
    outputs: Sequence[Tensor], on_grad: OnGrad, taps: Sequence[ParamTap], saved: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Return the outputs; in backward call ``on_grad(their gradients, saved)`` before any tap.

    Args:
        outputs: of a layer, of floating type.
        on_grad: notes the use at the taps.
        taps: of the layer's parameters; without any there is nothing to observe.
        saved: tensors that ``on_grad`` needs, kept as autograd keeps them.
    """
    if not taps:
        return tuple(outputs)
    order_tokens = [tap.order_token for tap in taps]
    observed: tuple[Tensor, ...] = _Observe.apply(  # type: ignore[no-untyped-call]
        on_grad, taps, len(outputs), *outputs, *order_tokens, *saved
    )
    return observed


class _Observe(torch.autograd.Function):
    """The identity, which notes the gradients that pass."""

    @staticmethod
    def forward(
        ctx: Any, on_grad: OnGrad, taps: Sequence[ParamTap], n_outputs: int, *rest: Tensor
    ) -> Any:
        start = n_outputs + len(taps)
        ctx.on_grad, ctx.taps = on_grad, taps
        ctx.zeros = [token.detach() for token in rest[n_outputs:start]]
        ctx.n_saved = len(rest) - start
        ctx.save_for_backward(*rest[start:])
        # Not the tensors themselves, of which autograd would make views that no later layer may
        # write to.
        return tuple(y.detach() for y in rest[:n_outputs])

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        for tap in ctx.taps:
            tap.begin()
        ctx.on_grad(gradients, ctx.saved_tensors)
        return (None, None, None, *gradients, *ctx.zeros, *([None] * ctx.n_saved))
