"""Data-parallel replicas, and whether their gradients have been averaged."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Collection
from typing import Any

from torch import Tensor, distributed


class Replicas:
    """The ``DistributedDataParallel`` modules around some parameters."""

    def __init__(self) -> None:
        self._modules: list[weakref.ref[Any]] = []
        self._known: set[int] = set()

    def check(self, parameters: Collection[Tensor]) -> None:
        """Raise RuntimeError where the last call was within ``no_sync()``.

        What it left in ``p.grad`` is this process's own, and the processes would go on apart.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        if not self._known.issuperset(map(id, parameters)):
            self._find(parameters)
        for reference in self._modules:
            module = reference()
            # Set by each forward pass, and still there when no_sync() is over.
            if module is not None and not module.require_forward_param_sync:
                raise RuntimeError(
                    "MicroBatchSquares squares gradients of all processes together, and"
                    " DistributedDataParallel.no_sync() has left each with its own, so that the"
                    " processes would drift apart. Leave no_sync() out: every micro-batch is"
                    " reduced"
                )

    def _find(self, parameters: Collection[Tensor]) -> None:
        """Look for the modules once: parameters do not know them."""
        from torch.nn.parallel import DistributedDataParallel

        self._known |= set(map(id, parameters))
        found = [x for x in gc.get_objects() if issubclass(type(x), DistributedDataParallel)]
        self._modules = [
            weakref.ref(x) for x in found if any(id(p) in self._known for p in x.parameters())
        ]
