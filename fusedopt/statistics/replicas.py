"""Data-parallel replicas, and whether their gradients have been averaged."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Collection
from typing import Any

from torch import Tensor, distributed, nn

# What these do with gradients is what DistributedDataParallel does by itself, to rounding.
_AVERAGING_HOOKS = ("allreduce_hook", "fp16_compress_hook", "bf16_compress_hook")


class Replicas:
    """The ``DistributedDataParallel`` modules around some parameters."""

    def __init__(self) -> None:
        self._modules: list[weakref.ref[Any]] = []
        self._known: set[int] = set()

    def check(self, parameters: Collection[Tensor], each_rank: bool) -> None:
        """Raise RuntimeError where the last call has left gradients of others than is meant.

        Args:
            parameters: whose gradients.
            each_rank: whether each process' own are meant, or those of all together.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        if not self._known.issuperset(map(id, parameters)):
            self._find(parameters)
        for reference in self._modules:
            module = reference()
            # Set by each forward pass, and still there when no_sync() is over.
            if module is None or module.require_forward_param_sync != each_rank:
                continue
            if each_rank:
                raise RuntimeError(
                    "MicroBatchSquares(each_rank=True) squares each process' own gradients, and"
                    " DistributedDataParallel has averaged these: run forward and backward within"
                    " its no_sync(), and call statistics.all_reduce() before step()"
                )
            raise RuntimeError(
                "MicroBatchSquares squares gradients of all processes together, and"
                " DistributedDataParallel.no_sync() has left each with its own, so that the"
                " processes would drift apart. Leave no_sync() out: every micro-batch is reduced."
                " Or take each process' gradient for a micro-batch: each_rank=True"
            )

    def _find(self, parameters: Collection[Tensor]) -> None:
        """Look for the modules once."""
        self._known |= set(map(id, parameters))
        self._modules = modules_around(self._known)


def replicas_of(parameters: Collection[Tensor]) -> list[weakref.ref[Any]]:
    """Return the ``DistributedDataParallel`` modules around some parameters, which do not know."""
    return modules_around(set(map(id, parameters)))


def modules_around(parameters: Collection[int]) -> list[weakref.ref[Any]]:
    """Do so for their ids."""
    from torch.nn.parallel import DistributedDataParallel

    found = [x for x in gc.get_objects() if issubclass(type(x), DistributedDataParallel)]
    return [weakref.ref(x) for x in found if any(id(p) in parameters for p in x.parameters())]


class Averages:
    """When ``DistributedDataParallel`` averages gradients, told from the calls that it makes.

    As its reducer does: a call within ``no_sync()`` prepares nothing, any other one the next
    backward pass, until whose end the gradients of the module's parameters are averaged.

    Args:
        model: parts of which may be such modules, as it may be a part of one.

    Attributes:
        problem: why averages are not known for what they are, or None.
    """

    def __init__(self, model: nn.Module) -> None:
        self.problem: str | None = None
        self._prepared: dict[int, weakref.ref[Any]] = {}
        self._within = []
        if distributed.is_available():
            kind = nn.parallel.DistributedDataParallel
            self._within = [weakref.ref(x) for x in model.modules() if isinstance(x, kind)]

    def called(self) -> None:
        """Note a call of the model, in the midst of which this is.

        Raises:
            RuntimeError: under ``join()``, where some processes have run out of batches.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        around: Any = nn.parallel.DistributedDataParallel._get_active_ddp_module()
        found: list[Any] = [around, *(reference() for reference in self._within)]
        for module in {id(x): x for x in found if x is not None}.values():
            if module._join_config.enable:
                raise RuntimeError(
                    "DistributedDataParallel.join() goes on for processes that have run out of"
                    " batches, which PerSampleSquares cannot: their part in adding up squares would"
                    " be missing. Leave it out, and give every process as many batches, of whatever"
                    " sizes"
                )
            if module.require_backward_grad_sync:
                self._prepared[id(module)] = weakref.ref(module)

    def finished(self, within: bool) -> list[Any]:
        """Return the modules that have averaged gradients in the backward pass that now ends.

        Args:
            within: whether it is one within another, as reentrant checkpoints have.
        """
        done = []
        for key, reference in list(self._prepared.items()):
            module = reference()
            if module is not None and not _is_finished(module, within):
                continue
            del self._prepared[key]
            self.problem = None if module is None else _problem(module)
            if module is not None and self.problem is None:
                done.append(module)
        return done

    def groups(self) -> tuple[Any, ...]:
        """Return the processes over which the latest calls prepare to average."""
        modules = [reference() for reference in self._prepared.values()]
        return tuple(module.process_group for module in modules if module is not None)[:1]

    @property
    def expected(self) -> bool:
        """Whether a backward pass is to end with averages."""
        return bool(self._prepared)


def _is_finished(module: Any, within: bool) -> bool:
    if within and module.static_graph:
        # At first such a graph is recorded, and all is done in the end.
        return False
    try:
        module._check_reducer_finalized()
    except RuntimeError:
        return False
    return True


def _problem(module: Any) -> str | None:
    """Say why gradients may not be averages; None where they are."""
    for hook, _ in module._comm_hooks:
        name = getattr(hook, "__qualname__", repr(hook))
        if name not in _AVERAGING_HOOKS:
            return (
                f"DistributedDataParallel has the communication hook {name}, which may do anything"
                " to gradients. If they are averages over processes, call statistics.all_reduce()"
                " between backward and step()"
            )
    return None
