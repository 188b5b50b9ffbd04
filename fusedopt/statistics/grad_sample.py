"""GradSampleSquares: per-sample gradients that something else has materialised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..source import RuleInputs
from .base import MissingSquares, Statistics
from .spent import STALE, Spent


class GradSampleSquares(Statistics):
    """Reads ``p.grad_sample``, where something else leaves gradients of single samples.

    That is ``[batch, *param]``, as Opacus, torch's ExpandedWeights and users of ``torch.func`` have
    it: each sample's own gradient, not divided by the batch. A list of such tensors (several
    backward passes) is one batch. Reduction, moving averages and update run in one kernel, so that
    neither the mean nor the mean square reaches memory; with clipping or a gradient scaler, which
    have to know them first, in two. ``p.grad`` is not read, and may be None.

    ``optimizer.zero_grad()`` sets ``p.grad_sample`` to None, too.
    """

    def __init__(self) -> None:
        # The rows are the samples' gradients themselves.
        super().__init__("sum")
        self._spent: dict[int, Spent] = {}

    def count_of(self, parameter: Tensor) -> int:
        """Return how many samples ``p.grad_sample`` has."""
        return sum(map(len, _parts(parameter)))

    def find(self, parameter: Tensor) -> Tensor | None:
        """Return what says that a parameter takes part in the step."""
        parts = _parts(parameter)
        return parts[0] if parts else None

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """Return the sum over samples of a parameter's gradients."""
        return self._reduce([parameter])[0][0] if _parts(parameter) else None

    def sum_of_squares(self, parameter: Tensor) -> Tensor | None:
        """Return the sum over samples of the squares of a parameter's gradients."""
        return self._reduce([parameter])[1][0] if _parts(parameter) else None

    def parameters(self) -> Sequence[Tensor]:
        """List the parameters that have per-sample gradients."""
        return [p for p in self._all_parameters() if _parts(p)]

    def check(self, parameters: Sequence[Tensor]) -> None:
        """Raise where shapes or numbers of samples do not fit."""
        total = max((self.count_of(p) for p in parameters), default=0)
        for p in self._all_parameters():
            if p.grad is not None and not _parts(p):
                raise MissingSquares(
                    p,
                    "it has a gradient but no grad_sample, unlike others: make one for it, or set"
                    " its gradient to None",
                )
        for p in parameters:
            parts = _parts(p)
            spent = self._spent.get(id(p))
            if spent is not None and spent.is_stale(p, parts):
                raise MissingSquares(p, "its grad_sample" + STALE)
            for part in parts:
                if part.dim() != p.dim() + 1 or part.shape[1:] != p.shape:
                    raise MissingSquares(
                        p,
                        f"its grad_sample has shape {tuple(part.shape)}, not [batch,"
                        f" {', '.join(map(str, p.shape))}]",
                    )
                if part.device != p.device:
                    raise MissingSquares(p, f"its grad_sample is on {part.device}")
            count = sum(map(len, parts))
            if count != total:
                raise MissingSquares(
                    p,
                    f"its grad_sample has {count} samples, that of another parameter {total}:"
                    " gather the same samples for all, or set grad_sample to None",
                )

    def inputs(self, parameters: list[Tensor], gradients: list[Tensor], plain: bool) -> RuleInputs:
        """Return gradients of samples to be reduced in the update, or sums and sums of squares."""
        columns = [_parts(p) for p in parameters]
        counts = {tuple(map(len, parts)) for parts in columns}
        # Complex numbers and differently cut lists are left to the reduction of its own.
        real = not any(map(torch.is_complex, parameters))
        if plain and len(counts) == 1 and real:
            return RuleInputs([list(kind) for kind in zip(*columns, strict=True)], per_sample=True)
        return RuleInputs(list(self._reduce(parameters)))

    def used(self, parameters: Sequence[Tensor]) -> None:
        """Note that a step has used the samples of some parameters."""
        for p in parameters:
            self._spent[id(p)] = Spent(p, _parts(p))

    def reset(self, parameters: Sequence[Tensor] | None = None) -> None:
        """Forget the samples; ``optimizer.zero_grad()`` calls this."""
        for p in self._all_parameters() if parameters is None else parameters:
            self._spent.pop(id(p), None)
            if getattr(p, "grad_sample", None) is not None:
                p.grad_sample = None  # type: ignore[attr-defined]

    def _reduce(self, parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        columns = [_parts(p) for p in parameters]
        requested = next((o.backend for ref in self._optimizers if (o := ref())), "auto")
        return backends.reduce_samples(parameters, columns, requested)


def _parts(parameter: Any) -> list[Tensor]:
    """Return the per-sample gradients of a parameter, in as many tensors as they came in."""
    samples = getattr(parameter, "grad_sample", None)
    if samples is None:
        return []
    return list(samples) if isinstance(samples, (list, tuple)) else [samples]
