"""The layers whose squares are known: a table from what a class computes to how squares see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .layer_call import LayerCall
from .operations import embedding, gain, linear, shift


class LayerOperations:
    """What a function given to ``register_layer`` computes with.

    Each operation takes parameters of the observed model and computes what torch would, and
    notes what squares need. They may be called
    several times, of one parameter too, with any operations of torch between them. Inputs are as
    the layer is called with them, ``[batch, ..., width]``; where a model has flattened or indexed
    them before, the graph of autograd tells which sample a row is of.

    Attributes:
        name: of the module, for messages.
    """

    def __init__(self, layer: LayerCall) -> None:
        self.layer = layer
        self.name = layer.name

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False
    ) -> Tensor:
        """Return ``x W^T + b``, or ``x W + b`` where the weight is transposed.

        Args:
            x: ``[..., inputs]``.
            weight: a parameter ``[outputs, inputs]``; transposed, ``[inputs, outputs]``.
            bias: a parameter ``[outputs]``, or None.
            transposed: which of the two.
        """
        return linear(self.layer, x, weight, bias, transposed=transposed)

    def gain(self, normal: Tensor, weight: Tensor, *, offset: float = 0.0) -> Tensor:
        """Return ``normal * (w + offset)``: the end of RMSNorm and LayerNorm.

        Args:
            normal: the normalised input ``[..., width]``.
            weight: a parameter ``[width]``.
            offset: 1 in models whose weights start at 0.
        """
        return gain(self.layer, normal, weight, offset)

    def shift(self, x: Tensor, bias: Tensor) -> Tensor:
        """Return ``x + b``.

        Args:
            x: ``[..., width]``.
            bias: a parameter ``[width]``.
        """
        return shift(self.layer, x, bias)

    def embedding(self, ids: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
        """Return ``W[ids]``.

        Args:
            ids: integers ``[batch, ...]``, or ``[1, length]`` for what all samples share.
            weight: a parameter ``[vocabulary, width]``.
            padding_idx: an id whose row has no gradient, or None.
        """
        return embedding(self.layer, ids, weight, padding_idx)


Function = Callable[..., Any]


@dataclass(frozen=True)
class Known:
    """How a layer is computed.

    Attributes:
        function: called as ``function(operations, module, *arguments, **keywords)``.
        built_in: of torch's own layers, of which it is known that it computes the same.
    """

    function: Function
    built_in: bool


# By the function that a class runs: a subclass with a forward of its own is another layer.
_BY_FORWARD: dict[Any, Known] = {}


def built_in(layer_class: Any) -> Callable[[Function], Function]:
    """Register a layer of torch."""

    def register(function: Function) -> Function:
        _BY_FORWARD[layer_class.forward] = Known(function, built_in=True)
        return function

    return register


def known(forward: Any) -> Known | None:
    """Return how a layer is computed whose class runs a function; None if it is not known."""
    return _BY_FORWARD.get(forward)


def register_layer(layer_class: type[nn.Module], function: Function | None = None) -> Any:
    """Tell ``PerSampleSquares`` how a layer of your own uses its parameters.

    The function is the layer's forward, with operations on parameters taken from its first
    argument::

        @fusedopt.statistics.register_layer(Projection)
        def projection(call, module, x):
            return call.linear(x, module.weight, module.bias, transposed=True)

    What it returns is compared with the layer's own forward at a module's first call, in training
    mode and in evaluation. The squares of all parameters that it uses by operations are made by the
    kernels; others of the layer get none, which is an error at the step. It holds for statistics
    that are made afterwards, and for subclasses that do not have a forward of their own.

    Args:
        layer_class: the class, with a forward of its own.
        function: called as ``function(call, module, *arguments, **keywords)`` in the place of
            ``module.forward``, with ``LayerOperations`` first. Without it, a decorator is returned.

    Returns:
        The function, or a decorator.

    Raises:
        TypeError: for what is not a class of modules, or a function that is none.
        ValueError: for a class whose forward is inherited, or is known already.
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, nn.Module)):
        raise TypeError(f"layer_class must be a class of torch.nn.Module, got {layer_class!r}")
    if function is None:
        return lambda function: register_layer(layer_class, function)
    if not callable(function):
        raise TypeError(f"function must be callable, got {type(function).__name__}")
    name = layer_class.__qualname__
    forward: Any = layer_class.forward
    if forward is nn.Module.forward or issubclass(layer_class, nn.MultiheadAttention):
        raise ValueError(f"{name} is never called itself, or is known already")
    before = _BY_FORWARD.get(forward)
    if before is not None and before.built_in:
        raise ValueError(f"{name} runs the forward of a layer of torch, which is known already")
    if "forward" not in vars(layer_class):
        owner = next(kind for kind in layer_class.__mro__ if "forward" in vars(kind))
        raise ValueError(f"{name} runs the forward of {owner.__qualname__}: register that class")
    _BY_FORWARD[forward] = Known(function, built_in=False)
    return function
