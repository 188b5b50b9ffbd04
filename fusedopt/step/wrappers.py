"""Wrappers that give each process a part of the parameters as plain tensors.

A norm over the parameters of one process is not the run's there, and clipping by it lets weights
depend on how they were cut. Until it can be added up over processes, it is refused.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import distributed
from torch.optim.optimizer import register_optimizer_step_pre_hook

_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"
_hooked = False


def in_several_processes() -> bool:
    """Whether there is a process group of more than one rank."""
    here = distributed.is_available() and distributed.is_initialized()
    return here and distributed.get_world_size() > 1


def watch(kind: type) -> None:
    """Refuse steps of ``ZeroRedundancyOptimizer`` that would clip by one rank's own norm.

    It hands each rank's optimizer a part of the parameters, and a rank may have none that has a
    gradient: so its own step is looked at, on all ranks alike.

    Args:
        kind: of optimizer that clips.
    """
    global _hooked
    if _hooked or _ZERO not in sys.modules or not in_several_processes():
        return
    _hooked = True
    zero: Any = sys.modules[_ZERO].ZeroRedundancyOptimizer

    def refuse(optimizer: Any, *_: Any) -> None:
        if not isinstance(optimizer, zero) or optimizer.world_size < 2:
            return
        inner = getattr(optimizer, "optim", None)
        if isinstance(inner, kind) and getattr(inner, "clip", None) is not None:
            raise RuntimeError(
                "ZeroRedundancyOptimizer gives each process a part of the parameters, and"
                " GlobalNorm does not sum over processes yet: it would clip by the norm of that"
                " part. Pass clip=None and call torch.nn.utils.clip_grad_norm_ on the model's"
                " parameters before step(): their gradients are whole on every process"
            )

    register_optimizer_step_pre_hook(refuse)


def check_flat(optimizer: Any) -> None:
    """Raise RuntimeError where FSDP1 has cut the parameters, and they would be clipped.

    Parameters of ``fully_shard`` (FSDP2) are DTensors, which say for themselves how they are cut.
    """
    if optimizer.clip is None or not in_several_processes():
        return
    for group in optimizer.param_groups:
        if any(getattr(p, "_fsdp_flattened", False) for p in group["params"]):
            raise RuntimeError(
                "FullyShardedDataParallel gives each process a part of every parameter, and"
                " GlobalNorm does not sum over processes yet: it would clip by the norm of that"
                " part. Pass clip=None and call model.clip_grad_norm_(max_norm) before step()"
            )


def check_in_backward(optimizer: Any) -> None:
    """Raise RuntimeError where backward takes the steps, one parameter at a time, and clips.

    ``torch.distributed.optim._apply_optimizer_in_backward`` makes an optimizer for each parameter.
    """
    if optimizer.clip is None:
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            if any(one is optimizer for one in getattr(p, "_in_backward_optimizers", ())):
                raise RuntimeError(
                    "_apply_optimizer_in_backward gives each parameter an optimizer of its own,"
                    " which would clip by the norm of that parameter: the gradients of all are"
                    " never there at the same time. Pass clip=None"
                )
