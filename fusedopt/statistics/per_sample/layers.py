"""The layers of torch whose squares are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .images import channel_norm, convolution
from .known import LayerOperations, built_in
from .operations import normalise


@built_in(nn.Linear)
def _linear(call: LayerOperations, module: nn.Linear, x: Tensor) -> Tensor:
    return call.linear(x, module.weight, module.bias)


@built_in(nn.Embedding)
def _embedding(call: LayerOperations, module: nn.Embedding, ids: Tensor) -> Tensor:
    return call.embedding(ids, module.weight, module.padding_idx)


@built_in(nn.LayerNorm)
def _layer_norm(call: LayerOperations, module: nn.LayerNorm, x: Tensor) -> Tensor:
    shape, eps = module.normalized_shape, module.eps

    def statistics(rows: Tensor) -> tuple[Tensor | None, Tensor]:
        if rows.numel() == 0:
            # torch warns of the variance of nothing.
            return rows.new_zeros(rows.shape[:-1]), rows.new_zeros(rows.shape[:-1])
        variance, mean = torch.var_mean(rows, -1, correction=0)
        return mean, (variance + eps).rsqrt()

    def forward(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, shape, weight, bias, eps)

    weight, bias = module.weight, module.bias
    return normalise(call.layer, x, weight, bias, len(shape), forward, statistics)


@built_in(nn.RMSNorm)
def _rms_norm(call: LayerOperations, module: nn.RMSNorm, x: Tensor) -> Tensor:
    shape, given = module.normalized_shape, module.eps

    def statistics(rows: Tensor) -> tuple[Tensor | None, Tensor]:
        # torch's own default: the precision of the type that the input is widened to.
        eps = torch.finfo(rows.dtype).eps if given is None else given
        return None, (rows.square().mean(-1) + eps).rsqrt()

    def forward(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.rms_norm(x, shape, weight, given)

    return normalise(call.layer, x, module.weight, None, len(shape), forward, statistics)


@built_in(nn.GroupNorm)
def _group_norm(call: LayerOperations, module: nn.GroupNorm, x: Tensor) -> Tensor:
    groups, eps = module.num_groups, module.eps

    def forward(weight: Tensor | None, bias: Tensor | None, x: Tensor) -> Tensor:
        return F.group_norm(x, groups, weight, bias, eps)

    return channel_norm(call.layer, x, module.weight, module.bias, forward)


@built_in(nn.BatchNorm1d)
def _batch_norm(call: LayerOperations, module: Any, x: Tensor) -> Tensor:
    if module.training or module.running_mean is None:
        raise RuntimeError(coupled_message(call.layer.name, module))
    mean, variance, eps = module.running_mean, module.running_var, module.eps

    def forward(weight: Tensor | None, bias: Tensor | None, x: Tensor) -> Tensor:
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    return channel_norm(call.layer, x, module.weight, module.bias, forward)


@built_in(nn.Conv1d)
@built_in(nn.Conv2d)
def _convolution(call: LayerOperations, module: Any, x: Tensor) -> Tensor:
    return convolution(call.layer, module, x)


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
