"""Operations on images and signals, ``[batch, channels, ...]``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ...memory.dtypes import compute_dtype
from .autograd import observe
from .layer_call import LayerCall
from .operations import present, tensor_of
from .uses import ConvolutionUse, VectorUse


def channel_norm(
    layer: LayerCall,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    forward: Callable[..., Tensor],
) -> Tensor:
    """A normalisation whose gain and bias belong to dimension 1."""
    chosen = layer.ops(x, x if weight is None else weight)
    w, b = layer.tap(weight, chosen), layer.tap(bias, chosen)
    layer.check_images(x)
    y = forward(tensor_of(weight, w), tensor_of(bias, b), x)

    def on_grad(errors: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
        (e,) = errors
        if w is not None:
            wide = compute_dtype([saved[0].dtype])
            with torch.autocast(e.device.type, enabled=False):
                product = forward(None, None, saved[0].to(wide)) * e
            w.add(VectorUse(chosen, _channels_last(product)))
        if b is not None:
            b.add(VectorUse(chosen, _channels_last(e)))

    return observe([y], on_grad, present(w, b), [] if w is None else [x.detach()])[0]


def _channels_last(e: Tensor) -> Tensor:
    """Bring ``[batch, channels, ...]`` into the form ``[batch, positions, channels]``."""
    e = e.movedim(1, -1)
    return e.unsqueeze(1) if e.dim() == 2 else e.flatten(1, -2)


def convolution(layer: LayerCall, module: Any, x: Tensor) -> Tensor:
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
    used = tensor_of(weight, w)
    assert used is not None
    # Backward must not read the module, which may have been changed since.
    stride, dilation, groups = module.stride, module.dilation, module.groups
    convolve = F.conv1d if dims == 1 else F.conv2d
    y = convolve(
        x, used, tensor_of(bias, b),
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
    return observe([y], on_grad, present(w, b), saved)[0]


def _pair(sizes: Sequence[int], height: int) -> tuple[int, int]:
    """Give a one-dimensional convolution a height."""
    return (height, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])
