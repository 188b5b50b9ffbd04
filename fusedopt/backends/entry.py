"""What a backend is handed, and what it makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..coefficients import Table
from ..memory.dtypes import compute_dtype, real_dtypes

# For each input of the rule (the gradient first), the tensors of all entries.
Inputs = Sequence[Sequence[Tensor]]


@dataclass(slots=True)
class ParamEntry:
    """What one parameter brings to a step."""

    position: int  # index into the lists of inputs
    param: Tensor
    inputs: tuple[Tensor, ...]
    states: tuple[Tensor, ...]
    options: tuple[bool, ...]
    # Whether the inputs are gradients of samples, ``[batch, *param.shape]`` each, that are still to
    # be reduced to what the rule takes.
    per_sample_inputs: bool = False

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """Parameter, inputs and states, in the order of the address table."""
        return (self.param, *self.inputs, *self.states)

    @property
    def compute(self) -> torch.dtype:
        """Type that the arithmetic is done in."""
        return compute_dtype(real_dtypes(tuple([t.dtype for t in self.operands])))


class Executor(Protocol):
    """The tensors of one device, prepared for repeated steps.

    A part keeps parameters and states, never an input: gradients that outlive ``zero_grad()``
    would add their size to the memory of the next forward pass. Inputs are handed in at each use.
    """

    def move_inputs(self, inputs: Inputs) -> None:
        """Note the addresses of inputs of the same types and layouts as before."""

    def partial_norms(self, inputs: Inputs, inverse_scale: Tensor, infinity_norm: bool) -> Tensor:
        """Reduce the unscaled gradients to a float64 vector of partial sums or maxima."""

    def norm_weights(self, weights: Sequence[float]) -> Tensor:
        """Return for each partial norm of order 2 the weight of its entry, a float64 vector."""

    def clip_factor(
        self,
        partials: Tensor,
        inverse_scale: Tensor,
        max_norm: Tensor,
        control: Tensor,
        norm: Tensor,
        infinity_norm: bool,
    ) -> None:
        """Write the gradient's norm, and into ``control[0]`` the factor on the raw gradient."""

    def update(self, inputs: Inputs, table: Table, control: Tensor) -> None:
        """Apply the rule to every entry, unless ``control[1]`` is set."""

    def memory(self) -> Iterator[Tensor]:
        """List the tensors that launches read besides the entries' own."""

    def release(self) -> None:
        """Let go of what is kept for captured CUDA graphs alone."""
