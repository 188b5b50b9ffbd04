"""What a launch reads on the device besides coefficients: loss scale, clipping, overflow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..memory.device import is_capturing


class GradScale:
    """What a launch reads besides coefficients: the gradient's factor, and whether to skip."""

    def __init__(self, device: torch.device) -> None:
        # float64, so that float64 parameters see the factor in full.
        self.values = torch.zeros(2, dtype=torch.float64, device=device)
        self.values[:1].fill_(1.0)
        self.inverse_scale = torch.ones(1, dtype=torch.float64, device=device)
        self.max_norm = torch.ones(1, dtype=torch.float64, device=device)
        self._max_norm = 1.0
        self._neutral = True

    def memory(self) -> Iterator[Tensor]:
        """List the tensors that launches read and write."""
        yield self.values
        yield self.inverse_scale
        yield self.max_norm

    def load(
        self,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        clipping: bool,
        factor: float = 1.0,
    ) -> None:
        """Take the loss scale and the overflow flag of ``torch.amp.GradScaler``, if any.

        Args:
            grad_scale: what the gradients are to be divided by.
            found_inf: whether to skip the step.
            clipping: whether the factor on the gradient is to be changed by a norm.
            factor: what the gradients are to be multiplied by besides.
        """
        # A captured step must set what an eager one may leave behind.
        unchanged = self._neutral and not is_capturing(self.values.device)
        plain = grad_scale is None and found_inf is None and factor == 1.0
        if plain and unchanged:
            self._neutral = not clipping
            return
        if grad_scale is None:
            self.inverse_scale.fill_(factor)
        else:
            self.inverse_scale.copy_(grad_scale.reshape(1)).reciprocal_().mul_(factor)
        self.values[:1].copy_(self.inverse_scale)
        if found_inf is None:
            self.values[1:].zero_()
        else:
            self.values[1:].copy_(found_inf.reshape(1))
        self._neutral = plain and not clipping

    def square_into(self, squares: Sequence[Tensor]) -> None:
        """Multiply squares by the square of the factor on the gradient."""
        if self._neutral:
            return
        for dtype in {x.dtype for x in squares}:
            factor = self.values[0].square().to(dtype)
            torch._foreach_mul_([x for x in squares if x.dtype == dtype], factor)

    def skip_unless_finite(self, norm: Tensor) -> None:
        """Skip the step where the norm over all processes shows an overflow of another."""
        finite = norm.reshape(1).isfinite()
        self.values[1:].copy_(torch.where(finite, self.values[1:], 1.0))

    def set_max_norm(self, value: float) -> None:
        """Take a new bound on the norm."""
        if value != self._max_norm:
            if is_capturing(self.max_norm.device):
                raise RuntimeError(
                    f"max_norm changed from {self._max_norm} to {value} since the last step, and a"
                    " CUDA graph is being captured: call optimizer.push_hyperparameters() before"
                )
            self.max_norm.fill_(value)
            self._max_norm = value
