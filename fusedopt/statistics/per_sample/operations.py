"""What layers are made of: operations that use parameters, each with what it notes in backward.

An operation computes its output as torch does. Where the kernels make the weight gradient, too, it
computes with a detached weight, so that autograd does not make it a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ...memory.dtypes import compute_dtype
from .autograd import ParamTap, observe
from .layer_call import LayerCall
from .placement import Placement
from .uses import EmbeddingUse, GainUse, LinearUse, VectorUse


def tensor_of(parameter: Tensor | None, tap: ParamTap | None) -> Tensor | None:
    """Return what a layer computes with."""
    return parameter if tap is None else tap.tensor


def present(*taps: ParamTap | None) -> list[ParamTap]:
    """Leave out those of parameters that are absent or frozen."""
    return [tap for tap in taps if tap is not None]


def linear(
    layer: LayerCall,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: slice | None = None,
    bias_rows: slice | None = None,
    transposed: bool = False,
    place: Placement | None = None,
) -> Tensor:
    """``x W^T + b`` with all rows of weight and bias, or some: packed projections come in parts.

    Args:
        layer: the call.
        x: ``[..., inputs]``.
        weight: ``[outputs, inputs]``; of one of more dimensions, all but the last are rows.
        bias: ``[outputs]``, or of more dimensions; or None.
        rows: of the weight.
        bias_rows: elements of the bias.
        transposed: whether the weight is ``[inputs, outputs]``, and the output ``x W + b``.
        place: where the samples are; found out without it.
    """
    chosen = layer.ops(x, weight)
    w, b = layer.tap(weight, chosen), layer.tap(bias, chosen)
    used_weight, used_bias = tensor_of(weight, w), tensor_of(bias, b)
    assert used_weight is not None
    if rows is not None:
        used_weight = used_weight.flatten(0, -2)[rows]
    if bias_rows is not None and used_bias is not None:
        used_bias = used_bias.flatten()[bias_rows]
    y = F.linear(x, used_weight.t() if transposed else used_weight, used_bias)
    placed = layer.place(x) if place is None else place

    def on_grad(errors: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
        e = placed.rows(errors[0])
        if w is not None:
            pair = placed.rows(saved[0]), e
            w.add(LinearUse(chosen, *(pair[::-1] if transposed else pair), rows, placed.samples))
        if b is not None:
            b.add(VectorUse(chosen, e, bias_rows, placed.samples))

    # Under autocast the product was one of narrow types, and so is the gradient's.
    saved = [] if w is None else [x.detach().to(y.dtype)]
    y = observe([y], on_grad, present(w, b), saved)[0]
    placed.note(y)
    return y


def repeated(layer: LayerCall, parameter: Tensor) -> Tensor:
    """A parameter ``[1, 1, width]`` once for each sample: ``[batch, 1, width]``."""
    chosen = layer.ops(parameter)
    p = layer.tap(parameter, chosen)
    used = tensor_of(parameter, p)
    assert used is not None

    def on_grad(errors: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
        assert p is not None
        p.add(VectorUse(chosen, layer.rows(errors[0])))

    y = used.expand(layer.call.samples.count, -1, -1)
    return observe([y], on_grad, present(p), [])[0]


def embedding(
    layer: LayerCall, ids: Tensor, weight: Tensor, padding_idx: int | None = None
) -> Tensor:
    """Rows of a table, ``W[ids]``; those of ``padding_idx`` have no gradient."""
    chosen = layer.ops(weight)
    w = layer.tap(weight, chosen)
    ids = layer.call.expand_ids(ids, layer.name)
    placed = layer.place(ids.unsqueeze(-1), ids.shape)
    used = tensor_of(weight, w)
    assert used is not None
    y = F.embedding(ids, used, padding_idx)

    def on_grad(errors: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
        assert w is not None
        own = placed.rows(saved[0].unsqueeze(-1)).squeeze(-1)
        w.add(EmbeddingUse(chosen, own, placed.rows(errors[0]), padding_idx, placed.samples))

    y = observe([y], on_grad, present(w), [ids])[0]
    placed.note(y)
    return y


def gain(layer: LayerCall, normal: Tensor, weight: Tensor, offset: float = 0.0) -> Tensor:
    """``normal * (w + offset)``, with a weight of the last dimension."""
    chosen = layer.ops(normal, weight)
    w = layer.tap(weight, chosen)
    used = tensor_of(weight, w)
    assert used is not None
    y = normal * (used + offset if offset else used)
    placed = layer.place(normal)

    def on_grad(errors: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
        assert w is not None
        e, x = placed.rows(errors[0]), placed.rows(saved[0])
        ones = x.new_ones(x.shape[:-1], dtype=compute_dtype([x.dtype]))
        w.add(GainUse(chosen, e, x, None, ones, placed.samples))

    y = observe([y], on_grad, present(w), [] if w is None else [normal.detach()])[0]
    placed.note(y)
    return y


def shift(layer: LayerCall, x: Tensor, bias: Tensor) -> Tensor:
    """``x + b``, with a bias of the last dimension."""
    chosen = layer.ops(x, bias)
    b = layer.tap(bias, chosen)
    used = tensor_of(bias, b)
    assert used is not None
    y = x + used
    placed = layer.place(x)

    def on_grad(errors: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
        assert b is not None
        b.add(VectorUse(chosen, placed.rows(errors[0]), None, placed.samples))

    y = observe([y], on_grad, present(b), [])[0]
    placed.note(y)
    return y


def normalise(
    layer: LayerCall,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    depth: int,
    forward: Callable[[Tensor | None, Tensor | None], Tensor],
    statistics: Callable[[Tensor], tuple[Tensor | None, Tensor]],
) -> Tensor:
    """A normalisation over the last ``depth`` dimensions, whose gain and bias have their shape."""
    chosen = layer.ops(x, x if weight is None else weight)
    w, b = layer.tap(weight, chosen), layer.tap(bias, chosen)
    y = forward(tensor_of(weight, w), tensor_of(bias, b))
    placed = layer.place(x if depth == 1 else x.flatten(-depth))

    def rows(t: Tensor) -> Tensor:
        return placed.rows(t.flatten(-depth))

    def on_grad(errors: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
        e = rows(errors[0])
        if w is not None:
            own = rows(saved[0])
            # Not kept from forward: it is one read of the input, and at any precision asked for.
            wide = own.to(compute_dtype([own.dtype]))
            w.add(GainUse(chosen, e, own, *statistics(wide), placed.samples))
        if b is not None:
            b.add(VectorUse(chosen, e, None, placed.samples))

    y = observe([y], on_grad, present(w, b), [] if w is None else [x.detach()])[0]
    if depth == 1:
        placed.note(y)
    return y
