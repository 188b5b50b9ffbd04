"""Wrappers that give each process a part of the parameters as plain tensors.

A norm over the parameters of one process is not the run's there, and clipping by it would let
weights depend on how they were cut: so it is summed over the wrapper's processes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor, distributed
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .span import in_several_processes

_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"
_hooked = False


def watch(kind: type) -> None:
    """Note for optimizers that ``ZeroRedundancyOptimizer`` steps which processes it has cut over.

    It hands each process's optimizer a part of the parameters, which do not show that.

    Args:
        kind: of optimizer that clips.
    """
    global _hooked
    if _hooked or _ZERO not in sys.modules or not in_several_processes():
        return
    _hooked = True
    zero: Any = sys.modules[_ZERO].ZeroRedundancyOptimizer

    def note(optimizer: Any, *_: Any) -> None:
        if isinstance(optimizer, zero):
            inner = getattr(optimizer, "optim", None)
            if isinstance(inner, kind):
                inner.wrapper_group = optimizer.process_group  # type: ignore[attr-defined]

    register_optimizer_step_pre_hook(note)


def flat_group(params: Sequence[Tensor]) -> Any:
    """Return the processes over which ``FullyShardedDataParallel`` has cut parameters, or None.

    It marks them and does not say which: all are taken. Parameters of ``fully_shard`` (FSDP2) are
    DTensors, which say for themselves how they are cut.
    """
    if True in [getattr(p, "_fsdp_flattened", False) for p in params]:
        return distributed.group.WORLD
    return None


def check_in_backward(optimizer: Any) -> None:
    """Raise RuntimeError where backward takes the steps, one parameter at a time, and takes a norm.

    ``torch.distributed.optim._apply_optimizer_in_backward`` makes an optimizer for each parameter.
    """
    if optimizer.step_norm is None:
        return
    taken = "clip" if optimizer.guard is None else "guard"
    for group in optimizer.param_groups:
        marked = [getattr(p, "_in_backward_optimizers", ()) for p in group["params"]]
        if any(one is optimizer for own in filter(None, marked) for one in own):
            raise RuntimeError(
                "_apply_optimizer_in_backward gives each parameter an optimizer of its own, which"
                f" would {taken} by the norm of that parameter: the gradients of all are never"
                f" there at the same time. Pass {taken}=None"
            )
