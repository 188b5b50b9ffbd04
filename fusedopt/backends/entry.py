"""What a backend is handed, and what it makes of it."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..coefficients import Groups, Table
from ..kernels.codecs.format import PLAIN, Format
from ..memory.dtypes import real_dtypes
from ..memory.walk import Walk

# For each input of the rule (the gradient first), the tensors of all entries.
Inputs = Sequence[Sequence[Tensor]]

_DTYPE = operator.attrgetter("dtype")


class Draw(NamedTuple):
    """What the codecs of a parameter need to know that depend on place and step."""

    seed: int
    number: int  # of the parameter, among all of its optimizer
    walk: Walk


@dataclass
class Entries:
    """What parameters of the same options and format bring to a step: a column for each kind.

    In a column stands a tensor for each parameter, in the same order. Tens of thousands of
    parameters are looked at column by column, a trait at a time.

    Attributes:
        positions: of the parameters in the lists of inputs that a step hands in.
        params: the parameters.
        inputs: a column for each input.
        states: a column for each tensor that is kept, in the order of the address table.
        options: of the rule.
        per_sample_inputs: whether the inputs are gradients of samples, ``[batch, *param.shape]``
            each, that are still to be reduced to what the rule takes.
        format: how parameters and states are kept.
        draws: for each parameter, what its codecs need to know, where they draw.
    """

    positions: Sequence[int]
    params: Sequence[Tensor]
    inputs: Sequence[Sequence[Tensor]]
    states: Sequence[Sequence[Tensor]]
    options: tuple[bool, ...]
    per_sample_inputs: bool = False
    format: Format = PLAIN
    draws: Sequence[Draw] = ()

    @cached_property
    def columns(self) -> list[Sequence[Tensor]]:
        """Parameters, inputs and states, in the order of the address table."""
        return [self.params, *self.inputs, *self.states]

    @cached_property
    def dtypes(self) -> list[tuple[torch.dtype, ...]]:
        """For each parameter, the real types of its operands."""
        types = list(zip(*(map(_DTYPE, column) for column in self.columns), strict=True))
        real = {own: real_dtypes(own) for own in set(types)}
        return [real[own] for own in types]


class Sums(Protocol):
    """Adds gradients of one device to sums in another type."""

    def add(
        self, sums: Sequence[Tensor], gradients: Sequence[Tensor], begun: Sequence[bool]
    ) -> None:
        """Add a gradient to each sum, in place.

        Args:
            sums: dense tensors.
            gradients: one for each, of the same shape.
            begun: for each, whether it has something to add to; otherwise it is written alone.
        """


class Coefficients(Protocol):
    """Counts steps and forms the rows of a table, on the device."""

    def memory(self) -> Iterator[Tensor]:
        """List the tensors that launches read besides the table's and the counts."""

    def step(self, groups: Groups, control: Tensor) -> None:
        """Count one step more, unless ``control[1]`` is set, and form every row.

        Args:
            groups: whose hyper-parameters are read.
            control: float64 ``[3]``, what an update reads besides coefficients.
        """


class Executor(Protocol):
    """The tensors of one device, prepared for repeated steps.

    A part keeps parameters and states, never an input: gradients that outlive ``zero_grad()``
    would add their size to the memory of the next forward pass. Inputs are handed in at each use.

    Attributes:
        device: where the tensors live.
    """

    device: torch.device

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

    def guarded_factor(
        self,
        partials: Tensor,
        inverse_scale: Tensor,
        max_norm: Tensor,
        control: Tensor,
        norm: Tensor,
        infinity_norm: bool,
        record: Tensor,
        min_steps: int,
        scaled: bool,
    ) -> None:
        """Do the same, decide about the step by ``record``, and write that into ``control[1]``.

        The record is that of ``fusedopt/kernels/guard.py``. Nothing is decided below ``min_steps``
        norms. With ``scaled``, ``control[1]`` says already whether a loss scaler found an overflow.
        """

    def update(self, inputs: Inputs, table: Table, control: Tensor, measured: bool = False) -> None:
        """Apply the rule to every entry, unless ``control[1]`` is set.

        Args:
            inputs: what the rule reads besides what is kept.
            table: the coefficients.
            control: float64 ``[3]``: factor on the gradient, whether to skip, and the factor
                without clipping.
            measured: whether to form what ``squares`` returns, of an executor prepared for it.
        """

    def squares(self) -> Tensor:
        """Return the squared norms of gradient, parameter and update of each entry.

        Returns:
            float64 ``[entries, 3]``, of the latest update that was measured and not skipped; below
            0 before, and 0 of an entry without elements. A new tensor at each call.
        """

    def memory(self) -> Iterator[Tensor]:
        """List the tensors that launches read besides the entries' own."""

    def release(self) -> None:
        """Let go of what is kept for captured CUDA graphs alone."""
