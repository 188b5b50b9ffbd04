"""Experts whose weights are one parameter, and whose tokens are routed: those of transformers.

Each expert is a linear layer, of a part of the parameter and of the rows that were routed to it,
which know their samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .instrument import original_class
from .known import LayerOperations
from .operations import linear

_MODULE = "transformers.integrations.moe"


def is_experts(module: nn.Module) -> bool:
    """Whether a module is of a class that transformers' decorator has made experts of."""
    forward: Any = original_class(module).forward
    made = getattr(forward, "__globals__", {}).get("__name__") == _MODULE
    first = "gate_up_proj" if getattr(module, "has_gate", False) else "up_proj"
    names = {first, "down_proj"}
    if getattr(module, "has_bias", False):
        names |= {f"{name}_bias" for name in names}
    return (
        made
        and {name for name, _ in module.named_parameters()} == names
        and not getattr(module, "_is_expert_parallel", True)
        and not getattr(module, "has_post_expert_norm", False)
    )


def run(
    call: LayerOperations,
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Compute ``sum over its experts of weight * down(act(up(x)))`` of each token.

    Args:
        call: of the layer.
        module: the experts.
        hidden_states: ``[tokens, width]``.
        top_k_index: the experts of each token, ``[tokens, k]``.
        top_k_weights: their weights, of the same shape.
    """
    layer = call.layer
    samples = layer.samples_of_rows(hidden_states)
    up = module.gate_up_proj if module.has_gate else module.up_proj
    total = torch.zeros_like(
        hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32)
    )
    for expert in range(len(up)):
        token, choice = torch.where(top_k_index == expert)
        if len(token) == 0:
            continue
        x, rows = hidden_states[token], samples[token]
        x = _projected(
            layer, module, x, "gate_up_proj" if module.has_gate else "up_proj", expert, rows
        )
        x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
        x = _projected(layer, module, x, "down_proj", expert, rows)
        total = total.index_add(0, token, (x * top_k_weights[token, choice, None]).to(total.dtype))
    return total.to(hidden_states.dtype)


def _projected(
    layer: Any, module: Any, x: Tensor, name: str, expert: int, samples: Tensor
) -> Tensor:
    """Multiply by one expert's part of a weight, and add its part of a bias."""
    weight = getattr(module, name)
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    height, biases = weight.shape[1], 0 if bias is None else bias.shape[1]
    return linear(
        layer,
        x,
        weight,
        bias,
        slice(expert * height, (expert + 1) * height),
        None if bias is None else slice(expert * biases, (expert + 1) * biases),
        transposed=module.is_transposed,
        place=layer.place_rows(samples),
    )
