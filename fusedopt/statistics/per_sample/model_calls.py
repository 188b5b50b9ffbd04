"""The calls of a model that is observed: the one under way, and those whose graphs are alive."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .cycle import Cycle
from .model_call import CallOptions, ModelCall
from .record import Record
from .unknown import check_arguments, check_context


class ModelCalls:
    """Makes a ``ModelCall`` of every call, and finds the one that a layer's call belongs to.

    Args:
        sample: ``"sequence"`` or ``"token"``.
        batch_first: whether the batch is the first dimension of sequences.
        record_of: where a parameter's squares are gathered.
        backend_of: where squares are made of what a tensor's device holds.
        called: told of each call, in its midst.
        cycle: which calls make squares; None for all.
    """

    def __init__(
        self,
        sample: str,
        batch_first: bool,
        record_of: Callable[[Tensor], Record],
        backend_of: Callable[[Tensor], str],
        called: Callable[[], None],
        cycle: Cycle | None = None,
    ) -> None:
        self.cycle = cycle
        self.seen = False
        self._alive: weakref.WeakSet[ModelCall] = weakref.WeakSet()
        see = self._see
        self._options = CallOptions(
            sample, batch_first, record_of, backend_of, self.paused, see, set()
        )
        self._called = called
        self._told = False
        self._active: ModelCall | None = None
        self._thread = 0
        # The latest, for as long as its graph is.
        self._last: weakref.ref[ModelCall] | None = None
        # It, where all its layers are to be seen when checkpoints are run again.
        self._kept: ModelCall | None = None
        self._offsets: Tensor | None = None
        self._paused = 0

    def run(self, plain: Any, arguments: Any, keywords: Any) -> Any:
        """Run the model; this is one batch of samples."""
        if self._active is not None and self._thread != _thread():
            raise RuntimeError(
                "the model that PerSampleSquares observes was called while a call of another thread"
                " was under way: call it by one thread at a time, or observe a copy for each"
            )
        if self._active is not None or self._paused or not torch.is_grad_enabled():
            return plain(*arguments, **keywords)
        check_context("the model")
        check_arguments("the model", (arguments, keywords))
        self.release()
        self.seen, self._told = True, False
        cycle = self.cycle
        if cycle is not None:
            cycle.begin()
        if not torch.compiler.is_dynamo_compiling():
            self._tell()
        self._active = ModelCall(self._options, (arguments, keywords), self._offsets)
        self._thread = _thread()
        counted = self._active.counted
        try:
            result = plain(*arguments, **keywords)
            if cycle is not None and not cycle.measures:
                cycle.follow(counted, result)
            return result
        finally:
            call, self._active = self._active, None
            self._kept = None if call.is_tapped else call
            call.release()
            self._last = weakref.ref(call)

    def _see(self, call: ModelCall) -> None:
        """Note a call that a backward pass may reach."""
        self._alive.add(call)
        if call is self._active:
            # Where the call was traced by a compiler, a layer is the first to be run as it is.
            self._tell()

    def _tell(self) -> None:
        """Tell of the call under way, once."""
        if not self._told:
            self._told = True
            self._called()

    def release(self) -> None:
        """Let go of the graphs of all calls."""
        # Activation checkpoints may have called layers again since.
        for call in self._alive:
            call.release()

    @contextmanager
    def packed(self, offsets: Tensor) -> Iterator[None]:
        """Take inputs within this context for samples packed at these bounds."""
        # Read again in backward, when the vector may be the next batch's.
        before, self._offsets = self._offsets, offsets.clone()
        try:
            yield
        finally:
            self._offsets = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Call modules without observing them."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def is_replaying(self) -> bool:
        """Whether an activation checkpoint runs a part of the model again, of whatever call."""
        return self._active is None

    def is_unplaced(self) -> bool:
        """Whether a part of the model is run again, and there is more than one call to be it of."""
        if not self.is_replaying():
            return False
        backward = torch._C._current_graph_task_id()
        own = self._replayed(backward)
        others = (c for c in self._alive if c is not own)
        return any(c.counted.base is None or backward in c.counted.backwards for c in others)

    def _replayed(self, backward: int) -> ModelCall | None:
        """Return the call that an activation checkpoint runs a part of again."""
        met = [c for c in self._alive if backward in c.counted.backwards]
        if len(met) == 1:
            return met[0]
        return None if self._last is None else self._last()

    def current(self, name: str) -> ModelCall:
        """Return the call of the model that a layer's call belongs to."""
        if self._active is not None:
            return self._active
        backward = torch._C._current_graph_task_id()
        call = None if backward == -1 else self._replayed(backward)
        if call is not None:
            return call
        raise RuntimeError(
            f"{name} was called outside of the model that PerSampleSquares observes, so that its"
            " samples are not known: call model(x), not model.forward(x) or a part of it, make"
            " PerSampleSquares with the module that you call, or call it under torch.no_grad()"
        )

    def is_watching(self) -> bool:
        """Whether calls now are to be seen."""
        return not self._paused and torch.is_grad_enabled()


def _thread() -> int:
    # Graphs that are traced are called by one thread.
    return 0 if torch.compiler.is_dynamo_compiling() else threading.get_ident()
