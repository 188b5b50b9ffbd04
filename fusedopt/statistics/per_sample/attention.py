"""``torch.nn.MultiheadAttention`` with its projections observed.

torch's own forward hands weights to one function that projects and attends, where no layer can be
observed. Here the four projections are linear layers, and what is between them is
``scaled_dot_product_attention``, or the same written out where attention weights are asked for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .layer_call import LayerCall
from .operations import linear, repeated


def attention(
    layer: LayerCall,
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attend; arguments and results are those of ``nn.MultiheadAttention.forward``."""
    if query.dim() != 3:
        raise RuntimeError(f"{layer.name} was called with one sample that has no batch dimension")
    if is_causal and attn_mask is None:
        raise RuntimeError(f"{layer.name}: is_causal=True is a hint about attn_mask, which is None")
    own = query, key, value
    if not module.batch_first:
        query, key, value = (x.transpose(0, 1) for x in own)
    layer = layer.in_order(batch_first=True)
    q, k, v = _project(layer, module, (query, key, value), own)
    mask = _mask(module, attn_mask, key_padding_mask, q)
    added = []
    if module.bias_k is not None and module.bias_v is not None:
        added.append((repeated(layer, module.bias_k), repeated(layer, module.bias_v)))
    if module.add_zero_attn:
        added.append((torch.zeros_like(k[:, :1]), torch.zeros_like(v[:, :1])))
    for key_row, value_row in added:
        k, v = torch.cat([k, key_row], 1), torch.cat([v, value_row], 1)
        mask = None if mask is None else F.pad(mask, (0, 1))
    q, k, v = (x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    dropout = module.dropout if module.training else 0.0
    weights = None
    if need_weights:
        y, weights = _attend(q, k, v, mask, dropout)
        if average_attn_weights:
            weights = weights.mean(1)
    elif is_causal and key_padding_mask is None and not added:
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    else:
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    # Time first in memory, as torch's own: dropout behind it then draws the same mask.
    layer = layer.in_order(batch_first=False)
    out = module.out_proj
    y = linear(layer, y.permute(2, 0, 1, 3).flatten(2), out.weight, out.bias)
    return (y.transpose(0, 1) if module.batch_first else y), weights


def _project(
    layer: LayerCall,
    module: nn.MultiheadAttention,
    inputs: tuple[Tensor, Tensor, Tensor],
    own: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, ...]:
    """Project query, key and value; what came in as one tensor goes through one product."""
    query, key, value = inputs
    bias, width = module.in_proj_bias, module.embed_dim
    if not module._qkv_same_embed_dim:
        weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
        return tuple(
            linear(layer, x, weight, bias, bias_rows=slice(i * width, (i + 1) * width))
            for i, (x, weight) in enumerate(zip(inputs, weights, strict=True))
        )
    weight = module.in_proj_weight
    if own[0] is own[1] and own[1] is own[2]:
        return linear(layer, query, weight, bias).chunk(3, -1)
    q = _packed(layer, query, weight, bias, 0, width)
    if own[1] is own[2]:
        return (q, *_packed(layer, key, weight, bias, width, 2 * width).chunk(2, -1))
    k = _packed(layer, key, weight, bias, width, width)
    return q, k, _packed(layer, value, weight, bias, 2 * width, width)


def _packed(
    layer: LayerCall, x: Tensor, weight: Tensor, bias: Tensor | None, start: int, width: int
) -> Tensor:
    """Use some rows of the packed projection."""
    rows = slice(start, start + width)
    return linear(layer, x, weight, bias, rows, rows)


def _mask(
    module: nn.MultiheadAttention,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    q: Tensor,
) -> Tensor | None:
    """Merge the masks into one that is added to the scores, or None."""
    masks = []
    if attn_mask is not None:
        # Two dimensions for all, or three with samples and heads as one.
        split = (-1, module.num_heads) if attn_mask.dim() == 3 else (1, 1)
        masks.append(_additive(attn_mask, q.dtype).view(*split, *attn_mask.shape[-2:]))
    if key_padding_mask is not None:
        masks.append(_additive(key_padding_mask, q.dtype)[:, None, None, :])
    return sum(masks[1:], masks[0]) if masks else None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -math.inf)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """Attention written out, because its weights are asked for."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    weights = (scores if mask is None else scores + mask).softmax(-1)
    if dropout > 0.0:
        weights = F.dropout(weights, dropout)
    return weights @ v, weights
