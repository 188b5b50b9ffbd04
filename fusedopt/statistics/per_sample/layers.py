"""The layers whose squares are known, each with what it notes in backward.

A layer computes its output as it always does. Where the kernels make the weight gradient, too, it
computes with a detached weight, so that autograd does not make it a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ...memory.dtypes import compute_dtype
from .autograd import ParamTap, observe
from .layer_call import LayerCall
from .uses import ConvolutionUse, EmbeddingUse, GainUse, LinearUse, VectorUse


def _tensor(parameter: Tensor | None, tap: ParamTap | None) -> Tensor | None:
    return parameter if tap is None else tap.tensor


def _taps(*taps: ParamTap | None) -> list[ParamTap]:
    return [tap for tap in taps if tap is not None]


def linear(
    layer: LayerCall,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: slice | None = None,
    bias_rows: slice | None = None,
) -> Tensor:
    """``F.linear`` with all rows of weight and bias, or some: packed projections come in parts."""
    chosen = layer.ops(x, weight)
    w, b = layer.tap(weight, chosen), layer.tap(bias, chosen)
    used_weight, used_bias = _tensor(weight, w), _tensor(bias, b)
    assert used_weight is not None
    if rows is not None:
        used_weight = used_weight[rows]
    if bias_rows is not None and used_bias is not None:
        used_bias = used_bias[bias_rows]
    y = F.linear(x, used_weight, used_bias)
    layer.check_rows(x)

    def on_grad(errors: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
        e = layer.rows(errors[0])
        if w is not None:
            w.add(LinearUse(chosen, layer.rows(saved[0]), e, rows))
        if b is not None:
            b.add(VectorUse(chosen, e, bias_rows))

    # Under autocast the product was one of narrow types, and so is the gradient's.
    saved = [] if w is None else [x.detach().to(y.dtype)]
    return observe([y], on_grad, _taps(w, b), saved)[0]


def _linear(layer: LayerCall, module: nn.Linear, x: Tensor) -> Tensor:
    return linear(layer, x, module.weight, module.bias)


def repeated(layer: LayerCall, parameter: Tensor) -> Tensor:
    """A parameter ``[1, 1, width]`` once for each sample: ``[batch, 1, width]``."""
    chosen = layer.ops(parameter)
    p = layer.tap(parameter, chosen)
    used = _tensor(parameter, p)
    assert used is not None

    def on_grad(errors: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
        assert p is not None
        p.add(VectorUse(chosen, layer.rows(errors[0])))

    y = used.expand(layer.call.samples.count, -1, -1)
    return observe([y], on_grad, _taps(p), [])[0]


def _embedding(layer: LayerCall, module: nn.Embedding, ids: Tensor) -> Tensor:
    chosen = layer.ops(module.weight)
    w = layer.tap(module.weight, chosen)
    ids = layer.call.expand_ids(ids, layer.name)
    layer.check_rows(ids.unsqueeze(-1), ids.shape)
    used = _tensor(module.weight, w)
    assert used is not None
    # Backward must not read the module, which may have been changed since.
    padding_idx = module.padding_idx
    y = F.embedding(ids, used, padding_idx)

    def on_grad(errors: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
        assert w is not None
        own = layer.rows(saved[0].unsqueeze(-1)).squeeze(-1)
        w.add(EmbeddingUse(chosen, own, layer.rows(errors[0]), padding_idx))

    return observe([y], on_grad, _taps(w), [ids])[0]


def _layer_norm(layer: LayerCall, module: nn.LayerNorm, x: Tensor) -> Tensor:
    shape, eps = module.normalized_shape, module.eps

    def statistics(rows: Tensor) -> tuple[Tensor | None, Tensor]:
        if rows.numel() == 0:
            # torch warns of the variance of nothing.
            return rows.new_zeros(rows.shape[:-1]), rows.new_zeros(rows.shape[:-1])
        variance, mean = torch.var_mean(rows, -1, correction=0)
        return mean, (variance + eps).rsqrt()

    def forward(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, shape, weight, bias, eps)

    return _norm(layer, module, x, forward, statistics)


def _rms_norm(layer: LayerCall, module: nn.RMSNorm, x: Tensor) -> Tensor:
    shape, given = module.normalized_shape, module.eps

    def statistics(rows: Tensor) -> tuple[Tensor | None, Tensor]:
        # torch's own default: the precision of the type that the input is widened to.
        eps = torch.finfo(rows.dtype).eps if given is None else given
        return None, (rows.square().mean(-1) + eps).rsqrt()

    def forward(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.rms_norm(x, shape, weight, given)

    return _norm(layer, module, x, forward, statistics)


def _norm(
    layer: LayerCall,
    module: Any,
    x: Tensor,
    forward: Callable[[Tensor | None, Tensor | None], Tensor],
    statistics: Callable[[Tensor], tuple[Tensor | None, Tensor]],
) -> Tensor:
    """A normalisation over the last dimensions, whose gain and bias have their shape."""
    weight, bias = module.weight, getattr(module, "bias", None)
    chosen = layer.ops(x, weight)
    w, b = layer.tap(weight, chosen), layer.tap(bias, chosen)
    depth = len(module.normalized_shape)
    y = forward(_tensor(weight, w), _tensor(bias, b))

    def rows(t: Tensor) -> Tensor:
        return layer.rows(t.flatten(-depth))

    def on_grad(errors: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
        e = rows(errors[0])
        if w is not None:
            own = rows(saved[0])
            # Not kept from forward: it is one read of the input, and at any precision asked for.
            wide = own.to(compute_dtype([own.dtype]))
            w.add(GainUse(chosen, e, own, *statistics(wide)))
        if b is not None:
            b.add(VectorUse(chosen, e))

    layer.check_rows(x.flatten(-depth))
    return observe([y], on_grad, _taps(w, b), [] if w is None else [x.detach()])[0]


def _group_norm(layer: LayerCall, module: nn.GroupNorm, x: Tensor) -> Tensor:
    groups, eps = module.num_groups, module.eps

    def forward(weight: Tensor | None, bias: Tensor | None, x: Tensor) -> Tensor:
        return F.group_norm(x, groups, weight, bias, eps)

    return _channel_norm(layer, module, x, forward)


def _batch_norm(layer: LayerCall, module: Any, x: Tensor) -> Tensor:
    if module.training or module.running_mean is None:
        raise RuntimeError(coupled_message(layer.name, module))
    mean, variance, eps = module.running_mean, module.running_var, module.eps

    def forward(weight: Tensor | None, bias: Tensor | None, x: Tensor) -> Tensor:
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    return _channel_norm(layer, module, x, forward)


def coupled_message(name: str, module: nn.Module) -> str:
    """Say why a layer that mixes samples has no per-sample gradients, and what to do."""
    evaluate = "Put it into evaluation mode (eval() on that module), replace it by"
    if getattr(module, "track_running_stats", True) is False:
        # In evaluation mode, too.
        evaluate = "It keeps no running statistics (track_running_stats=False): replace it by"
    return (
        f"{name} ({type(module).__name__}) normalises over the batch, so that no sample has a"
        f" gradient of its own. {evaluate} GroupNorm or LayerNorm, or use MicroBatchSquares, for"
        " which the batch that is normalised over is the sample"
    )


def _channel_norm(
    layer: LayerCall, module: Any, x: Tensor, forward: Callable[..., Tensor]
) -> Tensor:
    """A normalisation whose gain and bias belong to dimension 1."""
    weight, bias = module.weight, module.bias
    chosen = layer.ops(x, x if weight is None else weight)
    w, b = layer.tap(weight, chosen), layer.tap(bias, chosen)
    layer.check_images(x)
    y = forward(_tensor(weight, w), _tensor(bias, b), x)

    def on_grad(errors: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
        (e,) = errors
        if w is not None:
            wide = compute_dtype([saved[0].dtype])
            with torch.autocast(e.device.type, enabled=False):
                product = forward(None, None, saved[0].to(wide)) * e
            w.add(VectorUse(chosen, _channels_last(product)))
        if b is not None:
            b.add(VectorUse(chosen, _channels_last(e)))

    return observe([y], on_grad, _taps(w, b), [] if w is None else [x.detach()])[0]


def _channels_last(e: Tensor) -> Tensor:
    """Bring ``[batch, channels, ...]`` into the form ``[batch, positions, channels]``."""
    e = e.movedim(1, -1)
    return e.unsqueeze(1) if e.dim() == 2 else e.flatten(1, -2)


def _convolution(layer: LayerCall, module: Any, x: Tensor) -> Tensor:
    """A convolution in one or two dimensions."""
    weight, bias = module.weight, module.bias
    chosen = layer.ops(x, weight)
    w, b = layer.tap(weight, chosen), layer.tap(bias, chosen)
    layer.check_images(x)
    dims = weight.dim() - 2
    if x.dim() != dims + 2:
        raise RuntimeError(f"{layer.name} was called with one sample that has no batch dimension")
    padding = module.padding
    if module.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode), (0,) * dims
    used = _tensor(weight, w)
    assert used is not None
    # Backward must not read the module, which may have been changed since.
    stride, dilation, groups = module.stride, module.dilation, module.groups
    convolve = F.conv1d if dims == 1 else F.conv2d
    y = convolve(
        x, used, _tensor(bias, b),
        stride, padding, dilation, groups,
    )  # type: ignore[arg-type]  # fmt: skip

    def on_grad(errors: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
        (e,) = errors
        if w is not None:
            own, error = (t.unsqueeze(2) if dims == 1 else t for t in (saved[0], e))
            kernel, strides = _pair(weight.shape[2:], 1), _pair(stride, 1)
            geometry = kernel, strides, _pair(padding, 0), _pair(dilation, 1)
            w.add(ConvolutionUse(chosen, own, error, *geometry, groups))
        if b is not None:
            b.add(VectorUse(chosen, _channels_last(e)))

    saved = [] if w is None else [x.detach().to(y.dtype)]
    return observe([y], on_grad, _taps(w, b), saved)[0]


def _pair(sizes: Sequence[int], height: int) -> tuple[int, int]:
    """Give a one-dimensional convolution a height."""
    return (height, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])


Forward = Callable[..., Any]

# By the function that a class runs: a subclass with a forward of its own is another layer.
KNOWN: dict[Any, Forward] = {
    nn.Linear.forward: _linear,
    nn.Embedding.forward: _embedding,
    nn.LayerNorm.forward: _layer_norm,
    nn.RMSNorm.forward: _rms_norm,
    nn.GroupNorm.forward: _group_norm,
    nn.BatchNorm1d.forward: _batch_norm,
    nn.Conv1d.forward: _convolution,
    nn.Conv2d.forward: _convolution,
}
