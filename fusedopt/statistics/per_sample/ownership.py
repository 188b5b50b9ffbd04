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
    """Return the parameters that a module answers for, each once.

    Its own, those that parametrise them, those of containers in it, which nobody calls, and, where
    attention goes through torch.func, those of its output, which attention reads by itself.
    """
    own: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, p in every_name(module):
        if id(p) not in seen:
            seen.add(id(p))
            own[name] = p
    return own


def every_name(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name the parameters that a module answers for by every name that they have."""
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    parametrized = nn.utils.parametrize.is_parametrized(module)
    if parametrized:
        inner: Any = module.parametrizations
        for name, p in inner.named_parameters(remove_duplicate=False):
            yield f"parametrizations.{name}", p
    within = [(name, child) for name, child in module.named_children() if is_container(child)]
    if isinstance(module, nn.MultiheadAttention) and computes_weights(module):
        within.append(("out_proj", module.out_proj))
    for name, child in within:
        if not (parametrized and name == "parametrizations"):
            for key, p in every_name(child):
                yield f"{name}.{key}", p
