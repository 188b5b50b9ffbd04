"""Whether a function that stands for a layer's forward computes what the layer does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .known import Known, LayerOperations
from .layer_call import LayerCall
from .replay import Alone

# Share of an output's norm by which a function may differ from the layer: a few roundings.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
_ROUGH = 3e-2


class Registered:
    """Runs a registered function in the place of a module, and compares the two at first.

    Args:
        known: the function.
    """

    def __init__(self, known: Known) -> None:
        self._known = known
        self._agreed: set[tuple[Any, ...]] = set()

    def __call__(
        self, layer: LayerCall, module: nn.Module, plain: Any, arguments: Any, keywords: Any
    ) -> Any:
        """Run the function."""
        operations = LayerOperations(layer)
        if self._known.built_in:
            # The input is the one argument, whatever the layer calls it.
            return self._known.function(operations, module, *arguments, *keywords.values())
        device = next((p.device.type for p in module.parameters()), "cpu")
        autocast = torch.is_autocast_enabled(device)
        mode = module.training, autocast, torch.get_autocast_dtype(device) if autocast else None
        own = None
        if mode not in self._agreed:
            own = _own_outputs(layer, module, arguments, keywords)
        result = self._known.function(operations, module, *arguments, **keywords)
        if own is not None and _compare(layer, module, own, result, autocast):
            self._agreed.add(mode)
        return result


def _own_outputs(layer: LayerCall, module: nn.Module, arguments: Any, keywords: Any) -> list[Any]:
    """Run the module's own forward, which leaves no marks on it and on the random numbers."""
    copies = {f"inner.{name}": b.detach().clone() for name, b in module.named_buffers()}
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    leaves, _ = tree_flatten((arguments, keywords))
    versions = [x._version for x in leaves if isinstance(x, Tensor)]
    with torch.no_grad(), torch.random.fork_rng(devices), layer.call.options.paused():
        result = torch.func.functional_call(Alone(module), copies, arguments, keywords)
    if versions != [x._version for x in leaves if isinstance(x, Tensor)]:
        raise RuntimeError(
            f"{layer.name} ({type(module).__name__}) writes to its inputs, and cannot be registered"
        )
    return [y.clone() if isinstance(y, Tensor) else y for y in tree_flatten(result)[0]]


def _compare(
    layer: LayerCall, module: nn.Module, own: list[Any], result: Any, autocast: bool
) -> bool:
    """Return whether outputs were found to be equal; raise RuntimeError where they differ."""
    outputs, _ = tree_flatten(result)
    finite = all(bool(y.isfinite().all()) for y in own if isinstance(y, Tensor))
    if len(outputs) == len(own) and not finite:
        # What is not finite says nothing.
        return False
    equal = (_same(a, b, autocast) for a, b in zip(own, outputs, strict=False))
    if len(outputs) != len(own) or not all(equal):
        raise RuntimeError(
            f"{layer.name} ({type(module).__name__}): the function that"
            " fusedopt.statistics.register_layer was given for it, or that fusedopt knows for a"
            " layer of this name, returns something else than the layer's own forward. Its squares"
            " would be those of another layer: register a function that computes the same"
        )
    return True


def _same(own: Any, other: Any, autocast: bool) -> bool:
    """Whether outputs are equal to rounding, in shape and type too."""
    if not isinstance(own, Tensor) or not isinstance(other, Tensor):
        return type(own) is type(other)
    if own.shape != other.shape or own.dtype != other.dtype:
        return False
    if not own.is_floating_point():
        return torch.equal(own, other)
    tolerance = _ROUGH if autocast else _TOLERANCE.get(own.dtype, _ROUGH)
    wide = own.double()
    return bool((other.detach().double() - wide).norm() <= tolerance * wide.norm())
