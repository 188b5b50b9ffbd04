"""Which module answers for a parameter: the one that reads it when it is called."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .instrument import original_class

# What the known layers read, by name.
_READ = (
    "weight", "bias", "in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight",
    "v_proj_weight", "bias_k", "bias_v",
)  # fmt: skip


def is_container(module: nn.Module) -> bool:
    """Whether a module is never called itself: ParameterList, ParameterDict and the like."""
    return original_class(module).forward is nn.Module.forward


def computes_weights(module: nn.Module) -> bool:
    """Whether what a module computes with is itself computed from parameters.

    By a parametrization, or by a hook that sets an attribute anew at every call: pruning, and the
    older weight and spectral norms.
    """
    if nn.utils.parametrize.is_parametrized(module):
        return True
    if isinstance(module, nn.MultiheadAttention) and computes_weights(module.out_proj):
        return True
    return any(True for _ in set_by_hooks(module))


def set_by_hooks(module: nn.Module) -> Iterator[str]:
    """Name the attributes of a layer that are tensors, but none of its parameters."""
    for name in _READ:
        if isinstance(module.__dict__.get(name), Tensor) or module._buffers.get(name) is not None:
            yield name


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that a module answers for.

    Its own, those that parametrise them, those of containers in it, which nobody calls, and, where
    attention goes through torch.func, those of its output, which attention reads by itself.
    """
    own = dict(module.named_parameters(recurse=False))
    if nn.utils.parametrize.is_parametrized(module):
        inner: Any = module.parametrizations
        own |= {f"parametrizations.{name}": p for name, p in inner.named_parameters()}
    for name, child in module.named_children():
        if is_container(child) and child is not getattr(module, "parametrizations", None):
            own |= {f"{name}.{key}": p for key, p in own_parameters(child).items()}
    if isinstance(module, nn.MultiheadAttention) and computes_weights(module):
        own |= {f"out_proj.{key}": p for key, p in own_parameters(module.out_proj).items()}
    return own
