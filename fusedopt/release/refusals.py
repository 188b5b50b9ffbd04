"""What gradient release does not go together with, in words that say what to do."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor, distributed, nn

from ..optimizer import FusedOptimizer
from ..statistics import PerSampleSquares
from ..statistics.replicas import replicas_of
from ..step.checks import describe
from .hook import release_of

_CLIP = (
    "clip=GlobalNorm needs the norm of all gradients before the first update, and gradient release"
    " updates each parameter before the gradients of others are there. Pass"
    ' gradient_release(model, optimizer, clip="previous") to clip by the norm of the backward pass'
    " before, or clip=None to the optimizer"
)


def check_arguments(model: Any, optimizer: Any, clip: Any) -> None:
    """Raise for arguments of ``gradient_release`` that are none.

    Raises:
        TypeError: for no model, or no optimizer of fusedopt's.
        ValueError: for another ``clip``, one that has nothing to go by, or one that cannot be kept.
        RuntimeError: for an optimizer that releases already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            "optimizer must be one of fusedopt's (of a wrapper, the optimizer in it), got"
            f" {type(optimizer).__name__}"
        )
    if clip not in (None, "previous"):
        raise ValueError(f'clip must be None or "previous", got {clip!r}')
    if clip is not None and optimizer.clip is None:
        raise ValueError(
            'clip="previous" takes its bound from the optimizer: pass'
            " clip=fusedopt.GlobalNorm(max_norm) to that"
        )
    if optimizer.gradient_release is not None:
        raise RuntimeError(
            "this optimizer releases gradients already: call remove() of what gradient_release()"
            " returned"
        )
    check_optimizer(optimizer, clip is not None)


def check_optimizer(optimizer: Any, previous: bool) -> None:
    """Raise for options of an optimizer that ask for all gradients at the same time.

    Args:
        optimizer: that is to step.
        previous: whether to clip by the norm of the backward pass before.

    Raises:
        ValueError: naming the option.
    """
    optimizer.refuse_if_applied("gradients cannot be released")
    clip, statistics = optimizer.clip, optimizer.statistics
    if clip is not None and not previous:
        raise ValueError(_CLIP)
    if optimizer.guard is not None:
        raise ValueError(
            "guard=SpikeGuard decides by the norm of all gradients before the first update, and"
            " gradient release updates each parameter before the gradients of others are there:"
            " pass guard=None to the optimizer"
        )
    if statistics is not None and not isinstance(statistics, PerSampleSquares):
        raise ValueError(
            f"gradient release steps a parameter as soon as its gradient is there, when"
            f" {type(statistics).__name__} need not have what belongs to it:"
            " fusedopt.PerSampleSquares(model) has"
        )
    if statistics is not None and statistics.every > 1:
        raise ValueError(
            f"gradient release with PerSampleSquares(every={statistics.every}): a parameter's count"
            " of steps, by which squares are left out, would change within the backward pass. Use"
            " every=1"
        )
    if clip is None:
        return
    if statistics is not None:
        raise ValueError(
            'clip="previous" is for rules that read gradients alone: leave out clip, or statistics'
        )
    if clip.error_if_nonfinite:
        raise ValueError(
            "error_if_nonfinite=True is to stop a step before anything has changed, and with"
            " gradient release all is updated when the norm is known: leave it out"
        )
    if clip.group is not None:
        raise ValueError(
            "GlobalNorm(group=...) would have backward passes wait for those of other processes:"
            " with gradient release, the norm is this process's, or that of DTensors' meshes"
        )


def check_parameters(optimizer: Any, parameters: Sequence[Tensor], previous: bool) -> None:
    """Raise for parameters whose gradient is not there, or not whole, once it has accumulated.

    Args:
        optimizer: that has them.
        parameters: to be released.
        previous: whether to clip by the norm of the backward pass before.

    Raises:
        ValueError: for none, or where some of the optimizer's would be left out of a norm.
        RuntimeError: naming what else works on the gradients.
    """
    if not parameters:
        raise ValueError("the optimizer has no parameter of this model")
    every = [p for group in optimizer.param_groups for p in group["params"]]
    if previous and len(parameters) != len(every):
        own = set(map(id, parameters))
        p = next(p for p in every if id(p) not in own)
        raise ValueError(
            f'{describe(optimizer, p)} is not of this model, and clip="previous" takes the norm of'
            " all that the optimizer has"
        )
    for p in parameters:
        if release_of(p) is not None:
            raise RuntimeError(
                f"{describe(optimizer, p)} has its gradient released by another optimizer: call"
                " remove() of what gradient_release() returned for that"
            )
        if getattr(p, "_in_backward_optimizers", None):
            raise RuntimeError(
                f"{describe(optimizer, p)} has another optimizer in backward, of"
                " _apply_optimizer_in_backward: use one of the two"
            )
        if getattr(p, "_fsdp_flattened", False):
            raise RuntimeError(
                f"{describe(optimizer, p)} is one of FullyShardedDataParallel (FSDP1), whose hook"
                " reduces the gradient after this one's: use fully_shard (FSDP2), whose parameters"
                " can be released"
            )
    check_replicas(parameters)


def check_replicas(parameters: Sequence[Tensor]) -> None:
    """Raise RuntimeError for parameters of ``DistributedDataParallel``."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    if replicas_of(parameters):
        raise RuntimeError(
            "DistributedDataParallel averages gradients in buckets, after they have accumulated and"
            " gradient release has used them, so that the processes would drift apart: use"
            " fully_shard (FSDP2), or leave out gradient release"
        )


def check_scaler(grad_scale: Any, found_inf: Any) -> None:
    """Raise RuntimeError where a loss scaler wants a step that backward has taken."""
    if grad_scale is None and found_inf is None:
        return
    raise RuntimeError(
        "torch.amp.GradScaler decides about a step by the overflows of all gradients, and gradient"
        " release has taken it within backward, by gradients that are still scaled: the parameters"
        " cannot be used. Leave the scaler out (bfloat16 needs none), or gradient release"
    )


def check_own_backward() -> None:
    """Raise RuntimeError within a backward pass that another one runs.

    Of reentrant checkpoints each has one, and a parameter that several of them use would be stepped
    by each with a part of its gradient.
    """
    inner = False
    frame: Any = sys._getframe(1)
    while frame is not None:
        place = frame.f_globals.get("__name__"), frame.f_code.co_name
        if inner and place in _AROUND:
            raise RuntimeError(
                "gradient release within a backward pass that another one runs, as reentrant"
                " checkpoints have them: what a parameter gets there need not be its whole"
                " gradient. Pass use_reentrant=False to torch.utils.checkpoint (of Hugging Face's"
                ' Trainer, gradient_checkpointing_kwargs={"use_reentrant": False}), or call'
                " remove() of what gradient_release() returned"
            )
        inner = inner or place == _RUN
        frame = frame.f_back


# The call of the engine, and what it calls of a function's own backward.
_RUN = ("torch.autograd.graph", "_engine_run_backward")
_AROUND = (_RUN, ("torch.autograd.function", "apply"))
