"""Step counts: ``state["step"]`` of many parameters, advanced together.

torch keeps a scalar tensor for each parameter, and adding one to a thousand of them costs more
than the whole rest of a fused step. Here each ``state["step"]`` on the host is a view of one
element of a shared buffer: still a tensor of its own for checkpoints, copies and edits, but one
addition advances them all. On the device, where a CUDA graph may hold on to them, they stay what
they are.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..memory.storage import addresses as addresses_of

State = dict[str, Any]


def new_step() -> Tensor:
    """Return a step count of zero, in the type that torch.optim uses."""
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return torch.zeros((), dtype=dtype, device="cpu")


def new_steps(count: int) -> tuple[Tensor, ...]:
    """Return many of them, views of one vector."""
    return new_step().repeat(count).unbind()


def _scalar(step: Any) -> Tensor:
    if not isinstance(step, Tensor):
        return torch.tensor(float(step), device="cpu")
    return step if step.dim() == 0 else step.reshape(())


def _separate(counts: list[Tensor]) -> None:
    """Give a count of its own to each parameter that shares one with a parameter before it."""
    seen: set[int] = set()
    for i, address in enumerate(addresses_of(counts)):
        if address in seen:
            counts[i] = counts[i].clone()
        seen.add(address)


class StepCounter:
    """The step counts of the parameters that advance together.

    Attributes:
        buffer: all counts, a vector on the counts' device, current after ``advance``.
    """

    def __init__(self, states: Sequence[State], device: torch.device, live: bool) -> None:
        dtype = new_step().dtype
        counts = [_scalar(s["step"]).to(device, dtype) for s in states]
        if live:
            _separate(counts)
        # On the host beside what they are expected to be, so that one addition advances both.
        self._rows = torch.stack(counts).repeat(1 if live else 2, 1)
        self.buffer, self._expected = self._rows[0], self._rows[-1]
        self._code = "d" if dtype == torch.float64 else "f"
        self._live = live
        self._states = list(states)
        self._steps = counts if live else list(self.buffer.unbind())
        self._addresses = addresses_of(self._steps)
        self._increment = torch.ones((), dtype=dtype, device=device)
        for state, step in zip(states, self._steps, strict=True):
            state["step"] = step

    def owned(self) -> bool:
        """Whether the parameters' step counts are still in the memory handed out."""
        steps = list(map(operator.itemgetter("step"), self._states))
        if self._live and not all(map(operator.is_, steps, self._steps)):
            return False
        # A tensor that is still the same may have been given other memory (``.data =``, ``set_``),
        # and the buffer, which views share, may have lost its own.
        try:
            if not self._live and addresses_of([self.buffer]) != self._addresses[:1]:
                return False
            return addresses_of(steps) == self._addresses
        except (TypeError, RuntimeError):  # no tensor, or one that has no address
            return False

    def next_step(self, step: float) -> float:
        """Return what a count becomes, rounded as the buffer is: counts need not be whole."""
        return array(self._code, [step + 1])[0]

    def as_expected(self) -> bool:
        """Whether no count on the host was written since the last step, or ``accept``."""
        return torch.equal(self._expected, self.buffer)

    def accept(self) -> None:
        """Take the counts as they are."""
        self._expected.copy_(self.buffer)

    @property
    def steps(self) -> Sequence[Tensor]:
        """The counts, one a parameter."""
        return self._steps

    def memory(self) -> Iterator[Tensor]:
        """List the tensors that are read where the counts are kept; those of states come first."""
        yield from self._steps
        yield self.buffer
        yield self._increment

    def advance(self, found_inf: Tensor | None = None) -> None:
        """Count one step more, or none where ``found_inf`` is not 0."""
        if not self._live:
            self._rows.add_(1)
            return
        if found_inf is None:
            self._increment.fill_(1.0)
        else:
            # The flag is a sum over devices or processes, not only 0 or 1.
            torch.eq(found_inf.reshape(()), 0, out=self._increment)
        # A list of increments: a single one would be read by the host on some devices.
        torch._foreach_add_(self._steps, [self._increment] * len(self._steps))
        torch.stack(self._steps, out=self.buffer)
