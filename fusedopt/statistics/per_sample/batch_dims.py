"""Where the tensors that a module takes and returns keep their batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .instrument import original_class
from .layer_call import LayerCall

RECURRENT = (nn.RNN.forward, nn.LSTM.forward, nn.GRU.forward)
# How many ways to read the dimensions of one call are tried.
MOST_WAYS = 16


def is_recurrent(module: nn.Module) -> bool:
    """Whether a module runs torch's own recurrent layers, of which everything is known."""
    own: Any = original_class(module).forward
    return own in RECURRENT


def recurrent_inputs(
    module: nn.Module, leaves: Sequence[Any], arguments: Any, keywords: Any
) -> dict[int, int] | None:
    """Return the batch dimension of each tensor that a recurrent layer takes; None for others."""
    if not is_recurrent(module):
        return None
    first = arguments[0] if arguments else keywords.get("input")
    sequence = 0 if module.batch_first else 1
    # States are [layers, batch, width] whatever batch_first says.
    return {i: sequence if x is first else 1 for i, x in enumerate(leaves) if isinstance(x, Tensor)}


def output_dims(layer: LayerCall, module: nn.Module, place: int, y: Tensor) -> list[int]:
    """Return the dimensions of an output that may be its batch, the likeliest first.

    Whatever the batch is: an activation checkpoint that runs the module again may be one of a call
    with another batch, and has to keep as many tensors.

    Args:
        layer: of the call.
        module: that returned it.
        place: its index among what was returned.
        y: the output.
    """
    if is_recurrent(module):
        return [0 if module.batch_first and place == 0 else 1] if y.dim() == 3 else []
    expected = 0 if layer.batch_first or y.dim() < 3 else 1
    if layer.call.offsets is not None or layer.call.options.sample == "token":
        # Another dimension of that size is one of something else.
        return [expected] if y.dim() > expected else []
    return [expected, *(dim for dim in range(y.dim()) if dim != expected)][: y.dim()]


def exactly(layer: LayerCall, x: Tensor, dim: int) -> list[int]:
    """Return the dimension if the tensor has its batch there, else nothing."""
    return [dim] if x.dim() == 3 and layer.call.count in (None, x.shape[dim]) else []


def folded(t: Tensor, count: int) -> bool:
    """Whether rows may be those of all samples, as many of each, one sample after the other."""
    return t.dim() > 1 and 0 < count < len(t) and len(t) % count == 0


def in_front(t: Tensor, dim: int | None, count: int) -> Tensor:
    """Return a tensor with the batch in front.

    Args:
        t: the tensor.
        dim: that is the batch; None for rows of which each sample has as many.
        count: the number of samples.
    """
    return t.unflatten(0, (count, -1)) if dim is None else t.movedim(dim, 0)


def alone(x: Tensor, dim: int | None) -> Tensor:
    """Return what one sample has of an input as the module takes it."""
    return x if dim is None else x.unsqueeze(dim)


def without(y: Tensor, dim: int | None) -> Tensor:
    """Return what a module returns for one sample without its batch."""
    return y if dim is None else y.squeeze(dim)


def candidates(layer: LayerCall, x: Tensor) -> list[int]:
    """Return the dimensions that may be the batch: the one where it is expected comes first.

    In forward the first layer may come before the size is known.
    """
    call = layer.call
    expected = 0 if layer.batch_first or x.dim() < 3 else 1
    fits = x.dim() > expected and call.count in (None, x.shape[expected])
    if call.count is None or call.offsets is not None or layer.call.options.sample == "token":
        # Another dimension of that size is one of something else.
        return [expected] if fits else []
    others = [dim for dim, size in enumerate(x.shape) if size == call.count and dim != expected]
    return [expected, *others] if fits else others
