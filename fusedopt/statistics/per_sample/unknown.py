"""Ways to call an observed model in which its samples are not known: refused, with the way out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

# What torch.compile(fullgraph=True) and torch.export(strict=True) print.
NOT_TRACED = (
    "a layer that fusedopt.PerSampleSquares observes is not traced: its squares belong to one"
    " backward pass. Leave out fullgraph=True, or call remove() on the statistics before"
)
_OUTSIDE = (
    " Do it within statistics.paused(), which leaves these calls out, or on a copy.deepcopy of the"
    " model, which is a plain one"
)


def check_context(name: str) -> None:
    """Raise RuntimeError where a call does not run on the tensors of one batch.

    Args:
        name: of what is called, for the message.
    """
    if torch.compiler.is_dynamo_compiling():
        # The graph breaks at the layers, which are run as they are.
        return
    transform = _transform()
    if transform is not None:
        raise RuntimeError(
            f"{name} is observed by PerSampleSquares and was called under {transform}, where there"
            f" are no samples of a batch whose gradients reach a parameter.{_OUTSIDE}"
        )


def _transform() -> str | None:
    if torch._C._functorch.peek_interpreter_stack() is not None:  # type: ignore[attr-defined]
        return "a transform of torch.func (vmap, grad, jvp, jacrev ...)"
    if torch.jit.is_tracing():  # type: ignore[no-untyped-call]
        return "torch.jit.trace"
    if torch.compiler.is_exporting():
        return "torch.export"
    return None


def check_arguments(name: str, arguments: Any) -> None:
    """Raise RuntimeError for an argument in which samples have no dimension.

    Args:
        name: of what is called, for the message.
        arguments: positional and keyword ones, nested as they are.
    """
    if _holds_packed(arguments):
        raise RuntimeError(
            f"{name} was called with a PackedSequence, in which the rows of a sample lie apart, so"
            " that its squares are not known. Pad the sequences and mask the loss (padding needs"
            f" nothing else), or use MicroBatchSquares.{_OUTSIDE}"
        )


def _holds_packed(thing: Any) -> bool:
    if isinstance(thing, PackedSequence):
        return True
    if isinstance(thing, dict):
        return any(map(_holds_packed, thing.values()))
    return isinstance(thing, (list, tuple)) and any(map(_holds_packed, thing))


def check_bags(name: str, module: nn.Module, arguments: Any, keywords: Any) -> None:
    """Raise RuntimeError for an embedding of bags that lie one after the other."""
    if not isinstance(module, nn.EmbeddingBag):
        return
    ids = arguments[0] if arguments else keywords.get("input")
    offsets = arguments[1] if len(arguments) > 1 else keywords.get("offsets")
    if offsets is not None or (isinstance(ids, Tensor) and ids.dim() == 1):
        raise RuntimeError(
            f"{name} (EmbeddingBag) was called with bags that offsets cut out of one vector, so"
            " that its samples' squares are not known. Give it ids of shape [batch, bag], padded"
            f" with padding_idx, or use MicroBatchSquares.{_OUTSIDE}"
        )
