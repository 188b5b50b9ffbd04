"""``gradient_release``: hooks that step a parameter when its gradient has accumulated."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..checkpoint import is_initialising
from ..optimizer import FusedOptimizer
from ..step.checks import describe
from ..step.scale import GradScale
from ..tracing import untraced
from .hook import Hook
from .previous import PreviousNorm
from .refusals import (
    check_arguments,
    check_optimizer,
    check_own_backward,
    check_parameters,
    check_replicas,
    check_scaler,
)
from .single import Single


def gradient_release(
    model: nn.Module, optimizer: FusedOptimizer, *, clip: str | None = None
) -> GradientRelease:
    """Have backward update each parameter as soon as its gradient is there, and free the gradient.

    The gradients of a model are then never there at the same time: what is needed is the largest
    of them, or as many as autograd works on. The result is that of a step after backward, to the
    bit, with every rule and every option of precision::

        release = fusedopt.gradient_release(model, optimizer)
        for x, y in batches:
            criterion(model(x), y).backward()  # updates the parameters
            scheduler.step()

    ``optimizer.step()`` may stay in the loop, for hooks, closures and schedulers that look for it:
    it updates the parameters that still have a gradient, which those of the model have not.

    Each backward pass is a step. To accumulate over micro-batches, keep the gradients of all but
    the last::

        with release.accumulating():
            for x, y in micro_batches[:-1]:
                loss(x, y).backward()
        loss(*micro_batches[-1]).backward()

    See docs/gradient_release.md for what it works with.

    Args:
        model: whose parameters; those that the optimizer has not are left alone, and parameters of
            the optimizer that are not the model's wait for ``step()``.
        optimizer: of fusedopt. It keeps the release alive; deep copies and pickles come without.
        clip: ``"previous"`` to clip the gradients of a pass, by the optimizer's ``GlobalNorm``, by
            the norm of the pass before. The first one is clipped by ``optimizer.clip.last``, and
            not at all where that is None.

    Returns:
        What ``remove()`` is called of to go back to ``optimizer.step()``.

    Raises:
        TypeError: for no module, or no optimizer of fusedopt's.
        ValueError: for an optimizer that clips, without ``clip="previous"``; for statistics other
            than ``PerSampleSquares``; for an optimizer without parameters of the model.
        RuntimeError: for parameters of ``DistributedDataParallel`` or FSDP1, or where gradients
            are released already.
    """
    check_arguments(model, optimizer, clip)
    return GradientRelease(model, optimizer, clip is not None)


class GradientRelease:
    """Gradients of an optimizer that are released within backward; see ``gradient_release``.

    Attributes:
        optimizer: a weak reference to it.
    """

    def __init__(self, model: nn.Module, optimizer: FusedOptimizer, previous: bool) -> None:
        own = {id(p) for p in model.parameters()}
        every = [p for group in optimizer.param_groups for p in group["params"]]
        chosen = list({id(p): p for p in every if id(p) in own}.values())
        check_parameters(optimizer, chosen, previous)
        self.optimizer = weakref.ref(optimizer)
        self._norm = PreviousNorm() if previous else None
        scale_for = GradScale if self._norm is None else self._norm.scale_for
        self._singles = [Single(optimizer, p, scale_for) for p in chosen]
        self._sizes = _sizes(optimizer)
        self._kept = 0  # contexts that keep gradients
        self._pass = -1  # of autograd, the one that is under way or was the last
        self._is_first = True
        # What lies between two calls of step().
        self._round = 0
        self._is_stepped = False  # in this round
        self._is_called = False  # whether step() is a part of the loop
        self._twice: Tensor | None = None
        self._handles: list[RemovableHandle] = []
        for single in self._singles:
            hook = Hook(self, single, self._handles)
            self._handles.append(hook.register(single.parameter))
        optimizer.gradient_release = self

    def remove(self) -> None:
        """Leave the gradients to ``optimizer.step()`` again; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        optimizer = self.optimizer()
        if optimizer is not None and optimizer.gradient_release is self:
            optimizer.gradient_release = None

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Keep the gradients of the backward passes within: the next one outside steps with all."""
        self._kept += 1
        try:
            yield
        finally:
            self._kept -= 1

    @property
    def is_accumulating(self) -> bool:
        """Whether gradients are kept."""
        return self._kept > 0

    def arrived(self, single: Single) -> None:
        """Step a parameter whose gradient has accumulated, and free that."""
        if self._kept:
            return
        if torch.is_grad_enabled():
            # In a backward pass that makes a graph; in any other it would cost a few microseconds.
            with torch.no_grad():
                self._step(single)
        else:
            self._step(single)

    def _step(self, single: Single) -> None:
        if single.parameter.grad is None:  # another hook has taken it
            return
        optimizer = self.optimizer()
        assert optimizer is not None
        task = torch._C._current_graph_task_id()
        if task != self._pass:
            self._begin(optimizer, task)
        self._note(optimizer, single)
        single.step(optimizer)
        if self._norm is not None:
            self._norm.note(single)
        single.parameter.grad = None

    def _begin(self, optimizer: FusedOptimizer, task: int) -> None:
        """Begin a backward pass: look at what is the same for all parameters."""
        check_own_backward()
        check_optimizer(optimizer, self._norm is not None)
        if self._is_first:
            # Wrapped since.
            check_replicas([single.parameter for single in self._singles])
            self._is_first = False
        if _sizes(optimizer) != self._sizes:
            for single in self._singles:
                single.locate()
            self._sizes = _sizes(optimizer)
        if self._norm is not None and optimizer.clip is not None:
            self._norm.begin(optimizer.clip, optimizer.find_span())
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(partial(self._end, task))  # type: ignore[attr-defined]
        if optimizer.telemetry is not None:
            optimizer.telemetry.begin()
        self._pass = task

    @torch.no_grad()
    @untraced
    def _end(self, task: int) -> None:
        if self._norm is not None and task == self._pass:
            self._norm.finish()

    def _note(self, optimizer: FusedOptimizer, single: Single) -> None:
        """Note a step, and raise for a second one where the loop calls ``step()`` for each."""
        if single.round == self._round:
            if self._is_called:
                raise RuntimeError(_twice(optimizer, single.parameter))
            self._twice = single.parameter
        single.round = self._round
        self._is_stepped = True

    def before_step(self, optimizer: FusedOptimizer, grad_scale: Any, found_inf: Any) -> bool:
        """Prepare for a call of ``optimizer.step()``.

        Returns:
            Whether some parameter has a gradient.

        Raises:
            RuntimeError: for a loss scaler; for several steps that may have been meant for one; for
                gradients that are to be clipped and were not released.
        """
        check_scaler(grad_scale, found_inf)
        twice, self._twice = self._twice, None
        self._is_called = self._is_called or self._is_stepped
        self._is_stepped = False
        self._round += 1
        if twice is not None:
            raise RuntimeError(_twice(optimizer, twice))
        left = [
            p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        if left and optimizer.clip is not None and not is_initialising(optimizer):
            raise RuntimeError(
                f"{len(left)} parameters have gradients that were not released, and clip is to be"
                " by the norm of all: run the last backward pass outside of accumulating()"
            )
        return bool(left)

    def reset(self) -> None:
        """Forget what was known of the states: others are loaded."""
        for single in self._singles:
            single.reset(self.optimizer())

    def known_of(self, p: Tensor) -> frozenset[str]:
        """Return the entries that the state of a parameter had when it was last looked at."""
        engines = (single.engine for single in self._singles if single.parameter is p)
        return frozenset().union(*(engine.known_of(p) for engine in engines))

    def push(self) -> None:
        """Make hyper-parameters that are Python numbers current for captured CUDA graphs."""
        for single in self._singles:
            single.push(self.optimizer())

    def release_graphs(self) -> None:
        """Free what captured CUDA graphs read."""
        for single in self._singles:
            single.engine.release()


def _sizes(optimizer: FusedOptimizer) -> list[int]:
    return [len(group["params"]) for group in optimizer.param_groups]


def _twice(optimizer: FusedOptimizer, p: Tensor) -> str:
    return (
        f"{describe(optimizer, p)} was to be stepped by two backward passes for one call of"
        " optimizer.step(): each pass is a step. To accumulate, run all passes but the last within"
        " accumulating() of what gradient_release() returned; otherwise call step() after each, or"
        " not at all"
    )
