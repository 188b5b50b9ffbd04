"""MicroBatchSquares: the mean of squared micro-batch gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from ..tracing import untraced
from .added import Added, added_to
from .base import MissingSquares, Statistics
from .replicas import Replicas


class MicroBatchSquares(Statistics):
    """Squares of the gradients of micro-batches, each taken as one sample.

    Batch-size invariant Adam (Wang and Aitchison, arXiv 2402.18824, algorithm 1), in which the
    second moment is the mean of squared micro-batch gradients. Works for any model and any
    parallelism, and costs two buffers of a parameter's size::

        statistics = fusedopt.MicroBatchSquares()
        optimizer = fusedopt.BatchDecoupledAdam(model.parameters(), statistics=statistics)
        for x, y in micro_batches:
            (criterion(model(x), y) / len(micro_batches)).backward()
            statistics.accumulate(optimizer)
        optimizer.step()
        optimizer.zero_grad()

    ``p.grad`` accumulates over micro-batches as ever. ``virtual_batch_size`` counts micro-batches.
    With several processes a micro-batch is that of all of them together: each has to be reduced, so
    that ``DistributedDataParallel.no_sync()`` must not be used. With ``each_rank=True`` it is each
    process' own, of which gradients and squares are added up once a step::

        with model.no_sync():
            for x, y in micro_batches:
                (criterion(model(x), y) / len(micro_batches)).backward()
                statistics.accumulate(optimizer)
        statistics.all_reduce(optimizer)
        optimizer.step()

    Args:
        each_rank: whether each process' gradient is a micro-batch of its own.
    """

    def __init__(self, *, each_rank: bool = False) -> None:
        super().__init__("mean")
        self.each_rank = each_rank
        self._states: dict[int, Added] = {}
        self._replicas = Replicas()

    def count_of(self, parameter: Tensor) -> int:
        """Return how many micro-batches were gathered for a parameter."""
        state = self._states.get(id(parameter))
        return 0 if state is None else state.count

    @untraced
    @torch.no_grad()
    def accumulate(self, optimizer: Any) -> None:
        """Square the gradients that backward has made since the last call.

        Args:
            optimizer: whose parameters are meant.

        Raises:
            RuntimeError: where no parameter has a gradient, where none has changed since the last
                call, or where gradients are of one process alone.
        """
        own = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        if all(p.grad is None for p in own):
            raise RuntimeError(
                "no parameter has a gradient: call backward before accumulate(), under FSDP with"
                " gradient synchronisation on"
            )
        self._replicas.check(own, self.each_rank)
        if self.each_rank:
            _check_whole(own)
        if any(id(p) in self._states and self._states[id(p)].is_cleared() for p in own):
            # By the model's zero_grad, or by hand.
            self.reset(own)
        if any(id(p) in self._states and self._states[id(p)].is_shared for p in own):
            raise RuntimeError(
                "accumulate() after all_reduce(): call step() and zero_grad() before"
            )
        states = [self._states.get(id(p)) for p in own if p.grad is not None]
        if all(state is not None and state.is_complete() for state in states):
            raise RuntimeError(
                "no gradient has changed since the last accumulate(): call it once, after each"
                " backward pass"
            )
        for p in own:
            state = self._state_of(p)
            state.count += 1
            if p.grad is not None:
                state.accumulate()

    def _state_of(self, parameter: Tensor) -> Added:
        if id(parameter) not in self._states:
            self._states[id(parameter)] = added_to(parameter)
        return self._states[id(parameter)]

    @torch.no_grad()
    def all_reduce(self, group: Any = None) -> None:
        """Average the gradients of all processes, and add up their squares, before ``step()``.

        For ``each_rank=True``: the gradients of all optimizers that this is given to, of which each
        process has those of its own micro-batches. A second call changes nothing. Costs an
        all-reduce of the gradients, and one of 4 bytes a parameter.

        Args:
            group: the process group; the default one.

        Raises:
            RuntimeError: without ``each_rank=True``, where gradients are reduced already.
        """
        if not self.each_rank:
            raise RuntimeError(
                "MicroBatchSquares() takes gradients that processes have reduced, and squares of"
                " these: for each process' own pass each_rank=True"
            )
        own = [p for p in self._all_parameters() if p.requires_grad]
        states = [self._state_of(p) for p in own]
        if not all(state.is_shared for state in states):
            self.check([s.parameter for s in states if s.parameter.grad is not None], shared=False)
            _share(states, group)

    def sum_of_squares(self, parameter: Tensor) -> Tensor | None:
        """Return the sum over micro-batches of squared gradients."""
        state = self._states.get(id(parameter))
        return None if state is None else state.squares

    def check(self, parameters: Sequence[Tensor], shared: bool = True) -> None:
        """Raise where there are gradients that were not squared.

        Args:
            parameters: with gradients.
            shared: whether they are to be those of all processes.
        """
        alone = self.each_rank and shared and _processes() > 1
        states = [self._states.get(id(p)) for p in parameters]
        if alone and not all(state is None or state.is_shared for state in states):
            raise RuntimeError(
                "each process has its own micro-batches alone: call statistics.all_reduce() between"
                " the last accumulate() and step()"
            )
        for p in parameters:
            state = self._states.get(id(p))
            if state is None or not state.is_complete():
                raise MissingSquares(
                    p,
                    "its gradient has changed since MicroBatchSquares saw it: call"
                    " statistics.accumulate(optimizer) after each backward, and to clip pass"
                    " clip=fusedopt.GlobalNorm(max_norm) to the optimizer",
                )

    def used(self, parameters: Sequence[Tensor]) -> None:
        """Note that a step has used what was gathered for some parameters."""
        for p in parameters:
            self._states[id(p)].stepped()

    def reset(self, parameters: Sequence[Tensor] | None = None) -> None:
        """Forget what was gathered; ``optimizer.zero_grad()`` calls this."""
        for key in list(self._states) if parameters is None else map(id, parameters):
            state = self._states.pop(key, None)
            if state is not None:
                state.remove()


def _processes() -> int:
    started = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if started else 1


def _check_whole(parameters: Sequence[Tensor]) -> None:
    """Raise where gradients are reduced before they could be squared."""
    if any(hasattr(p, "placements") for p in parameters):
        raise RuntimeError(
            "each_rank=True needs each process' own gradients, and those of sharded parameters"
            " (DTensors) are reduced before they could be squared: leave it out, and a micro-batch"
            " is that of all processes together, or use PerSampleSquares"
        )


def _share(states: Sequence[Added], group: Any) -> None:
    """Average gradients over processes, and add up squares and numbers of micro-batches."""
    ranks = distributed.get_world_size(group)
    numbers = [[s.count, int(s.parameter.grad is not None)] for s in states]
    totals = torch.tensor(numbers).to(states[0].parameter.device)
    distributed.all_reduce(totals, group=group)
    for state, (count, used) in zip(states, totals.tolist(), strict=True):
        parameter = state.parameter
        if used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if state.squares is None:
                state.squares = state.zeros()
            for tensor, divisor in ((parameter.grad, ranks), (state.squares, ranks**2)):
                _add_up(tensor, group)
                tensor.div_(divisor)
            state.take()
        state.count, state.is_shared = count, True


def _add_up(tensor: Tensor, group: Any) -> None:
    """Add up over processes, in whose memory a tensor may lie otherwise."""
    own = tensor.contiguous()
    distributed.all_reduce(own, group=group)
    if own is not tensor:
        tensor.copy_(own)
